"""How many orders a device has begun within the last hour, whoever sent them."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Any

from reticent.core.run import write_atomic
from reticent.privacy.ledger.files import alone

HOUR = 3600.0


@dataclass(frozen=True)
class Rate:
    """Counts in ``orders.json`` in a device's state folder, over restarts.

    The times are those of the wall clock. Whoever sets it ahead can have more orders, and no server
    can; set back, the clock never holds an order up for longer than an hour of its own time.

    Attributes:
        folder: The state folder; it must exist.
        clock: Returns seconds since 1970.
    """

    folder: Path
    clock: Callable[[], float] = time

    def take(self, most: int) -> bool:
        """Count an order; return whether it is one of at most ``most`` within an hour.

        What is not among them is not counted.

        Raises:
            OSError: If it cannot be written down.
        """
        with alone(self.folder):  # each message is a process of its own
            now = self.clock()
            recent = [at for at in self._times() if abs(now - at) < HOUR]
            if len(recent) >= most:
                return False
            write_atomic(self._path, json.dumps([*recent, now]).encode())
            return True

    @property
    def _path(self) -> Path:
        return self.folder / "orders.json"

    def _times(self) -> list[float]:
        found: Any = None
        with suppress(OSError, ValueError, RecursionError):
            found = json.loads(self._path.read_text(encoding="utf-8"))
        return [at for at in found if type(at) is float] if isinstance(found, list) else []
