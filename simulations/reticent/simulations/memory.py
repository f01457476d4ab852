"""Keeping the memory of freed arrays for the next ones."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_ARRAY, _KEPT = 2**25, 2**29

_CHOSEN = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
"""Variables by which the user has chosen already (``man mallopt``)."""


def keep_freed_memory() -> bool:
    """Let this process keep up to 512 MB that it has freed, and say whether it does.

    By default glibc gives arrays of a few megabytes back to the system as soon as they are freed,
    which clears the same pages again for the next layer's: a fifth of a step of a convolutional
    student. Arrays above 32 MB still go back at once. Nothing changes without glibc, or where the
    environment has a choice of its own.
    """
    if any(name in os.environ for name in _CHOSEN):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such library, or it has no such function
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_ARRAY) and mallopt(_TRIM_THRESHOLD, _KEPT))
