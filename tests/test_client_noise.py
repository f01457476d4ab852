"""The noise of a client, through the real trainer: its scale, its freshness, what it ignores."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import nn

from reticent.client.training import LocalTrainer, NoisyStep
from reticent.client.wire import noisy_step, quantization_step
from reticent.compression.codec import build_codec
from reticent.core.plan import Plan, parse_plan
from reticent.core.protocol import PROTOCOL, Constants, Order
from reticent.core.seeds import numpy_generator
from reticent.core.tasks import Examples
from reticent.core.update import Layout, Vector
from reticent.privacy.randomness import Randomness, SeededRandomness, Stream, SystemRandomness

INPUTS, CLASSES = 40, 100
SIGMA, CLIP, DENOMINATOR = 1.5, 0.5, 10.0
FULL, EMPTY = "federation.sampling_rate=1.0", "federation.sampling_rate=1e-12"
LOCAL, SHARES = 'privacy.trust="local"', 'privacy.trust="aggregator"'
STEPS = "federation.steps_per_round=3"
Path = tuple[str | int, ...]
PATH: Path = ("run", 0, 1)

PLAN_TEXT = f"""
[student]
distill = {{ kind = "none" }}
prune = {{ kind = "none" }}
quantize = {{ kind = "none" }}
[privacy]
noise_multiplier = {SIGMA}
clip = {CLIP}
[federation]
clients_per_round = 10
"""


def examples_of(count: int, seed: int = 0) -> Examples:
    rng = numpy_generator(seed, "examples")
    inputs = rng.standard_normal((count, INPUTS)).astype(np.float32)
    return Examples(torch.from_numpy(inputs), torch.from_numpy(rng.integers(CLASSES, size=count)))


def broken(examples: Examples) -> Examples:
    return Examples(torch.full_like(examples.inputs, float("nan")), examples.labels)


class WideTask:
    """A linear student of 4,100 parameters, enough of them to test a distribution."""

    name, classes, input_shape, clients, nominal_examples = "wide", CLASSES, (INPUTS,), 10, 20

    def public(self) -> Examples:
        return examples_of(20, 100)

    def test(self) -> Examples:
        return examples_of(20, 101)

    def client(self, index: int) -> Examples:
        return examples_of(20, index)

    def teacher(self) -> nn.Module:
        return nn.Linear(INPUTS, CLASSES)

    def student(self, model: str) -> nn.Module:
        return nn.Linear(INPUTS, CLASSES)


def plan_of(*overrides: str) -> Plan:
    return parse_plan(PLAN_TEXT, overrides)


def step_of(plan: Plan) -> NoisyStep:
    order = Order(PROTOCOL, "run", plan.digest, 1, "", SIGMA, DENOMINATOR, CLIP)
    return noisy_step(plan, order)


def trainer_of(plan: Plan) -> LocalTrainer:
    return LocalTrainer(plan, WideTask(), Constants(b"", np.zeros((0, 0), dtype=np.float32)))


def update(
    plan: Plan,
    examples: Examples,
    step: NoisyStep | None = None,
    randomness: Randomness | None = None,
    path: Path = PATH,
) -> Vector:
    trainer = trainer_of(plan)
    start = 0.1 * numpy_generator(0, "start").standard_normal(trainer.layout.size)
    source = randomness or SeededRandomness(7)
    weights = start.astype(np.float32)
    return trainer.pseudo_gradient(weights, examples, step or step_of(plan), source, path)


def noise_of(
    plan: Plan, examples: Examples, source: Randomness | None = None
) -> NDArray[np.float64]:
    """What an update holds beyond the clipped sum, before the division."""
    silent = NoisyStep(CLIP, 0.0, DENOMINATOR)
    noised = update(plan, examples, None, source)
    return DENOMINATOR * (noised - update(plan, examples, silent, source)).astype(np.float64)


def fits(noise: NDArray[np.floating], scale: float) -> bool:
    """Whether ``noise`` is N(0, scale^2): at most one false alarm in ten million."""
    spread = noise.std() / scale - 1
    within = abs(spread) < 5.5 / (2 * len(noise)) ** 0.5
    return bool(within and stats.kstest(noise, "norm", (0, scale)).pvalue > 5e-8)


def fits_only(noise: NDArray[np.floating], scale: float) -> bool:
    """Whether the right scale is accepted, and two thirds and three halves of it rejected."""
    wrong = (scale * 2 / 3, scale * 3 / 2)
    return fits(noise, scale) and not any(fits(noise, other) for other in wrong)


BATCHES: dict[str, tuple[str, Examples]] = {
    "full": (FULL, examples_of(20)),
    "empty draw": (EMPTY, examples_of(20)),
    "no examples": (FULL, examples_of(0)),
    "non-finite": (FULL, broken(examples_of(20))),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("trust", "share"), [(LOCAL, 1.0), (SHARES, 9**-0.5)])
@pytest.mark.parametrize("clipping", ["flat", "per-layer"])
@pytest.mark.parametrize("source", [SeededRandomness(7), SystemRandomness()])
def test_every_batch_gets_exactly_the_noise_that_is_accounted_for(
    batch: str, trust: str, share: float, clipping: str, source: Randomness
) -> None:
    rate, examples = BATCHES[batch]
    plan = plan_of(rate, trust, f'privacy.clipping="{clipping}"')
    assert plan.federation.quorum == 9
    noise = noise_of(plan, examples, source)
    assert fits_only(noise, SIGMA * CLIP * share)


def test_noise_at_two_thirds_or_three_halves_of_the_scale_is_found_out() -> None:
    """The test above is able to fail: the same trainer, with a wrong scale planted."""
    plan = plan_of(FULL, LOCAL)
    right = step_of(plan)
    for factor in (2 / 3, 3 / 2):
        wrong = NoisyStep(right.clip, factor * right.noise, right.denominator)
        silent = update(plan, examples_of(20), NoisyStep(CLIP, 0.0, DENOMINATOR))
        noise = DENOMINATOR * (update(plan, examples_of(20), wrong) - silent)
        assert not fits(noise, SIGMA * CLIP) and fits(noise, factor * SIGMA * CLIP)


@pytest.mark.parametrize("source", [SeededRandomness(7), SystemRandomness()])
def test_the_shares_of_a_quorum_sum_to_the_whole_noise(source: Randomness) -> None:
    """Nine clients, however many examples they hold: the variance of the sum is (sigma C)^2."""
    plan = plan_of(FULL, SHARES)
    held = [examples_of(0), broken(examples_of(5)), *(examples_of(3 * i, i) for i in range(1, 8))]
    assert len(held) == plan.federation.quorum
    total = np.zeros(CLASSES * (INPUTS + 1))
    for client, examples in enumerate(held):
        path = ("run", client, 1)
        silent = update(plan, examples, NoisyStep(CLIP, 0.0, DENOMINATOR), source, path)
        total += DENOMINATOR * (update(plan, examples, None, source, path) - silent)
    assert fits_only(total, SIGMA * CLIP)


class Recording:
    """Passes every draw on, and writes down what was drawn."""

    description = "recording"

    def __init__(self, source: Randomness) -> None:
        self.source = source
        self.draws: list[tuple[Path, str, NDArray[np.float64]]] = []

    def stream(self, *path: str | int) -> Stream:
        return RecordingStream(self, path, self.source.stream(*path))

    def normals(self) -> list[NDArray[np.float64]]:
        return [values for _, kind, values in self.draws if kind == "normal"]


class RecordingStream:
    def __init__(self, log: Recording, path: Path, stream: Stream) -> None:
        self._log, self._path, self._stream = log, path, stream

    def uniform(self, count: int) -> NDArray[np.float64]:
        values = self._stream.uniform(count)
        self._log.draws.append((self._path, "uniform", values.copy()))
        return values

    def normal(self, count: int) -> NDArray[np.float64]:
        values = self._stream.normal(count)
        self._log.draws.append((self._path, "normal", values.copy()))
        return values

    def bytes(self, count: int) -> bytes:
        return self._stream.bytes(count)


def test_what_is_recorded_is_what_is_released() -> None:
    plan, log = plan_of(EMPTY, LOCAL, STEPS), Recording(SeededRandomness(7))
    released = update(plan, examples_of(20), None, log)
    assert len(log.normals()) == 3
    expected = SIGMA * CLIP / DENOMINATOR * np.sum(log.normals(), axis=0)
    np.testing.assert_allclose(released, expected, atol=1e-6)


def sharing(rows: list[NDArray[np.float64]]) -> float:
    """Return the largest correlation of two rows at any (circular) lag, in standard deviations."""
    centred = np.stack(rows) - np.mean(rows, axis=1, keepdims=True)
    spectra = np.fft.rfft(centred / np.linalg.norm(centred, axis=1, keepdims=True))
    size = centred.shape[1]
    pairs = itertools.combinations(range(len(rows)), 2)
    largest = [np.abs(np.fft.irfft(spectra[i] * spectra[j].conj(), size)).max() for i, j in pairs]
    return float(max(largest) * size**0.5)


INDEPENDENT = 8.0
"""With 276 pairs and 4,100 lags, independent rows come this far one time in a billion."""


def noises(source: Randomness) -> list[NDArray[np.float64]]:
    """What two runs draw: two clients, two rounds, three steps each."""
    plan, log = plan_of(EMPTY, LOCAL, STEPS), Recording(source)
    for run, client, number in itertools.product(("a", "b"), (0, 1), (1, 2)):
        update(plan, examples_of(20), None, log, (run, client, number))
    assert len(log.normals()) == 24
    return log.normals()


@pytest.mark.parametrize("source", [SeededRandomness(7), SystemRandomness()])
def test_no_two_clients_rounds_steps_or_runs_share_noise(source: Randomness) -> None:
    assert sharing(noises(source)) < INDEPENDENT


def test_a_device_that_trains_a_round_again_draws_new_noise() -> None:
    """Only a simulation can repeat itself; a device stores what it has released."""
    rows = []
    for source in (SystemRandomness(), SystemRandomness()):
        log = Recording(source)
        update(plan_of(EMPTY, LOCAL), examples_of(20), None, log)
        rows += log.normals()
    assert sharing(rows) < INDEPENDENT


class Careless:
    """Seeded randomness with a planted bug: what tells two streams apart is partly lost."""

    description = "careless"

    def __init__(self, forget: Callable[[Path], Path], skip: bool = False) -> None:
        self.source, self.forget, self.skip = SeededRandomness(7), forget, skip

    def stream(self, *path: str | int) -> Stream:
        stream = self.source.stream(*self.forget(path))
        if self.skip:
            stream.normal(sum(p for p in path if isinstance(p, int)))  # the same numbers, shifted
        return stream


@pytest.mark.parametrize(
    "bug",
    [
        Careless(lambda path: (path[0], *path[2:])),  # the run
        Careless(lambda path: (*path[:2], *path[3:])),  # the client
        Careless(lambda path: (*path[:3], *path[4:])),  # the round
        Careless(lambda path: path[:4]),  # the step
        Careless(lambda path: (path[0],), skip=True),
    ],
)
def test_shared_noise_is_found_out(bug: Careless) -> None:
    assert sharing(noises(bug)) > 5 * INDEPENDENT


COUNTS = (0, 1, 8, 80)


@pytest.mark.parametrize("rate", [FULL, EMPTY, "federation.sampling_rate=0.5"])
def test_the_number_of_steps_and_of_noise_draws_ignores_the_number_of_examples(rate: str) -> None:
    seen = set()
    for count in COUNTS:
        log = Recording(SeededRandomness(7))
        update(plan_of(rate, LOCAL, STEPS), examples_of(count), None, log)
        seen.add(tuple((path, len(v)) for path, kind, v in log.draws if kind == "normal"))
        streams = [path for path, _, _ in log.draws]
        assert streams == [(kind, *PATH, i) for i in range(3) for kind in ("batch", "noise")]
    assert len(seen) == 1


@pytest.mark.parametrize("trust", [LOCAL, SHARES])
def test_the_scale_of_the_noise_ignores_the_number_of_examples(trust: str) -> None:
    plan = plan_of(FULL, trust)
    scales = [noise_of(plan, examples_of(count)).std() for count in COUNTS]
    np.testing.assert_allclose(scales, scales[0], rtol=1e-4)


def payload_sizes(
    codec: tuple[str, ...], count: int, naive: bool = False, clients: int = 40
) -> list[int]:
    """Bytes of the payloads of many clients with ``count`` examples, noised in full each."""
    plan = plan_of(FULL, LOCAL)
    step = step_of(plan)
    quantum = quantization_step(step)
    own = NoisyStep(step.clip, step.noise, max(1, count)) if naive else step
    trainer = trainer_of(plan)
    blocks, chain = trainer.layout.blocks, build_codec(codec)
    start = np.zeros(trainer.layout.size, dtype=np.float32)
    sizes = []
    for client in range(clients):
        source, path = SeededRandomness(count), ("run", client, 1)
        vector = trainer.pseudo_gradient(start, examples_of(count, client), own, source, path)
        sizes.append(len(chain.encode(vector, blocks, numpy_generator(client), quantum)))
    return sizes


@pytest.mark.parametrize("codec", [("identity",), ("dither8",)])
def test_without_an_entropy_coder_every_payload_has_the_same_size(codec: tuple[str, ...]) -> None:
    sizes = {size for count in COUNTS for size in payload_sizes(codec, count, clients=3)}
    assert len(sizes) == 1


def test_sizes_of_entropy_coded_payloads_ignore_the_number_of_examples() -> None:
    codec = ("dither4", "ans")
    few, many = payload_sizes(codec, 1), payload_sizes(codec, 8)
    assert len(set(few + many)) > 10  # they do vary, with the noise
    assert stats.mannwhitneyu(few, many).pvalue > 1e-3
    naive = payload_sizes(codec, 1, naive=True), payload_sizes(codec, 8, naive=True)
    assert stats.mannwhitneyu(*naive).pvalue < 1e-9


def test_the_clipping_of_the_plan_is_what_the_client_does() -> None:
    """One example, no noise: per layer, a bias of 100 among 4,100 gets sqrt(100 / 4100) of C."""
    silent = NoisyStep(CLIP, 0.0, 1.0)
    norms = {}
    for clipping in ("flat", "per-layer"):
        plan = plan_of(FULL, f'privacy.clipping="{clipping}"')
        vector = update(plan, examples_of(1), silent)
        bias = np.linalg.norm(vector[INPUTS * CLASSES :])
        norms[clipping] = (float(np.linalg.norm(vector)), float(bias))
    assert norms["flat"][0] == pytest.approx(CLIP, rel=1e-4)
    assert norms["per-layer"][0] == pytest.approx(CLIP, rel=1e-4)
    assert norms["per-layer"][1] == pytest.approx(CLIP * (100 / 4100) ** 0.5, rel=1e-4)
    assert norms["flat"][1] != pytest.approx(norms["per-layer"][1], rel=1e-2)


def test_a_round_that_failed_changes_nothing_in_the_next() -> None:
    plan = plan_of(FULL, LOCAL)
    used, fresh = trainer_of(plan), trainer_of(plan)
    start = np.full(Layout.of(nn.Linear(INPUTS, CLASSES)).size, 0.01, dtype=np.float32)
    good = examples_of(100)
    labels = good.labels.clone()
    labels[70] = CLASSES  # no such class: the loss fails in the second micro-batch
    source, step = SeededRandomness(7), step_of(plan)
    with pytest.raises(IndexError):
        used.pseudo_gradient(start, Examples(good.inputs, labels), step, source, PATH)
    again = used.pseudo_gradient(start, good, step, source, PATH)
    assert np.array_equal(again, fresh.pseudo_gradient(start, good, step, source, PATH))
