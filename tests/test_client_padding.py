"""Lengths on the wire: with padding they tell clients of 0, 45 and 90 examples apart no more."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from reticent.client.training import LocalTrainer
from reticent.client.wire import Wire, noisy_step, public_length, wire_of
from reticent.compression.codec import build_codec, pad
from reticent.compression.codec.frame import OVERHEAD, PADDING_OVERHEAD
from reticent.core.errors import PayloadError
from reticent.core.plan import Plan, parse_plan
from reticent.core.protocol import PROTOCOL, Constants, Order
from reticent.core.tasks import Examples
from reticent.core.update import Vector
from reticent.privacy.randomness import SeededRandomness

INPUTS, CLASSES, SHARES, SIGMA, CLIP = 100, 40, 90, 0.83, 0.5
BLOCKS, SIZE = (INPUTS * CLASSES, CLASSES), INPUTS * CLASSES + CLASSES
COUNTS = (0, 45, 90)


class Shape:
    """The default plan's shape: 90 examples a client, a tenth of them in a batch."""

    name, classes, input_shape, clients, nominal_examples = "shape", CLASSES, (INPUTS,), 100, 90

    def student(self, model: str) -> nn.Module:
        return nn.Linear(INPUTS, CLASSES)


def plan_of(*overrides: str) -> Plan:
    text = f"""
    student = {{ distill = {{ kind = "none" }}, prune = {{ kind = "none" }}, \
quantize = {{ kind = "none" }} }}
    privacy = {{ noise_multiplier = {SIGMA}, clip = {CLIP} }}
    """
    return parse_plan(text, overrides)


def wire_for(plan: Plan) -> Wire:
    return wire_of(plan, noisy_step(plan, order_of(plan)), CLIP, SIZE)


def order_of(plan: Plan) -> Order:
    return Order(PROTOCOL, "run", plan.digest, 1, "", SIGMA, 9.0, CLIP)


@cache
def updates_of(count: int) -> list[Vector]:
    """Twenty updates of a client with ``count`` examples of few classes, as clients have."""
    plan = plan_of()
    trainer = LocalTrainer(plan, Shape(), Constants(b"", np.zeros((0, 0), np.float32)))  # pyright: ignore
    generator = torch.Generator().manual_seed(count)
    held = Examples(
        torch.randn(count, INPUTS, generator=generator) * 0.3 + 0.5,
        torch.randint(2, (count,), generator=generator),
    )
    start, step = np.zeros(SIZE, dtype=np.float32), noisy_step(plan, order_of(plan))
    source = SeededRandomness(count)
    return [trainer.pseudo_gradient(start, held, step, source, ("run", t)) for t in range(20)]


def lengths(plan: Plan, count: int) -> list[int]:
    wire, codec = wire_for(plan), build_codec(plan.updates.codec)
    generator = np.random.default_rng(count)
    return [len(wire.encode(codec, u, BLOCKS, generator)) for u in updates_of(count)]


def area(first: list[int], second: list[int]) -> float:
    """Area under the curve of one who guesses by length; 1/2 is blind guessing."""
    result = stats.mannwhitneyu(first, second).statistic / (len(first) * len(second))
    return float(max(result, 1 - result))


@pytest.mark.parametrize("overrides", [(), ("updates.step=2.0", 'updates.codec=["auto"]')])
def test_padded_lengths_are_equal_and_unpadded_ones_tell_clients_apart(overrides) -> None:
    bare = {count: lengths(plan_of("updates.pad=false", *overrides), count) for count in COUNTS}
    assert area(bare[0], bare[90]) > 0.95
    assert area(bare[0], bare[45]) > 0.9
    padded = {count: lengths(plan_of(*overrides), count) for count in COUNTS}
    assert len({length for found in padded.values() for length in found}) == 1
    assert area(padded[0], padded[90]) == 0.5
    # The price, for so small a model: less than half of what the noise alone takes.
    assert 1.0 < padded[0][0] / np.mean(bare[0]) < 1.5


