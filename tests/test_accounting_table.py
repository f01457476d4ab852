"""Epsilon agrees with published values and with independent implementations, mixed rounds too."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from reticent.privacy.accounting import ORDERS, epsilon, renyi
from reticent.privacy.events import Composed, PoissonGaussian, on_one_sample

PATH = Path(__file__).parents[1] / "benchmarks" / "accounting.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("accounting_benchmark", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


BENCHMARK: Any = load()
SETTINGS: list[Any] = BENCHMARK.settings()
NAMES = [f"{i}-{s.name}-{s.relation}" for i, s in enumerate(SETTINGS)]
CELLS = 2**15
SLOW = 60  # steps from which PRV takes its time; the benchmark runs those as well


def test_the_table_has_what_it_promises() -> None:
    assert len(SETTINGS) >= 40
    assert sum(len(s.parts) > 1 for s in SETTINGS) >= 8
    assert sum(s.unit == "client" for s in SETTINGS) >= 2
    assert sum(s.relation == "replace-one" for s in SETTINGS) >= 8
    assert sum(s.published is not None for s in SETTINGS) >= 5


@pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)
def test_epsilon_is_within_a_thousandth_of_the_reference_and_not_below_it(setting: Any) -> None:
    ours = epsilon(setting.events(), setting.delta)
    many = sum(part[2] for part in setting.parts) > 1000  # the grid's errors add up
    cells = 4 * CELLS if many else CELLS
    reference = BENCHMARK.reference_epsilon(setting.events(), setting.delta, cells)
    assert reference == pytest.approx(ours, rel=1e-3)
    # Rounded up: what remains is the reference's own grid.
    assert ours >= reference * (1 - 1e-5)


@pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)
def test_epsilon_is_within_a_hundredth_of_a_second_implementation(setting: Any) -> None:
    events = setting.events()
    if setting.relation == "add-or-remove-one" and sum(e.steps for e in events) > SLOW:
        events = [replace(event, steps=min(event.steps, SLOW // len(events))) for event in events]
    _, second = BENCHMARK.second_epsilon(events, setting.delta)
    ours = epsilon(events, setting.delta)
    # PRV's own tolerance is 0.001, and more than a hundredth of a tiny epsilon.
    assert second == pytest.approx(ours, rel=0.01, abs=0.0015)


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s.published], ids=lambda s: s.name)
def test_published_values_are_met_to_their_last_decimal(setting: Any) -> None:
    published = setting.published
    assert round(BENCHMARK.published_value(setting), published.decimals) == published.value
    assert epsilon(setting.events(), setting.delta) < published.value


def test_the_reference_rejects_two_thirds_of_the_noise() -> None:
    for relation in ("add-or-remove-one", "replace-one"):
        right, wrong = (PoissonGaussian(0.1, s, 100, relation) for s in (1.0, 2 / 3))
        reference = BENCHMARK.reference_epsilon([right], 1e-5, CELLS)
        assert epsilon([wrong], 1e-5) > 1.3 * reference


def test_averaged_parameters_are_wrong_and_can_report_too_little() -> None:
    mixed = [s for s in SETTINGS if len(s.parts) > 1]
    differences = []
    for setting in mixed:
        truth = epsilon(setting.events(), setting.delta)
        wrong = epsilon([BENCHMARK.averaged(setting.events())], setting.delta)
        differences.append(wrong / truth - 1)
    assert min(abs(d) for d in differences) > 0.01
    assert sum(d < -0.25 for d in differences) >= 4


@pytest.mark.parametrize(("q", "sigma"), [(0.01, 0.6), (0.5, 0.3), (0.999, 20.0)])
def test_renyi_divergences_under_replacement_agree_with_adaptive_quadrature(
    q: float, sigma: float
) -> None:
    for index in range(0, len(ORDERS), 17):
        order = float(ORDERS[index])
        if order > 300:
            continue

        def log_integrand(x: float, order: float = order) -> float:
            up = np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * sigma**2))
            down = np.logaddexp(math.log1p(-q), math.log(q) - (2 * x + 1) / (2 * sigma**2))
            return float(norm.logpdf(x, scale=sigma) + order * up + (1 - order) * down)

        grid = np.linspace(-12 * sigma, 2 * order + 12 * sigma, 2001)
        values = [log_integrand(x) for x in grid.tolist()]
        peak, top = float(grid[int(np.argmax(values))]), max(values)
        points = sorted({*np.linspace(grid[0], grid[-1], 13).tolist(), peak})
        total = sum(
            quad(lambda x: math.exp(log_integrand(x) - top), *ends, limit=200)[0]  # noqa: B023
            for ends in pairwise(points)
        )
        exact = (top + math.log(total)) / (order - 1)
        got = renyi(q, sigma, "replace-one")[index]
        assert got >= exact * (1 - 1e-6) - 1e-12
        assert got == pytest.approx(exact, rel=1e-5, abs=1e-8)


def test_sums_over_one_sample_reveal_more_than_over_two() -> None:
    once = PoissonGaussian(0.05, 1.0, 1)
    both = on_one_sample([once, once])
    assert both.noise_multiplier == pytest.approx(math.sqrt(0.5))
    # Who was sampled shows in both sums at once, and counting them apart would miss that.
    assert epsilon([both], 1e-3) > 1.1 * epsilon([Composed((once, once))], 1e-3)
    # Without sampling there is no difference.
    all_of_them = PoissonGaussian(1.0, 1.0, 1)
    apart = epsilon([Composed((all_of_them, all_of_them))], 1e-3)
    assert epsilon([on_one_sample([all_of_them] * 2)], 1e-3) == pytest.approx(apart, rel=1e-3)
