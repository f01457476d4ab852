"""Stands in for ``flower-supernode`` on a device, so that it ends when it no longer works.

Two things leave Flower's process (1.41) running and of no use, for good:

- its loop ends with an error that it does not try again, such as a TLS record that was damaged on
  the way, and the thread of its own HTTP server keeps the process alive;
- its SuperExec is killed, for its memory perhaps: nobody starts another, so that the next message
  is waited for without an end.

Here the process ends in both, and the agent starts it again. Nothing of Flower is changed.
"""

from __future__ import annotations

import importlib.metadata
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

PROGRAM = "flower-supernode"
_HELPER = "flower-superexec"[:15]  # the kernel keeps 15 characters of a name
_LOOK_SECONDS = 2.0
_GRACE_SECONDS = 10.0


def helper_died() -> bool:
    """Return whether the SuperExec that this process started is dead."""
    for children in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            for child in children.read_text().split():
                name, _, rest = Path(f"/proc/{child}/stat").read_text().rpartition(")")
                if name.endswith(f"({_HELPER}") and rest.split()[0] in "ZX":
                    return True
    return False


def _watch() -> None:
    while not helper_died():
        time.sleep(_LOOK_SECONDS)
    print("the SuperExec died: this SuperNode ends", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)  # Flower tells the SuperLink that the node leaves
    time.sleep(_GRACE_SECONDS)
    os._exit(1)


def main() -> None:
    """Run Flower's own program, and end the process when it has ended."""
    threading.Thread(target=_watch, daemon=True).start()
    (program,) = importlib.metadata.entry_points(group="console_scripts", name=PROGRAM)
    sys.argv[0] = PROGRAM
    status = 1  # it returns when its connection failed for good
    try:
        program.load()()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