def test_padding_changes_no_value_and_the_length_follows_from_the_plan() -> None:
    plan, codec = plan_of(), build_codec(("dither4", "ans"))
    wire = wire_for(plan)
    assert wire.deviation is not None
    bare = Wire(wire.step, None)
    for update in updates_of(90)[:3]:
        padded = wire.encode(codec, update, BLOCKS, np.random.default_rng(1))
        plain = bare.encode(codec, update, BLOCKS, np.random.default_rng(1))
        assert plain == codec.encode(update, BLOCKS, np.random.default_rng(1), wire.step)
        assert np.array_equal(codec.decode(padded, BLOCKS), codec.decode(plain, BLOCKS))
        assert len(padded) == public_length(codec, BLOCKS, wire.deviation, wire.step)


def test_codecs_of_one_length_are_not_padded() -> None:
    wire = wire_for(plan_of())
    for names in (("identity",), ("int8",), ("sign",)):
        codec = build_codec(names)
        payload = wire.encode(codec, updates_of(45)[0], BLOCKS, np.random.default_rng(1))
        assert payload == codec.encode(
            updates_of(45)[0], BLOCKS, np.random.default_rng(1), wire.step
        )


def test_room_is_for_the_noise_and_one_batch_of_aligned_gradients() -> None:
    plan = plan_of()
    noise = SIGMA * CLIP / np.sqrt(SHARES) / 9
    wire = wire_for(plan)
    assert wire.step == pytest.approx(noise / 2)
    assert wire.deviation == pytest.approx(np.sqrt(noise**2 + CLIP**2 / SIZE))
    client = plan_of("privacy.unit=client", "updates.step=0.25")
    wire = wire_for(client)
    assert wire.deviation == pytest.approx(CLIP / np.sqrt(SIZE))
    assert wire.step == pytest.approx(CLIP / np.sqrt(SIZE) / 4)
    off = parse_plan('privacy = "off"')
    assert wire_of(off, noisy_step(off, order_of(off)), 0.0, SIZE) == Wire(None, None)


def test_an_update_beyond_the_room_takes_whole_eighths_more() -> None:
    plan, codec = plan_of(), build_codec(("dither4", "ans"))
    wire = wire_for(plan)
    assert wire.deviation is not None
    first = public_length(codec, BLOCKS, wire.deviation, wire.step)
    found = set()
    for scale in (0.0, 1.0, 3.0, 10.0, 50.0):
        vector = np.random.default_rng(0).normal(size=SIZE).astype(np.float32)
        vector *= np.float32(scale * wire.deviation)
        found.add(len(wire.encode(codec, vector, BLOCKS, np.random.default_rng(0))))
    assert first in found and len(found) > 2
    assert all((length - first) % -(-first // 8) == 0 for length in found)


@pytest.mark.parametrize("names", [("identity",), ("dither4", "ans"), ("sign", "zstd")])
@settings(max_examples=40, deadline=None)
@given(extra=st.integers(0, 300), place=st.integers(0, 10**6), mask=st.integers(1, 255))
def test_padded_payloads_are_read_exactly_or_refused(names, extra, place, mask) -> None:
    codec, vector = build_codec(names), np.linspace(-1, 1, 50).astype(np.float32)
    payload = codec.encode(vector, (50,), np.random.default_rng(0))
    padded = pad(payload, len(payload) + PADDING_OVERHEAD + extra)
    assert len(padded) == len(payload) + PADDING_OVERHEAD + extra
    assert np.array_equal(codec.decode(padded, (50,)), codec.decode(payload, (50,)))
    flipped = bytearray(padded)
    flipped[place % len(padded)] ^= mask
    for changed in (bytes(flipped), padded[:-1], padded + b"\0"):
        with pytest.raises(PayloadError):
            codec.decode(changed, (50,))


def test_padding_must_fit_and_must_be_zeros() -> None:
    payload = build_codec(("int8",)).encode(np.ones(3, np.float32), (3,), np.random.default_rng(0))
    with pytest.raises(PayloadError, match="do not fit into"):
        pad(payload, len(payload) + PADDING_OVERHEAD - 1)
    with pytest.raises(PayloadError, match="at least"):
        pad(b"short", OVERHEAD + 100)
