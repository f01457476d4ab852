"""Keeping the memory of freed arrays for the next ones."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_ARRAY, _KEPT = 2**25, 2**29


def keep_freed_memory() -> bool:
    """Let this process keep up to 512 MB that it has freed, and say whether it does.

    By default glibc gives arrays of a few megabytes back to the system as soon as they are freed,
    which clears the same pages again for the next layer's: a fifth of a step of a convolutional
    student. Arrays above 32 MB still go back at once. Without glibc nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such library, or it has no such function
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_ARRAY) and mallopt(_TRIM_THRESHOLD, _KEPT))
