"""Can an update's reader tell whether its client holds 8 or 9 examples?

Not by anything that would be the same for any data: the spread or norm of the update, or its size
in bytes. The naive use of Opacus, which divides by an expected batch size taken from the number of
examples, is kept here so that the same attack is seen to succeed against it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from opacus import PrivacyEngine
from scipy import stats
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from reticent.client.training import LocalTrainer, NoisyStep
from reticent.client.wire import noisy_step, quantization_step
from reticent.compression.codec import build_codec
from reticent.core.plan import Plan, parse_plan
from reticent.core.protocol import PROTOCOL, Constants, Order
from reticent.core.seeds import numpy_generator
from reticent.core.tasks import Examples
from reticent.privacy.randomness import SeededRandomness

INPUTS, CLASSES = 40, 50
WITHOUT, WITH = 8, 9
BATCH, TRIALS = 4, 150
SIGMA, CLIP = 1.5, 0.5

Updates = list[NDArray[np.float64]]
Score = Callable[[NDArray[np.float64]], float]


def inputs_of() -> tuple[torch.Tensor, torch.Tensor]:
    """Nine examples; the last is the one whose membership is guessed."""
    rng = numpy_generator(0, "membership")
    inputs = torch.from_numpy(rng.standard_normal((WITH, INPUTS)).astype(np.float32))
    return inputs, torch.from_numpy(rng.integers(CLASSES, size=WITH))


class SmallTask:
    name, classes, input_shape, clients, nominal_examples = "small", CLASSES, (INPUTS,), 1, WITH

    def public(self) -> Examples:
        return Examples(*inputs_of())

    def test(self) -> Examples:
        return Examples(*inputs_of())

    def client(self, index: int) -> Examples:
        return Examples(*inputs_of())

    def teacher(self) -> nn.Module:
        return nn.Linear(INPUTS, CLASSES)

    def student(self, model: str) -> nn.Module:
        return nn.Linear(INPUTS, CLASSES)


def plan_of(trust: str) -> Plan:
    text = f"""
    student = {{ distill = {{ kind = "none" }}, prune = {{ kind = "none" }}, \
quantize = {{ kind = "none" }} }}
    privacy = {{ noise_multiplier = {SIGMA}, clip = {CLIP}, trust = "{trust}" }}
    federation = {{ clients_per_round = 4, sampling_rate = {BATCH / WITHOUT} }}
    """
    return parse_plan(text)


def step_of(plan: Plan) -> NoisyStep:
    return noisy_step(plan, Order(PROTOCOL, "run", plan.digest, 1, "", SIGMA, float(BATCH), CLIP))


def through_reticent(plan: Plan, step: NoisyStep, count: int) -> Updates:
    """Updates of one client that holds the first ``count`` examples, with new noise each."""
    trainer = LocalTrainer(plan, SmallTask(), Constants(b"", np.zeros((0, 0), dtype=np.float32)))
    start = np.zeros(trainer.layout.size, dtype=np.float32)
    inputs, labels = inputs_of()
    held, source = Examples(inputs[:count], labels[:count]), SeededRandomness(count)
    return [
        trainer.pseudo_gradient(start, held, step, source, ("run", 0, number)).astype(np.float64)
        for number in range(TRIALS)
    ]


def through_naive_opacus(count: int) -> Updates:
    """One step of Opacus' private engine on the data loader that the client happens to have."""
    inputs, labels = inputs_of()
    found: Updates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(count)
        for _ in range(TRIALS // 5):
            model = nn.Linear(INPUTS, CLASSES)
            nn.init.zeros_(model.weight)
            nn.init.zeros_(model.bias)
            loader = DataLoader(TensorDataset(inputs[:count], labels[:count]), batch_size=BATCH)
            private, optimizer, batches = PrivacyEngine().make_private(  # pyright: ignore
                module=model,
                optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
                data_loader=loader,
                noise_multiplier=SIGMA,
                max_grad_norm=CLIP,
            )
            x, y = next(iter(batches))  # pyright: ignore
            F.cross_entropy(private(x), y).backward()  # pyright: ignore
            optimizer.step()
            parts = [p.detach().flatten() for p in model.parameters()]
            found.append(torch.cat(parts).numpy().astype(np.float64))
    return found


def spread(update: NDArray[np.float64]) -> float:
    return float(update.std())


def norm(update: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(update))


def payload_bytes(step: NoisyStep) -> Score:
    """The size on the wire, which anyone on the network sees."""
    codec, blocks = build_codec(("dither4", "ans")), (INPUTS * CLASSES, CLASSES)
    quantum = quantization_step(step)

    def score(update: NDArray[np.float64]) -> float:
        vector = update.astype(np.float32)
        return float(len(codec.encode(vector, blocks, numpy_generator(0), quantum)))

    return score


def attack(without: Updates, with_it: Updates, score: Score) -> tuple[float, float]:
    """Return the area under the attacker's curve, and how likely one so far from 1/2 is by chance.

    The area is the Mann-Whitney statistic: the probability that a score of one world is larger
    than one of the other, whichever way it is larger.
    """
    first, second = [score(u) for u in without], [score(u) for u in with_it]
    result = stats.mannwhitneyu(first, second)
    area = result.statistic / (len(first) * len(second))
    return float(max(area, 1 - area)), float(result.pvalue)


@pytest.mark.parametrize("trust", ["local", "aggregator"])
def test_whether_a_client_holds_8_or_9_examples_cannot_be_told_from_its_update(trust: str) -> None:
    plan = plan_of(trust)
    step = step_of(plan)
    without, with_it = (through_reticent(plan, step, count) for count in (WITHOUT, WITH))
    for score in (spread, norm, payload_bytes(step)):
        area, chance = attack(without, with_it, score)
        # By chance alone the area is below 0.61 in 999 of 1,000 cases.
        assert area < 0.61 and chance > 1e-3, score


def test_the_same_attack_always_tells_it_from_an_update_of_naive_opacus() -> None:
    without, with_it = through_naive_opacus(WITHOUT), through_naive_opacus(WITH)
    for score in (spread, norm):
        area, chance = attack(without, with_it, score)
        assert area == 1.0 and chance < 1e-9


def test_the_same_attack_tells_it_when_a_client_divides_by_its_own_number_of_examples() -> None:
    """The bug planted in our own trainer: a denominator that is not public."""
    plan = plan_of("local")
    right = step_of(plan)
    worlds = [
        through_reticent(plan, NoisyStep(right.clip, right.noise, count / 2), count)
        for count in (WITHOUT, WITH)
    ]
    for score in (spread, norm, payload_bytes(right)):
        area, chance = attack(worlds[0], worlds[1], score)
        assert area > 0.99 and chance < 1e-9


def test_the_area_is_half_for_equal_worlds_and_one_for_worlds_apart() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal(500) for _ in range(2 * TRIALS)]
    area, chance = attack(rows[:TRIALS], rows[TRIALS:], spread)
    assert area < 0.61 and chance > 1e-3
    assert attack(rows[:TRIALS], [2 * r for r in rows[TRIALS:]], spread)[0] == 1.0
