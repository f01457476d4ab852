"""Calibrated noise meets the budget, and only just; schedules fit to their last step."""

from __future__ import annotations

import math

import pytest

from reticent.core.errors import PrivacyError
from reticent.privacy.accounting import epsilon
from reticent.privacy.calibrate import (
    MOST_STEPS,
    max_rounds,
    max_steps,
    noise_multiplier_for,
    noise_multiplier_that_fits,
)
from reticent.privacy.events import (
    Composed,
    DeclaredPublic,
    Event,
    NonPrivate,
    PoissonGaussian,
    gaussian,
)

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


def test_replacing_one_needs_more_noise_and_twice_as_much_of_all() -> None:
    for q, steps in ((0.2, 60), (1.0, 10)):
        added = noise_multiplier_for(8.0, DELTA, q, steps)
        replaced = noise_multiplier_for(8.0, DELTA, q, steps, relation="replace-one")
        event = PoissonGaussian(q, replaced, steps, "replace-one")
        assert 8.0 * 0.995 < epsilon([event], DELTA) <= 8.0
        assert 1.2 * added < replaced < 2.01 * added
    assert replaced == pytest.approx(2 * added, rel=2e-3)


@pytest.mark.parametrize("relation", ["add-or-remove-one", "replace-one"])
def test_noise_fits_rounds_of_several_events(relation: str) -> None:
    def rounds(noise: float) -> list[Event]:
        both = (gaussian(noise, relation=relation), gaussian(40.0, relation=relation))
        return [Composed(both, 30), DeclaredPublic("the layout")]

    noise = noise_multiplier_that_fits(rounds, 6.0, DELTA)
    assert epsilon(rounds(noise), DELTA) <= 6.0 < epsilon(rounds(noise * 0.998), DELTA)
    # What the second event spends is not left to the first.
    assert noise > noise_multiplier_for(6.0, DELTA, 1.0, 30, relation)


def test_events_that_no_noise_saves_are_refused() -> None:
    with pytest.raises(PrivacyError, match=r"these events cannot meet.*fewer rounds"):
        noise_multiplier_that_fits(lambda noise: [gaussian(noise), gaussian(0.2)], 1.0, DELTA)
    with pytest.raises(PrivacyError, match="gives inf"):
        noise_multiplier_that_fits(lambda noise: [NonPrivate()], 1.0, DELTA)
    assert noise_multiplier_that_fits(lambda noise: [DeclaredPublic("x")], 1.0, DELTA) == 0.1


@pytest.mark.parametrize("relation", ["add-or-remove-one", "replace-one"])
def test_max_rounds_is_the_last_that_fits(relation: str) -> None:
    both = Composed((gaussian(9.0, relation=relation), gaussian(30.0, 2, relation)))
    rounds = max_rounds(6.0, DELTA, both)
    assert rounds >= 1
    assert epsilon([both.times(rounds)], DELTA) <= 6.0 < epsilon([both.times(rounds + 1)], DELTA)
    alone = PoissonGaussian(0.1, 1.5, 1, relation)
    assert max_rounds(2.0, DELTA, alone) == max_steps(2.0, DELTA, 0.1, 1.5, relation)


def test_rounds_that_spend_nothing_or_everything() -> None:
    assert max_rounds(1.0, DELTA, DeclaredPublic("the layout")) == MOST_STEPS
    assert max_rounds(1.0, DELTA, NonPrivate()) == 0
    assert max_rounds(1.0, DELTA, Composed((gaussian(5.0), NonPrivate()))) == 0
    with pytest.raises(PrivacyError, match="epsilon="):
        max_rounds(0.0, DELTA, gaussian(5.0))
