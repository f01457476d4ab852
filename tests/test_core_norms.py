"""Norms of updates: exact enough, and the same whatever a BLAS does."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest

from reticent.core.norms import l2_norm

CODE = """
import numpy as np
from reticent.core.norms import l2_norm
from reticent.privacy.client_level import norm_of
rng = np.random.default_rng(0)
vectors = [rng.normal(size=n).astype(np.float32) for n in (10, 20_000, 300_000)]
print([f(v).hex() for v in vectors for f in (l2_norm, norm_of)])
"""


@pytest.mark.parametrize("size", [0, 1, 7, 10_001])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_norm_is_summed_in_float64(size: int, scale: float) -> None:
    vector = (scale * np.random.default_rng(size).normal(size=size)).astype(np.float32)
    exact = math.sqrt(math.fsum(float(value) ** 2 for value in vector))
    assert l2_norm(vector) == pytest.approx(exact, rel=1e-14)


def test_norms_do_not_depend_on_the_threads_of_a_blas() -> None:
    """Or the same plan and seed would clip otherwise in workers than in one process."""
    found = [
        subprocess.run(
            [sys.executable, "-c", CODE],
            env=os.environ | {"OPENBLAS_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2", "5")
    ]
    assert found[0].strip() and len(set(found)) == 1
