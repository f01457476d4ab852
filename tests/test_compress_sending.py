"""What a search rehearses of the update codec: its error on a round's mean, and only that."""

from __future__ import annotations

import numpy as np
import pytest

from reticent.client.steps import NoisyStep
from reticent.compression.codec import build_codec
from reticent.core.plan import Plan, parse_plan
from reticent.core.update import Layout, Vector
from reticent.simulations.compress.sending import Sending

SIZE, NOISE = 5_000, 0.1


def planned(*overrides: str, clients: int = 20) -> Plan:
    fixed = [f"task.clients={clients}", f"federation.clients_per_round={clients}"]
    return parse_plan("", ["task.name=digits", "privacy.trust=local", *fixed, *overrides])


def layout() -> Layout:
    return Layout(("w",), ((SIZE,),))


def sending(plan: Plan, noise: float = NOISE) -> Sending:
    return Sending.of(plan, layout(), NoisyStep(1.0, noise, 1.0), 1.0)


def signal(scale: float = 0.01) -> Vector:
    return (scale * np.random.default_rng(5).standard_normal(SIZE)).astype(np.float32)


def test_a_codec_without_error_changes_nothing() -> None:
    update = signal()
    given = sending(planned('updates.codec=["identity"]')).mean(update, 1)
    assert np.array_equal(given, update.astype(np.float64))


@pytest.mark.parametrize("clients", [4, 20, 500])
@pytest.mark.parametrize(("ratio", "holds"), [(4.0, True), (4.0 * 2 / 3, False)])
def test_a_dither_adds_its_variance_over_the_number_of_clients(
    clients: int, ratio: float, holds: bool
) -> None:
    plan = planned('updates.codec=["auto"]', f"updates.step={ratio}", clients=clients)
    update = signal()
    errors = [sending(plan).mean(update, number) - update for number in range(1, 6)]
    stated = 4.0 * NOISE / 12**0.5 / clients**0.5
    assert (abs(float(np.std(errors)) / stated - 1) < 0.05) is holds


def test_a_biased_codec_is_that_of_every_client_with_its_own_noise() -> None:
    plan, update = planned('updates.codec=["topk:0.05"]'), signal(0.05)
    codec, draws = build_codec(plan.updates.codec, layout()), np.random.default_rng(9)
    noises = NOISE * draws.standard_normal((20, SIZE))
    noises -= noises.mean(axis=0)
    sent = [(update + own).astype(np.float32) for own in noises]
    plain = np.mean([codec.decode(codec.encode(s, (SIZE,), draws), (SIZE,)) for s in sent], axis=0)
    found = sending(plan).mean(update, 1)
    for wanted, given in ((plain.std(), found.std()), (plain @ update, found @ update)):
        assert given == pytest.approx(wanted, rel=0.1)
    assert found.std() < 0.8 * update.std(), "what is not sent does not arrive"


def test_error_feedback_sends_later_what_was_left_out() -> None:
    update, rounds = signal(), 60
    plans = [
        planned('updates.codec=["topk:0.05"]', f"updates.error_feedback={kept}")
        for kept in ("true", "false")
    ]
    kept, lost = (sending(plan, 1e-6) for plan in plans)
    sums = [sum(one.mean(update, n) for n in range(1, rounds + 1)) for one in (kept, lost)]
    differences = [np.linalg.norm(rounds * update - total) for total in sums]
    assert differences[0] < 0.5 * differences[1]


def test_an_update_that_is_not_finite_is_left_alone() -> None:
    update = signal()
    update[3] = np.inf
    given = sending(planned('updates.codec=["auto"]')).mean(update, 1)
    assert np.array_equal(given, update.astype(np.float64))
