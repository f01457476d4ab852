"""Asks the device's nursery to be a program of Flower's, or becomes it in the ordinary way.

A script that imports nothing but the small part of the standard library, because Flower starts it
for every message: ``asking.py FOLDER PROGRAM [ARGUMENT...]``.
"""

from __future__ import annotations

import json
import os
import socket
import sys

SOCKET = "nursery.socket"
OFFER, TAKEN, YES = b"o", b"t", b"y"
_PATIENCE = 10.0


def is_granted(folder: str, words: list[str]) -> bool:
    """Return whether the nursery that listens in ``folder`` has forked a program.

    If not, it never will: who has given up is not there to take its offer, and who took it waits
    for what comes of it, or for the nursery's end. Of two programs for one task the second could
    not begin it, and would end it for the first.

    Nobody waits for the program's end: Flower's programs report to each other over the network.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_PATIENCE)
            connection.connect(f"/proc/self/fd/{descriptor}/{SOCKET}")
            connection.sendall(json.dumps(words).encode() + b"\n")
            if connection.recv(1) != OFFER:
                return False
            connection.settimeout(None)
            connection.sendall(TAKEN)
            return connection.recv(1) == YES
    except OSError:
        return False


if __name__ == "__main__":
    if not is_granted(sys.argv[1], sys.argv[2:]):
        launcher = ["-P", "-m", "reticent.client.launcher", *sys.argv[2:]]
        os.execv(sys.executable, [sys.executable, *launcher])
