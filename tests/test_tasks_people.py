"""Splitting a pool by people: nobody is on both sides, and a client is whose it is said to be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reticent.core.errors import DataError, PlanError
from reticent.core.plan import TaskSection, load_plan, parse_plan
from reticent.core.tasks import OWNED, load_task
from reticent.core.tasks.people import People, PeopleSplit

PEOPLE = People("people", count=9, examples=30, fewest=20)


def _section(clients: int, public: int = 45, **partition: object) -> TaskSection:
    return TaskSection.model_validate(
        {
            "name": "x",
            "clients": clients,
            "public_examples": public,
            "partition": {"kind": "natural", **partition},
        }
    )


def _split(section: TaskSection, seed: int = 0) -> PeopleSplit:
    rng = np.random.default_rng(3)
    sizes = rng.integers(20, 50, 9)
    owners = rng.permutation(np.repeat(np.arange(101, 110), sizes))
    return PeopleSplit(rng.integers(4, size=len(owners)), owners, PEOPLE, section, seed)


@settings(max_examples=60, deadline=None)
@given(
    clients=st.integers(1, 100),
    public=st.integers(1, 159),
    seed=st.integers(0, 9),
    kind=st.sampled_from(["natural", "iid", "dirichlet", "shards"]),
)
def test_nobody_is_public_and_private_and_everything_private_is_dealt_once(
    clients: int, public: int, seed: int, kind: str
) -> None:
    section = _section(clients, public, kind=kind)
    try:
        PEOPLE.check(section)
        split = _split(section, seed)
        parts = [split.client(i) for i in range(clients)]
    except DataError:
        assert clients > (9 - -(-public // 20)) * 20 // (2 if kind == "shards" else 1)
        return
    assert len(split.public) == public == len(set(split.public.tolist()))
    public_people = set(split.owners[split.public].tolist())
    private = np.flatnonzero(np.isin(split.owners, split.private_people))
    assert not public_people & set(split.private_people.tolist())
    assert len(split.private_people) == 9 - -(-public // 20)
    assert sorted(np.concatenate(parts).tolist()) == private.tolist()
    assert min(map(len, parts)) >= 1


def test_as_many_clients_as_people_are_the_people() -> None:
    split = _split(_section(6))
    owners = [set(split.owners[split.client(i)].tolist()) for i in range(6)]
    assert all(len(o) == 1 for o in owners)
    assert set.union(*owners) == set(split.private_people.tolist())


def test_fewer_clients_hold_whole_people() -> None:
    split = _split(_section(4))
    owners = [set(split.owners[split.client(i)].tolist()) for i in range(4)]
    assert sorted(len(o) for o in owners) == [1, 1, 2, 2]
    assert (
        sum(len(split.client(i)) for i in range(4))
        == np.isin(split.owners, split.private_people).sum()
    )


def test_more_clients_hold_consecutive_parts_of_one_person() -> None:
    split = _split(_section(15))
    seen: dict[int, list[int]] = {}
    for i in range(15):
        part = split.client(i)
        (owner,) = set(split.owners[part].tolist())
        seen.setdefault(owner, []).append(len(part))
        own = np.flatnonzero(split.owners == owner)
        first = int(np.searchsorted(own, part[0]))
        assert part.tolist() == own[first : first + len(part)].tolist()
    assert sorted(map(len, seen.values())) == [2, 2, 2, 3, 3, 3]
    assert all(max(sizes) - min(sizes) <= 1 for sizes in seen.values())


def test_other_kinds_mix_the_people() -> None:
    split = _split(_section(6, kind="iid"))
    assert len(set(split.owners[split.client(0)].tolist())) > 2


def test_the_seed_decides_who_is_public() -> None:
    chosen = {tuple(sorted(_split(_section(6), seed).private_people.tolist())) for seed in range(8)}
    assert len(chosen) > 1
    assert np.array_equal(_split(_section(6), 1).public, _split(_section(6), 1).public)


def test_more_public_examples_of_the_same_people_hold_fewer() -> None:
    small, large = _split(_section(6, public=41)), _split(_section(6, public=60))
    assert np.array_equal(large.public[:41], small.public)


def test_sections_that_people_cannot_serve_are_refused() -> None:
    PEOPLE.check(_section(6, public=160))
    with pytest.raises(DataError, match=r"public_examples=161: must be at most 160"):
        PEOPLE.check(_section(6, public=161))
    PEOPLE.check(_section(120))
    with pytest.raises(DataError, match=r"client 120 would have no data: task\.clients=121"):
        PEOPLE.check(_section(121))
    for index in (-1, 6):
        with pytest.raises(DataError, match=f"client {index}: must be 0 to 5"):
            _split(_section(6)).client(index)


def test_a_pool_of_other_people_is_refused() -> None:
    with pytest.raises(DataError, match="of 2 people with at least 10 examples each: must be 9"):
        PeopleSplit(np.zeros(30, int), np.repeat([1, 2], [10, 20]), PEOPLE, _section(2), 0)


def test_nominal_examples_follow_from_the_plan_alone() -> None:
    assert PEOPLE.nominal_examples(_section(6)) == 30
    assert PEOPLE.nominal_examples(_section(12)) == 15
    assert PEOPLE.nominal_examples(_section(6, kind="iid", examples_per_client=7)) == 7


@pytest.mark.parametrize("name", ["har", "text"])
def test_in_the_example_plans_a_client_is_a_person(name: str) -> None:
    plan = load_plan(Path(__file__).parent.parent / "examples" / "tasks" / f"{name}.toml")
    task = load_task(plan.task, plan.seed)
    people = OWNED[name].people
    assert plan.task.partition.kind == "natural"
    assert task.clients == people.count - people.public(plan.task)
    assert plan.federation.clients_per_round == task.clients


def test_natural_clients_need_people_and_all_that_they_have() -> None:
    with pytest.raises(DataError, match=r'kind="natural": this task\'s examples belong to nobody'):
        load_task(parse_plan("", ["task.partition.kind=natural"]).task, 0)
    settings = ["task.partition.kind=natural", "task.partition.examples_per_client=5"]
    with pytest.raises(PlanError, match=r"examples_per_client=5: leave it out"):
        parse_plan("", settings)
