"""Calibrated noise meets the budget, and only just; schedules fit to their last step."""

from __future__ import annotations

import math

import pytest

from reticent.core.errors import PrivacyError
from reticent.privacy.accounting import epsilon
from reticent.privacy.calibrate import max_steps, noise_multiplier_for
from reticent.privacy.events import PoissonGaussian

DELTA = 1e-5


@pytest.mark.parametrize(
    ("target", "q", "steps"), [(8.0, 0.2, 60), (1.0, 0.01, 200), (20.0, 1.0, 1), (50.0, 0.5, 500)]
)
def test_noise_is_the_smallest_that_meets_the_budget(target: float, q: float, steps: int) -> None:
    noise = noise_multiplier_for(target, DELTA, q, steps)
    assert epsilon([PoissonGaussian(q, noise, steps)], DELTA) <= target
    assert epsilon([PoissonGaussian(q, noise * 0.998, steps)], DELTA) > target
    assert max_steps(target, DELTA, q, noise) >= steps


def test_generous_budget_gives_the_smallest_noise_on_offer() -> None:
    assert noise_multiplier_for(1e6, DELTA, 0.01, 1) == 0.1


def test_budget_that_cannot_be_met_says_what_helps() -> None:
    with pytest.raises(PrivacyError, match=r"no schedule of 10000 steps.*gives 0\.5.*fewer rounds"):
        noise_multiplier_for(0.001, 1e-9, 1.0, 10000)


@pytest.mark.parametrize(("target", "q", "noise"), [(2.0, 0.1, 1.5), (8.0, 0.2, 1.2), (5, 1, 3.0)])
def test_max_steps_is_the_last_that_fits(target: float, q: float, noise: float) -> None:
    steps = max_steps(target, DELTA, q, noise)
    assert steps >= 1
    assert epsilon([PoissonGaussian(q, noise, steps)], DELTA) <= target
    assert epsilon([PoissonGaussian(q, noise, steps + 1)], DELTA) > target


def test_no_step_fits_in_too_small_a_budget() -> None:
    assert max_steps(1.0, DELTA, 1.0, 0.5) == 0


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_bad_targets_are_refused(bad: float) -> None:
    with pytest.raises(PrivacyError, match="epsilon="):
        noise_multiplier_for(bad, DELTA, 0.1, 1)
    with pytest.raises(PrivacyError, match="epsilon="):
        max_steps(bad, DELTA, 0.1, 1.0)
    with pytest.raises(PrivacyError, match="delta="):
        noise_multiplier_for(1.0, bad if bad != math.inf else 1.0, 0.1, 1)
