"""Interrupting commands as a terminal does."""

from __future__ import annotations

import signal


def heeds_ctrl_c() -> None:
    """Undo, in a child before it starts, that a background job's children ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
