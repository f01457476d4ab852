"""The length of a vector, the same on every machine, and without torch: refusals do not need it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def l2_norm(vector: NDArray[np.floating]) -> float:
    """Return the L2 norm of a vector, summed in float64.

    By NumPy's pairwise sums: what a BLAS rounds to depends on how many threads it has, and these
    wait for each other where several processes share the cores.
    """
    return math.sqrt(float(np.square(vector, dtype=np.float64).sum()))
