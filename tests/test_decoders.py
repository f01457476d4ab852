"""Every decoder of network and disk: typed errors only, bounded in time and memory."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator

import pytest
from decoders import DECODERS, Decoder, exceeded, mutated, tried
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

every_decoder = pytest.mark.parametrize("decoder", DECODERS.values(), ids=list(DECODERS))


@pytest.fixture(autouse=True, scope="module")
def _traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def holds(decoder: Decoder, data: bytes) -> None:
    assert not exceeded(decoder, data, tried(decoder, data))


@every_decoder
def test_what_was_encoded_is_accepted(decoder: Decoder) -> None:
    assert decoder.valid
    for data in decoder.valid:
        assert tried(decoder, data).accepted


HOSTILE = (
    *(opening * 3000 for opening in (b"[", b'{"a":', b"x = [", b"x = {x = ")),
    *(text.replace(b"9", b"9" * 5000) for text in (b"9", b'{"round": 9}', b"x = 9", b"[x]\ny = 9")),
)


@every_decoder
def test_deep_and_long_texts_end_in_a_typed_error_or_a_value(decoder: Decoder) -> None:
    for data in HOSTILE:
        holds(decoder, data)
        holds(decoder, decoder.mended(data))


@every_decoder
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=400))
def test_arbitrary_bytes_end_in_a_typed_error_or_a_value(decoder: Decoder, data: bytes) -> None:
    holds(decoder, data)


@every_decoder
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**64 - 1))
def test_changed_inputs_end_in_a_typed_error_or_a_value(decoder: Decoder, seed: int) -> None:
    holds(decoder, mutated(decoder, random.Random(seed)))
