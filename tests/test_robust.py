"""Robust rules: their guarantees, against loops, and through a whole simulation."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reticent.core.errors import PlanError
from reticent.core.plan import Federation, Robust, parse_plan
from reticent.core.run import Run
from reticent.core.seeds import numpy_generator
from reticent.core.tasks import load_task
from reticent.server import robust
from reticent.server.journal import Journal
from reticent.server.possible import require_possible
from reticent.server.robust import chosen, combined, require_room
from reticent.simulations.simulate import simulate

HUGE = 1e6
KINDS = ["trimmed-mean", "median", "multi-krum"]


def rule(kind: str, attackers: int) -> Robust:
    return Robust(kind=kind, attackers=0 if kind == "median" else attackers)  # type: ignore[arg-type]


def honest(count: int, size: int = 40, seed: int = 0) -> list[np.ndarray]:
    draws = numpy_generator(seed, "honest")
    return [(1 + 0.1 * draws.standard_normal(size)).astype(np.float32) for _ in range(count)]


def attacks(good: list[np.ndarray], count: int) -> dict[str, list[np.ndarray]]:
    """Return colluding attackers of several kinds; each knows all honest updates."""
    mean, spread = np.mean(good, axis=0), np.std(good, axis=0)
    one = np.full_like(mean, HUGE)
    draws = numpy_generator(9, "attack")
    return {
        "all at one far point": [one] * count,
        "sign-flip, enlarged": [-HUGE * mean] * count,
        "two sides": [one * (-1) ** i for i in range(count)],
        "float32's largest": [np.full_like(mean, 3e38)] * count,
        "one coordinate": [mean + HUGE * (np.arange(mean.size) == 0)] * count,
        "a little is enough (Baruch et al. 2019)": [mean - 1.5 * spread] * count,
        "apart from each other": [HUGE * draws.standard_normal(mean.size) for _ in range(count)],
    }


def mixed(good: list[np.ndarray], bad: list[np.ndarray], seed: int = 0) -> dict[int, np.ndarray]:
    rows = [np.asarray(r, dtype=np.float32) for r in (*good, *bad)]
    return {
        int(n): r
        for n, r in zip(numpy_generator(seed, "n").permutation(len(rows)), rows, strict=True)
    }


def reference(kind: str, attackers: int, updates: dict[int, np.ndarray]) -> np.ndarray:
    """Return what ``combined`` must, by plain loops over lists of floats."""
    rows = [[float(v) for v in updates[node]] for node in sorted(updates)]
    n = len(rows)
    if kind == "multi-krum":
        near, scores = n - attackers - 2, []
        for i in range(n):
            others = [
                sum((a - b) ** 2 for a, b in zip(rows[i], rows[j], strict=True))
                for j in range(n)
                if j != i
            ]
            scores.append((sum(sorted(others)[:near]), i))
        rows = [rows[i] for _, i in sorted(scores)[:near]]
        return np.array([sum(c) / len(c) for c in zip(*rows, strict=True)])
    columns = [sorted(c) for c in zip(*rows, strict=True)]
    if kind == "median":
        return np.array([(c[(n - 1) // 2] + c[n // 2]) / 2 for c in columns])
    return np.array([sum(c[attackers : n - attackers]) / (n - 2 * attackers) for c in columns])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(0, 5), st.integers(1, 30), st.integers(0, 2**30))
def test_a_rule_is_what_plain_loops_say(kind, attackers, more, size, seed) -> None:
    draws = numpy_generator(seed, "any")
    rows = draws.standard_normal((2 * attackers + 3 + more, size)).astype(np.float32)
    rows[0] = rows[-1] = 0  # ties, and a repeated update
    updates = mixed(list(rows), [], seed)
    want = reference(kind, attackers, updates)
    assert combined(rule(kind, attackers), updates) == pytest.approx(want, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("kind", ["trimmed-mean", "median"])
@pytest.mark.parametrize("attackers", [1, 4, 9])
def test_trimmed_mean_and_median_stay_within_honest_values_against_f_of_2f_plus_1(
    kind: str, attackers: int
) -> None:
    good = honest(attackers + 1)
    low, high = np.min(good, axis=0), np.max(good, axis=0)
    for name, bad in attacks(good, attackers).items():
        result = combined(rule(kind, attackers), mixed(good, bad))
        assert (low <= result).all() and (result <= high).all(), name


@pytest.mark.parametrize("attackers", [1, 3, 8])
def test_multi_krum_stays_within_its_bound_of_every_honest_update_against_f_of_2f_plus_3(
    attackers: int,
) -> None:
    good = honest(attackers + 3)
    n, f = 2 * attackers + 3, attackers
    diameter = max(np.linalg.norm(a - b) for a in good for b in good)
    bound = (1 + np.sqrt((n - f - 2) / (n - 2 * f - 1))) * diameter
    for name, bad in attacks(good, attackers).items():
        result = combined(rule("multi-krum", f), mixed(good, bad))
        assert max(np.linalg.norm(result - g) for g in good) <= bound, name


def test_multi_krum_chooses_no_attacker_at_a_far_point_even_if_all_are_there() -> None:
    good, bad = honest(13), [np.full(40, HUGE, dtype=np.float32)] * 5
    assert all(i < 13 for i in chosen([*good, *bad], 5))


@pytest.mark.parametrize("kind", KINDS)
def test_beyond_the_breakdown_point_nothing_holds(kind: str) -> None:
    """One attacker more than a rule is made for moves it as far as it likes."""
    good, attackers = honest(4), 4 if kind == "multi-krum" else 5
    bad = [np.full(40, HUGE, dtype=np.float32)] * attackers
    made_for = 2 if kind == "multi-krum" else attackers - 1
    assert np.abs(combined(rule(kind, made_for), mixed(good, bad))).max() > HUGE / 100


def test_a_mean_is_moved_anywhere_by_one_client() -> None:
    updates = mixed(honest(99), [np.full(40, HUGE)])
    assert np.abs(combined(Robust(), updates)).min() > HUGE / 200


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_depends_on_neither_order_nor_chunks(kind: str, monkeypatch) -> None:
    updates = mixed(honest(11, 1000), [])
    want = combined(rule(kind, 2), updates)
    backwards = dict(reversed(updates.items()))
    assert (combined(rule(kind, 2), backwards) == want).all()
    monkeypatch.setattr(robust, "_CHUNK", 7)
    assert combined(rule(kind, 2), updates) == pytest.approx(want, rel=1e-13)


def test_equal_updates_tie_to_the_lower_node() -> None:
    assert chosen([np.zeros(3)] * 7, 2) == [0, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_too_few_updates_are_refused(kind: str) -> None:
    enough = rule(kind, 2).fewest
    combined(rule(kind, 2), mixed(honest(enough), []))
    with pytest.raises(PlanError, match=f"needs {enough} updates, and {enough - 1} arrived"):
        combined(rule(kind, 2), mixed(honest(enough - 1), []))


def test_more_updates_than_fit_into_memory_are_refused_before_training() -> None:
    f = Federation(clients_per_round=100, robust=Robust(kind="median"))
    require_room(f, robust.LARGEST // 400)
    with pytest.raises(PlanError, match="at most 1073741824"):
        require_room(f, robust.LARGEST // 400 + 1)
    require_room(Federation(clients_per_round=100), 2**40)


def test_the_room_is_checked_with_the_students_parameters(monkeypatch) -> None:
    plan = parse_plan("", [*SMALL, "federation.robust.kind=median"])
    task = load_task(plan.task, plan.seed)
    require_possible(plan, task)
    monkeypatch.setattr(robust, "LARGEST", 1000)
    with pytest.raises(PlanError, match="needed at once"):
        require_possible(plan, task)


SMALL = [
    "task.name=digits",
    "privacy=off",
    "task.clients=20",
    "task.public_examples=60",
    "teacher.epochs=1",
    "student.epochs=1",
    "federation.clients_per_round=20",
    "federation.rounds=2",
    "engine.workers=1",
]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["robust.kind=mode"], ["robust.kind", "'trimmed-mean', 'median' or 'multi-krum'"]),
        (["robust.kind=trimmed-mean"], ["attackers=0", "at least 1"]),
        (["robust.kind=median", "robust.attackers=2"], ["attackers=2", "left out", "median"]),
        (["robust.attackers=2"], ["attackers=2", "left out", "mean"]),
        (["robust.kind=multi-krum", "robust.attackers=8"], ["attackers=8", "min_replies", "19"]),
        (["robust.kind=median", "local.scaffold=true"], ["must be", "scaffold", "variate"]),
        (
            ["robust.kind=median", "buffered.weight=inverse-sqrt"],
            ['buffered.weight="inverse-sqrt": must be "uniform"', 'robust.kind is "median"'],
        ),
        (["robust.kind=median", "sampling=poisson"], ["min_replies (here 0)"]),
    ],
)
def test_plans_that_a_rule_cannot_keep_are_refused(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        parse_plan("", [*SMALL, *(f"federation.{o}" for o in overrides)])
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("unit", "why"), [("example", "noise share"), ("client", "calibrated to how far one client")]
)
def test_rules_that_look_at_single_updates_are_refused_where_noise_is_for_the_sum(
    unit: str, why: str
) -> None:
    with pytest.raises(PlanError, match=why):
        parse_plan("", ["federation.robust.kind=median", f"privacy.unit={unit}"])
    parse_plan("", ["federation.robust.kind=median", "privacy.trust=local"])


def test_a_simulation_ends_in_the_same_bits_for_any_number_of_workers(tmp_path: Path) -> None:
    overrides = [*SMALL, "federation.robust.kind=multi-krum", "federation.robust.attackers=3"]
    models = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        simulate(parse_plan("", [*overrides, f"engine.workers={workers}"]), folder)
        journal = Journal(Run(folder))
        state = journal.latest()
        journal.close()
        assert state is not None
        models.append(state.weights)
    assert all((a == b).all() for a, b in pairwise(models))
