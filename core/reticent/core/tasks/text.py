"""The next character of a role in Shakespeare's plays (after McMahan et al. 2017, section 3)."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import sequences
from .owned import OwnedArrays, OwnedSource
from .people import People
from .sources import read_embedded

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz,.;:?!'-"
ROLES, TEST_ROLES = 260, 60
LENGTH = 5000
"""Characters of each role that are used: its first, so that every role has as many."""

CONTEXT, STRIDE = 40, 8
EXAMPLES = (LENGTH - CONTEXT - 1) // STRIDE + 1
"""Examples of one role: a context every ``STRIDE`` characters, and the character after it."""

PEOPLE = People("roles", ROLES - TEST_ROLES, examples=EXAMPLES, fewest=EXAMPLES)


@functools.cache
def load_text() -> OwnedArrays:
    """Return all contexts, uint8 ``(n, 40)``; the file is in random order, its last 60 rows test.

    Raises:
        DataError: If the file is absent or damaged.
    """
    codes = read_embedded("plays-roles.idx.gz")
    contexts, following = _windows(codes)
    owners = np.repeat(np.arange(ROLES), EXAMPLES)
    cut = (ROLES - TEST_ROLES) * EXAMPLES
    return OwnedArrays(
        contexts[:cut], following[:cut], owners[:cut], contexts[cut:], following[cut:]
    )


def _windows(codes: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return contexts ``(n, 40)`` and next characters ``(n,)`` of each row in turn."""
    views = np.lib.stride_tricks.sliding_window_view(codes, CONTEXT + 1, axis=1)[:, ::STRIDE]
    flat = views.reshape(-1, CONTEXT + 1)
    return flat[:, :CONTEXT], flat[:, CONTEXT]


def _inputs(codes: NDArray[Any]) -> NDArray[np.float32]:
    return codes.astype(np.float32)


TEXT = OwnedSource(
    name="text",
    classes=len(ALPHABET),
    input_shape=(CONTEXT,),
    people=PEOPLE,
    preprocessing=json.dumps({"alphabet": ALPHABET, "codes": "position in the alphabet, float32"}),
    load=load_text,
    inputs=_inputs,
    teacher=sequences.teacher,
    student=sequences.student,
)
