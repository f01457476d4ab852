"""Faults planted in the real path: the audit lets the unmodified code pass and catches each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from reticent.client import round as client_round
from reticent.client import training
from reticent.client.training import NoisyStep
from reticent.core.errors import PlanError
from reticent.core.plan import Plan, parse_plan
from reticent.core.tasks import Examples
from reticent.privacy import randomness
from reticent.privacy.accounting import epsilon
from reticent.privacy.events import PoissonGaussian
from reticent.privacy.randomness import SeededRandomness, Stream
from reticent.server import client_level, folding
from reticent.simulations.audit import Audit, audit_plan

INPUTS, CLASSES = 40, 100
ROUNDS = 6


class WideTask:
    """A linear student of 4,100 parameters; an audit asks a task for nothing else."""

    name, classes, input_shape, clients, nominal_examples = "wide", CLASSES, (INPUTS,), 4, 20

    def public(self) -> Examples:
        return self.client(0)

    def test(self) -> Examples:
        return self.client(0)

    def client(self, index: int) -> Examples:
        return Examples(torch.zeros(1, INPUTS), torch.zeros(1, dtype=torch.int64))

    def teacher(self) -> nn.Module:
        return nn.Linear(INPUTS, CLASSES)

    def student(self, model: str) -> nn.Module:
        return nn.Linear(INPUTS, CLASSES)


def make_task(section: object, seed: int) -> WideTask:
    """What the plan of these tests names."""
    return WideTask()


PLAN_TEXT = f"""
[task]
name = "{__name__}:make_task"
clients = 4
[student]
prune = {{ kind = "none" }}
[federation]
rounds = {ROUNDS}
clients_per_round = 4
min_replies = 4
sampling_rate = 0.5
"""


def plan_of(*overrides: str) -> Plan:
    noise = [] if any("noise_multiplier" in o for o in overrides) else ["2.0"]
    return parse_plan(
        PLAN_TEXT, [*overrides, *(f"privacy.noise_multiplier={value}" for value in noise)]
    )


def audited(*overrides: str, canaries: int = 1500) -> Audit:
    return audit_plan(plan_of(*overrides), canaries, seed=1)


LOCAL = 'privacy.trust="local"'
CLIENT = 'privacy.unit="client"'
KINDS: dict[str, tuple[str, ...]] = {
    "aggregator": (),
    "local": (LOCAL,),
    "local-steps": (LOCAL, "federation.steps_per_round=2"),
    "replace-one": ('privacy.relation="replace-one"', "privacy.noise_multiplier=4.0"),
    "per-layer": ('privacy.clipping="per-layer"',),
    "pruned": ('student.prune={kind="magnitude", sparsity=0.3}',),
    "float-codec": ('updates.codec=["identity"]',),
    "client": (CLIENT, "privacy.noise_multiplier=4.0"),
    "adaptive": (
        CLIENT,
        "privacy.clip_quantile=0.5",
        "privacy.noise_multiplier=4.0",
        "task.clients=64",
        "federation.clients_per_round=64",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_unmodified_code_is_consistent_with_the_claim(kind: str) -> None:
    found = audited(*KINDS[kind], canaries=1000)
    assert found.verdict == "consistent"
    assert found.randomness.passed and found.randomness.pairs > 0
    # Not by saying nothing: the noise would have to be much larger for the bound to be this low.
    assert 0.1 * found.claimed < found.lower_bound <= found.claimed
    assert 0 < found.any_mechanism < found.claimed


Fault = Callable[[pytest.MonkeyPatch], None]


def halve_noise(patch: pytest.MonkeyPatch) -> None:
    real = client_round.noisy_step

    def halved(*arguments: Any) -> NoisyStep:
        step = real(*arguments)
        return replace(step, noise=step.noise / 2)

    patch.setattr(client_round, "noisy_step", halved)


def drop_clipping(patch: pytest.MonkeyPatch) -> None:
    real = training.ClippedGradients.sums

    def unclipped(
        self: Any, inputs: Any, labels: Any, counts: Any, loss: Any, clip: float, *rest: Any
    ) -> NDArray[np.float64]:
        return real(self, inputs, labels, counts, loss, 1e6 * clip, *rest)

    patch.setattr(training.ClippedGradients, "sums", unclipped)


def double_rate(patch: pytest.MonkeyPatch) -> None:
    """The client samples at twice the rate that is charged."""
    real = randomness._SeededStream.uniform
    patch.setattr(randomness._SeededStream, "uniform", lambda self, count: real(self, count) / 2)


def reuse_noise(keep: Callable[[tuple[str | int, ...]], tuple[str | int, ...]]) -> Fault:
    def fault(patch: pytest.MonkeyPatch) -> None:
        real = SeededRandomness.stream

        def stream(self: SeededRandomness, *path: str | int) -> Stream:
            return real(self, *(keep(path) if path[0] in ("noise", "server") else path))

        patch.setattr(SeededRandomness, "stream", stream)

    return fault


def halve_server_noise(patch: pytest.MonkeyPatch) -> None:
    real = client_level.noised_sum

    def halved(total: Any, clip: float, multiplier: float, stream: Stream) -> NDArray[np.float64]:
        return real(total, clip, multiplier / 2, stream)

    patch.setattr(client_level, "noised_sum", halved)


def drop_bound(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(folding, "clipped", lambda update, clip: update)


FAULTS: dict[str, tuple[Fault, tuple[str, ...]]] = {
    "noise halved": (halve_noise, ()),
    "noise halved, local trust": (halve_noise, (LOCAL,)),
    "clipping off": (drop_clipping, ()),
    "q under-stated": (double_rate, ()),
    "noise halved on the server": (halve_server_noise, KINDS["client"]),
    "bound off on the server": (drop_bound, KINDS["client"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_puts_the_bound_far_above_the_claim(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault, overrides = FAULTS[name]
    fault(monkeypatch)
    found = audited(*overrides)
    assert found.verdict == "violated"
    assert found.lower_bound > 1.15 * found.claimed


# Paths are (purpose, run, client, round, step) on clients and ("server", what, run, round).
REUSED: dict[str, tuple[Fault, tuple[str, ...]]] = {
    "between clients": (reuse_noise(lambda path: (*path[:2], *path[3:])), ()),
    "between rounds": (reuse_noise(lambda path: path[:3]), ()),
    "everywhere": (reuse_noise(lambda path: path[:1]), (LOCAL,)),
    "between rounds on the server": (reuse_noise(lambda path: path[:3]), KINDS["client"]),
}


@pytest.mark.parametrize("name", REUSED)
def test_reused_noise_is_caught_by_the_test_of_randomness_where_canaries_see_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault, overrides = REUSED[name]
    fault(monkeypatch)
    found = audited(*overrides, canaries=500)
    check = found.randomness
    assert found.verdict == "violated" and not check.passed
    assert check.largest_correlation is not None and check.limit is not None
    assert check.largest_correlation > 0.9 > check.limit
    assert found.lower_bound < found.claimed


def test_a_share_of_noise_too_small_for_the_canaries_is_seen_in_its_variance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = client_round.noisy_step

    def less(*arguments: Any) -> NoisyStep:
        step = real(*arguments)
        return replace(step, noise=step.noise * 0.95)

    monkeypatch.setattr(client_round, "noisy_step", less)
    found = audited(canaries=500)
    assert found.lower_bound < found.claimed
    assert found.verdict == "violated" and not found.randomness.passed


def test_an_audit_is_a_function_of_plan_canaries_rounds_and_seed() -> None:
    plan = plan_of(LOCAL)
    first, again = (audit_plan(plan, 200, 3, seed=4) for _ in range(2))
    assert replace(first, seconds=0.0) == replace(again, seconds=0.0)
    assert first.rounds == 3 and first.participations == ROUNDS
    other = audit_plan(plan, 200, 3, seed=5)
    assert other.randomness != first.randomness and other.claimed == first.claimed


def test_the_claim_is_that_of_the_rounds_that_were_charged() -> None:
    found = audit_plan(plan_of(LOCAL), 100, 2)
    assert found.claimed == epsilon([PoissonGaussian(0.5, 2.0, 2)], found.delta)


@pytest.mark.parametrize(
    ("overrides", "canaries", "rounds", "words"),
    [
        ((), 3000, None, "3000 canaries: must be at least 1 and at most 2050"),
        ((), 0, None, "0 canaries"),
        ((), 10, ROUNDS + 1, f"rounds={ROUNDS + 1}: must be at least 1 and at most {ROUNDS}"),
    ],
)
def test_what_cannot_be_audited_is_refused_in_words(
    overrides: tuple[str, ...], canaries: int, rounds: int | None, words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        audit_plan(plan_of(*overrides), canaries, rounds)


def test_a_plan_without_privacy_has_no_claim_to_audit() -> None:
    with pytest.raises(PlanError, match="no claim to audit"):
        audit_plan(parse_plan(PLAN_TEXT, ['privacy="off"']))
