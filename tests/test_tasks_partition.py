"""Partitions: nobody is left without data, and the skew is the one asked for."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reticent.core.errors import DataError
from reticent.core.plan import Partition
from reticent.core.tasks.partition import Deal, label_counts, take

KINDS = ["iid", "dirichlet", "shards"]


def _labels(pool: int, classes: int = 10, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.arange(pool) % classes)


def _deal(pool: int, clients: int, seed: int = 0, **partition: Any) -> Deal:
    return Deal(_labels(pool), clients, Partition(**partition), seed)


@given(
    st.sampled_from(KINDS),
    st.integers(1, 40),
    st.integers(0, 200),
    st.integers(1, 4),
    st.sampled_from([1e-300, 1e-6, 0.05, 1.0, 1e6, 1e300]),
)
@settings(deadline=None)
def test_disjoint_parts_cover_the_pool_and_nobody_is_empty(
    kind: str, clients: int, extra: int, per_client: int, alpha: float
) -> None:
    pool = clients * (per_client if kind == "shards" else 1) + extra
    deal = _deal(pool, clients, kind=kind, labels_per_client=per_client, alpha=alpha)
    parts = [deal.indices(client) for client in range(clients)]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(pool))
    sizes = [len(part) for part in parts]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= (per_client if kind == "shards" else 1)
    assert all(part.dtype == np.int64 for part in parts)


@given(
    st.sampled_from(KINDS),
    st.integers(1, 60),
    st.integers(1, 130),
    st.sampled_from([1e-300, 1e-6, 0.05, 1.0, 1e6, 1e300]),
    st.integers(0, 10**6 - 1),
)
@settings(deadline=None)
def test_own_draws_have_the_exact_size(
    kind: str, pool: int, count: int, alpha: float, client: int
) -> None:
    deal = _deal(
        pool, 10**6, kind=kind, alpha=alpha, labels_per_client=1, examples_per_client=count
    )
    part = deal.indices(client)
    assert part.shape == (count,)
    assert part.dtype == np.int64
    assert part.min() >= 0
    assert part.max() < pool
    times = np.bincount(part, minlength=pool)
    if kind != "shards" and count <= pool:
        assert times.max() == 1
    if kind == "iid":
        assert times.max() - times.min() <= 1
    if kind == "shards":
        assert len(np.unique(deal.labels[part])) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", [None, 30])
def test_parts_depend_on_seed_and_client_and_not_on_the_order_of_calls(
    kind: str, own: int | None
) -> None:
    first, second = (_deal(600, 20, kind=kind, examples_per_client=own) for _ in range(2))
    forward = {c: first.indices(c) for c in range(20)}
    backward = {c: second.indices(c) for c in reversed(range(20))}
    assert all(np.array_equal(forward[c], backward[c]) for c in range(20))
    other = _deal(600, 20, seed=1, kind=kind, examples_per_client=own)
    assert not np.array_equal(other.indices(0), forward[0])
    assert not np.array_equal(forward[1], forward[0])


def _proportions(deal: Deal) -> np.ndarray:
    parts = [deal.labels[deal.indices(c)] for c in range(deal.clients)]
    return np.array([np.bincount(part, minlength=10) / len(part) for part in parts])


@pytest.mark.parametrize("alpha", [0.1, 0.5, 5.0])
def test_dirichlet_skew_is_that_of_alpha_and_not_of_another(alpha: float) -> None:
    # Of each client's true proportions, E[sum p^2] = (alpha + 1) / (10 alpha + 1); a multinomial
    # sample of n examples adds (1 - that) / n.
    def expected(a: float, n: int) -> float:
        square = (a + 1) / (10 * a + 1)
        return square + (1 - square) / n

    deal = _deal(60_000, 2000, kind="dirichlet", alpha=alpha, examples_per_client=50)
    squares = (_proportions(deal) ** 2).sum(axis=1)
    error = squares.std() / np.sqrt(len(squares))
    assert abs(squares.mean() - expected(alpha, 50)) < 4 * error
    for wrong in (alpha * 2 / 3, alpha * 3 / 2):
        assert abs(squares.mean() - expected(wrong, 50)) > 6 * error


def test_iid_draws_are_uniform_over_the_pool() -> None:
    deal = _deal(100, 5000, kind="iid", examples_per_client=20)
    times = np.bincount(np.concatenate([deal.indices(c) for c in range(5000)]), minlength=100)
    # Each example is in a client's hand with probability 1/5, independently over clients.
    assert abs(times - 1000).max() < 5 * np.sqrt(5000 * 0.2 * 0.8)
    assert times.std() > 0.5 * np.sqrt(5000 * 0.2 * 0.8)


def test_disjoint_dirichlet_of_many_small_clients_is_skewed_and_has_no_empty_client() -> None:
    deal = _deal(60_000, 1000, kind="dirichlet", alpha=0.1)
    sizes = {len(deal.indices(c)) for c in range(1000)}
    assert sizes == {60}
    skewed = (_proportions(deal) ** 2).sum(axis=1).mean()
    even = (_proportions(_deal(60_000, 1000, kind="iid")) ** 2).sum(axis=1).mean()
    assert even < 0.13
    assert skewed > 0.4


def test_disjoint_shards_hold_few_labels() -> None:
    deal = _deal(6000, 100, kind="shards", labels_per_client=2)
    kinds = [len(np.unique(deal.labels[deal.indices(c)])) for c in range(100)]
    # 600 examples of a label are 20 shards of 30, so that no shard straddles two labels.
    assert max(kinds) == 2


def test_own_shards_hold_exactly_the_labels_asked_for_in_equal_numbers() -> None:
    deal = _deal(6000, 50, kind="shards", labels_per_client=3, examples_per_client=31)
    for client in range(50):
        counts = np.bincount(deal.labels[deal.indices(client)])
        assert sorted(counts[counts > 0]) == [10, 10, 11]


@pytest.mark.parametrize("kind", KINDS)
def test_a_million_clients_take_little_memory(kind: str) -> None:
    labels = _labels(9000)
    section = Partition.model_validate({"kind": kind, "examples_per_client": 60})
    tracemalloc.start()
    try:
        deal = Deal(labels, 10**6, section, 0)
        drawn = [deal.indices(c) for c in (0, 999_999, 123_456)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [len(part) for part in drawn] == [60, 60, 60]
    assert peak < 2 * 2**20  # two bytes a client would be near it


@pytest.mark.parametrize(
    ("partition", "clients", "reason"),
    [
        (
            {"kind": "iid"},
            101,
            r"client 100 .* pool of 100 .*task\.clients=101.*at most 100 clients",
        ),
        ({"kind": "dirichlet"}, 101, "examples_per_client"),
        ({"kind": "shards", "labels_per_client": 3}, 34, "labels_per_client=3: use at most 33"),
        (
            {"kind": "shards", "labels_per_client": 11, "examples_per_client": 5},
            2,
            "labels_per_client=11: must be at most 10",
        ),
    ],
)
def test_a_client_without_data_is_refused_at_construction(
    partition: dict[str, Any], clients: int, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        _deal(100, clients, **partition)


def test_an_empty_pool_and_labels_of_two_dimensions_are_refused() -> None:
    with pytest.raises(DataError, match="no examples"):
        _deal(0, 1, examples_per_client=3)
    with pytest.raises(DataError, match="one dimension"):
        Deal(np.zeros((2, 2), int), 1, Partition(), 0)


@pytest.mark.parametrize("client", [-1, 20])
@pytest.mark.parametrize("own", [None, 5])
def test_there_are_no_other_clients(client: int, own: int | None) -> None:
    with pytest.raises(DataError, match=f"client {client}: must be 0 to 19"):
        _deal(100, 20, examples_per_client=own).indices(client)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.data())
@settings(deadline=None)
def test_label_counts_fill_the_room_even_with_zero_weights(
    room: list[int], data: st.DataObject
) -> None:
    space = np.array(room, dtype=np.int64)
    weights = np.array(
        data.draw(
            st.lists(
                st.sampled_from([0.0, 5e-324, 0.3, 1.0]), min_size=len(room), max_size=len(room)
            )
        )
    )
    count = data.draw(st.integers(0, sum(room)))
    counts = label_counts(np.random.default_rng(0), weights, count, space)
    assert counts.sum() == count
    assert (counts >= 0).all()
    assert (counts <= space).all()


def test_take_repeats_nothing_before_everything_was_drawn() -> None:
    drawn = take(np.random.default_rng(0), np.array([3, 5, 8]), 7)
    assert sorted(np.unique(drawn, return_counts=True)[1]) == [2, 2, 3]
