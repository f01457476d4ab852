"""The parts of the benchmarks that others' figures rest on: slopes, memory, equal work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_a_slope_is_the_power_that_the_figures_grow_with(power: float) -> None:
    from growth import Point, slope, slopes

    xs = [10.0, 100.0, 1000.0]
    assert slope(xs, [3 * x**power for x in xs]) == pytest.approx(power)
    found = [Point("cohort", int(x), x**power, 7.0) for x in xs]
    assert slopes([*found, Point("workers", 1, 1.0, 1.0)]) == {
        "cohort": {"time": pytest.approx(power), "memory": pytest.approx(0.0)}
    }


def test_peak_memory_sees_what_was_held_and_given_back() -> None:
    from family import PeakMemory

    with PeakMemory(every=0.01) as before:
        pass
    with PeakMemory(every=0.01) as during:
        held = np.ones(25_000_000)  # 200 MB
        for _ in range(20):
            held += 1
        del held
    assert 150 < during.mb - before.mb < 300


def test_models_have_the_parameters_that_are_claimed() -> None:
    from growth import WIDTHS
    from round_work import model_of

    sizes = {kind: sum(p.numel() for p in model_of(kind).parameters()) for kind in ("mlp", "cnn")}
    assert sizes == {"mlp": 101_770, "cnn": 105_962}
    for size, width in list(WIDTHS.items())[:2]:
        assert sum(p.numel() for p in model_of(f"mlp-{width}").parameters()) == size


def test_clients_of_our_task_hold_the_data_of_the_others() -> None:
    import round_work

    theirs, ours = round_work.client(3), round_work.task(type("Section", (), {"clients": 9}), 0)
    assert (ours.client(3).inputs == theirs.inputs).all()
    assert len({len(round_work.client(k).labels) for k in range(31)}) == 31
