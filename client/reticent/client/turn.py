"""One order after another on a device: what is checked for one must hold until it is charged."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reticent.core.errors import PolicyError
from reticent.core.protocol import Refusal

from .order import Refused

NAME = "order.lock"
PATIENCE = 60.0
_LOOK_SECONDS = 0.1


@contextmanager
def turn(folder: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Keep other processes that follow an order in ``folder`` waiting, until the block ends.

    Orders are followed by a process each, and Flower starts as many as there are messages. The
    system gives the turn back when a process ends, however it ends.

    Raises:
        Refused: If another order takes longer than ``patience`` seconds, or ``folder`` cannot be
            written.
    """
    try:
        descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise Refused(Refusal.LEDGER) from error
    try:
        _wait(descriptor, patience)
        yield
    finally:
        os.close(descriptor)


def _wait(descriptor: int, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                said = f"another order is being followed, for more than {patience:g} s"
                raise Refused(Refusal.NOT_NOW) from PolicyError(said)
        time.sleep(_LOOK_SECONDS)
