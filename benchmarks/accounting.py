"""Epsilon of published and of heterogeneous settings, by independent implementations.

Run with ``python benchmarks/accounting.py [--json]``. ``epsilon`` is the value that reports state
(``pld``). ``reference`` is computed here, from scratch: the law of the privacy loss by differences
of normal distribution functions, composed with Fourier transforms on a fine grid, neither rounded
up nor cut. ``second`` is Opacus' PRV accountant for the relation add-or-remove-one; the analytic
Gaussian formula (Balle and Wang 2018, theorem 8) where everyone takes part; and otherwise, for
replace-one, the library's own pair of mixtures, which shares only the composition with ``pld``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

# Libraries read these when they are imported.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

from reticent.privacy.accounting import ORDERS, epsilon, renyi
from reticent.privacy.events import PoissonGaussian
from reticent.privacy.groups import pair_distribution
from reticent.privacy.losses import interval_for

Floats = NDArray[np.float64]
MNIST = 256 / 60000
PARTS = ((0.01, 0.7), (0.05, 1.0), (0.1, 1.5), (0.3, 3.0), (0.5, 0.7), (0.5, 3.0))


@dataclass(frozen=True)
class Published:
    """A value from the literature: by which method, and how many decimals it was given with.

    ``classic`` is the Renyi bound with the conversion of Mironov 2017, proposition 3, which those
    authors used; the other methods are those of this library.
    """

    value: float
    method: str
    decimals: int
    source: str


@dataclass(frozen=True)
class Setting:
    """Events given as (q, sigma, steps), under one relation and unit."""

    name: str
    parts: tuple[tuple[float, float, int], ...]
    delta: float = 1e-5
    relation: str = "add-or-remove-one"
    unit: str = "example"
    published: Published | None = None

    def events(self) -> list[PoissonGaussian]:
        """Return the events."""
        return [PoissonGaussian(*part, self.relation, self.unit) for part in self.parts]


def settings() -> list[Setting]:
    """Return every setting of the table."""
    return [*_published(), *_plain(), *_replaced(), *_heterogeneous(), *_client()]


def _published() -> list[Setting]:
    tutorial = "TensorFlow Privacy, tutorials/README.md, MNIST"
    de = "De et al. 2022, CIFAR-10, epsilon 8; parameters as quoted by gdpnum"
    gboard = "Gboard es-ES, rho-zCDP 0.81 and epsilon 8.9 (Google AI blog 2022 and 2024)"
    abadi = "Abadi et al. 2016, section 3, E = 100"
    bu = "Bu, Dong, Long and Su 2020, figure 4"
    rows = [
        ("TF Privacy 15 epochs", (MNIST, 1.3, 3515), 1e-5, (1.19, "classic", 2, tutorial)),
        ("TF Privacy 60 epochs", (MNIST, 1.1, 14062), 1e-5, (3.01, "classic", 2, tutorial)),
        ("TF Privacy 45 epochs", (MNIST, 0.7, 10546), 1e-5, (7.10, "classic", 2, tutorial)),
        ("NoisySGD 70 epochs", (MNIST, 0.7, 16406), 1e-5, (8.68, "classic", 2, bu)),
        ("moments accountant", (0.01, 4.0, 10000), 1e-5, (1.26, "classic", 2, abadi)),
        ("WideResNet CIFAR-10", (16384 / 50000, 9.4, 2000), 1e-5, (8.0, "rdp", 1, de)),
        ("Gboard rho 0.81", (1.0, 1 / math.sqrt(1.62), 1), 1e-10, (8.9, "rdp", 1, gboard)),
    ]
    return [
        Setting(name, (part,), delta, published=Published(*known))
        for name, part, delta, known in rows
    ]


def _plain() -> list[Setting]:
    rows = [
        *((0.001, 0.5, 1), (0.01, 0.5, 100), (0.1, 1.0, 100), (0.1, 2.0, 1000), (0.3, 0.5, 100)),
        *((1.0, 1.0, 10), (1.0, 4.0, 100), (0.01, 2.0, 100), (0.02, 1.0, 500), (0.5, 3.0, 200)),
        *((0.2, 0.3, 20), (0.1, 1.0, 1000), (0.05, 0.7, 30), (1.0, 20.0, 50)),
    ]
    others = [((0.1, 1.0, 50), 1e-6), ((0.1, 1.0, 50), 1e-8), ((0.02, 0.8, 300), 1e-3)]
    return [
        Setting(f"q {row[0]:g} sigma {row[1]:g}", (row,), delta)
        for row, delta in [*((row, 1e-5) for row in rows), *others]
    ]


def _replaced() -> list[Setting]:
    rows = [
        *((0.1, 1.0, 100), (0.01, 0.6, 1000), (0.5, 3.0, 200), (0.2, 8.0, 100), (0.3, 0.5, 20)),
        *((1.0, 2.0, 10), (1.0, 8.0, 100)),
    ]
    return [Setting(f"q {r[0]:g} sigma {r[1]:g}", (r,), relation="replace-one") for r in rows]


def _heterogeneous() -> list[Setting]:
    def mix(*counts: int) -> tuple[tuple[float, float, int], ...]:
        return tuple((*p, n) for p, n in zip(PARTS, counts, strict=True) if n)

    counts = [
        *((10, 10, 10, 10, 0, 0), (100, 0, 0, 0, 1, 0), (0, 50, 50, 0, 0, 0), (0, 0, 30, 30, 0, 9)),
        *((500, 100, 0, 0, 0, 0), (0, 0, 0, 0, 10, 100), (86, 86, 86, 86, 86, 87)),
        (1, 2, 3, 4, 5, 6),
    ]
    added = [Setting("mixed " + "+".join(map(str, row)), mix(*row)) for row in counts]
    replaced = [
        Setting("mixed " + "+".join(map(str, row)), mix(*row), relation="replace-one")
        for row in counts[:2]
    ]
    late = Setting("noise raised late", ((0.1, 1.0, 50), (0.1, 4.0, 500)))
    return [*added, *replaced, late]


def _client() -> list[Setting]:
    # An adaptive bound: the sum and the count of one round, each a Gaussian of its own.
    count = ((1.0, 8.0, 100), (1.0, 50.0, 100))
    sampled = ((0.05, 1.0, 100),)
    return [
        Setting("clients, count of clips", count, unit="client"),
        Setting("clients, count of clips", count, relation="replace-one", unit="client"),
        Setting("clients, secret Poisson cohort", sampled, unit="client"),
    ]


# The reference


def reference_epsilon(events: Sequence[PoissonGaussian], delta: float, cells: int = 2**20) -> float:
    """Return epsilon at ``delta``, neither rounded up nor down, by Fourier transforms."""
    if events[0].relation == "replace-one":
        return _solve(events, delta, "replace", cells)
    return max(_solve(events, delta, way, cells) for way in ("remove", "add"))


def _solve(events: Sequence[PoissonGaussian], delta: float, way: str, cells: int) -> float:
    losses, mass = composed_losses(events, way, cells)

    def excess(eps: float) -> float:
        above = losses > eps
        return float(-np.expm1(eps - losses[above]) @ mass[above]) - delta

    return _zero(excess, float(losses[-1]))


def _zero(excess: Callable[[float], float], most: float) -> float:
    if excess(0.0) <= 0:
        return 0.0
    return float(brentq(excess, 0.0, most, xtol=1e-10))  # pyright: ignore[reportArgumentType]


def composed_losses(
    events: Sequence[PoissonGaussian], way: str, cells: int = 2**20, under: str = "upper"
) -> tuple[Floats, Floats]:
    """Return losses and their probabilities; float64, shape (cells,) each.

    ``way`` is ``remove``, ``add`` or ``replace``; ``under`` the side of the pair that outcomes are
    drawn from.
    """
    parts = [(_one_step(event, way, under), event.steps) for event in events]
    low, high = -_reach(parts, -1), _reach(parts, 1)
    width = (high - low) / cells
    spectrum = np.ones(cells // 2 + 1, dtype=complex)
    for (loss, mass), steps in parts:
        # Split each mass over its two neighbours, so that its mean stays.
        place = loss / width
        left = np.floor(place).astype(int)
        share = place - left
        grid = np.bincount(left % cells, mass * (1 - share), cells)
        grid += np.bincount((left + 1) % cells, mass * share, cells)
        spectrum *= np.fft.rfft(grid) ** steps
    start = math.floor(low / width)
    mass = np.roll(np.fft.irfft(spectrum, cells), -(start % cells))
    return (start + np.arange(cells, dtype=np.float64)) * width, mass


def _one_step(event: PoissonGaussian, way: str, under: str) -> tuple[Floats, Floats]:
    q, s = event.sampling_rate, event.noise_multiplier
    edges = np.linspace(-1 - 10 * s, 1 + 10 * s, 50_001)
    left, right = (_mixture(q, s, edges, mean) for mean in (-1.0, 1.0))
    plain = _mixture(1.0, s, edges, 0.0)
    upper, lower = {"remove": (left, plain), "add": (plain, right), "replace": (left, right)}[way]
    mass = np.diff((upper if under == "upper" else lower)[0])
    loss = (upper[1] - lower[1])[:-1] / 2 + (upper[1] - lower[1])[1:] / 2
    kept = mass > 0
    return loss[kept], mass[kept] / mass.sum()


def _mixture(q: float, s: float, x: Floats, mean: float) -> tuple[Floats, Floats]:
    """Return distribution function and log density (without its constant) at ``x``."""
    moved = (mean * x - mean * mean / 2) / s**2 + math.log(q)
    log_ratio = np.logaddexp(moved, math.log1p(-q)) if q < 1 else moved
    return (1 - q) * ndtr(x / s) + q * ndtr((x - mean) / s), log_ratio - (x / s) ** 2 / 2


def _reach(parts: list[tuple[tuple[Floats, Floats], int]], sign: int) -> float:
    """Return a bound that the sum of losses exceeds with probability 1e-17 at most (Chernoff)."""

    def bound(rate: float) -> float:
        total = 39.0
        for (loss, mass), steps in parts:
            exponent = sign * rate * loss + np.log(mass)
            top = exponent.max()
            total += steps * (top + math.log(np.exp(exponent - top).sum()))
        return total / rate

    return max(1e-6, min(bound(rate) for rate in 2.0 ** np.arange(-12, 9)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return epsilon of N(0, 1) against N(mu, 1) (Balle and Wang 2018, theorem 8)."""

    def excess(e: float) -> float:
        return float(ndtr(mu / 2 - e / mu) - np.exp(e + log_ndtr(-mu / 2 - e / mu))) - delta

    return _zero(excess, mu**2 / 2 + 40 * mu)


def second_epsilon(events: Sequence[PoissonGaussian], delta: float) -> tuple[str, float]:
    """Return another implementation's name and epsilon."""
    replaced = events[0].relation == "replace-one"
    if all(event.sampling_rate == 1 for event in events):
        mu = math.sqrt(sum(e.steps / e.noise_multiplier**2 for e in events))
        return "analytic", gaussian_epsilon(mu * (2 if replaced else 1), delta)
    if not replaced:
        return "prv", epsilon(events, delta, "prv")
    pairs = pair_distribution(tuple(events), 1, interval_for(events))
    return "mixtures", float(pairs.get_epsilon_for_delta(delta))


def averaged(events: Sequence[PoissonGaussian]) -> PoissonGaussian:
    """Return the event with averaged parameters: a known wrong way to account."""
    total = sum(event.steps for event in events)
    return PoissonGaussian(
        sum(e.sampling_rate * e.steps for e in events) / total,
        sum(e.noise_multiplier * e.steps for e in events) / total,
        total,
        events[0].relation,
        events[0].unit,
    )


# The table


@dataclass(frozen=True)
class Row:
    """Figures of one setting; differences are relative to ``epsilon``."""

    name: str
    relation: str
    unit: str
    delta: float
    steps: int
    epsilon: float
    reference: float
    reference_difference: float
    second_by: str
    second: float
    second_difference: float
    averaged: float | None
    published: float | None
    published_here: float | None


def published_value(setting: Setting) -> float | None:
    """Return what the method of the published value gives here."""
    if setting.published is None:
        return None
    events, method = setting.events(), setting.published.method
    if method != "classic":
        return epsilon(events, setting.delta, method)
    total = np.sum(
        [e.steps * renyi(e.sampling_rate, e.noise_multiplier) for e in events],
        axis=0,
    )
    return float(np.min(total - math.log(setting.delta) / (ORDERS - 1)))


def measure(setting: Setting) -> Row:
    """Compute one row."""
    events = setting.events()
    ours = epsilon(events, setting.delta)
    reference = reference_epsilon(events, setting.delta)
    by, second = second_epsilon(events, setting.delta)
    return Row(
        setting.name,
        setting.relation,
        setting.unit,
        setting.delta,
        sum(event.steps for event in events),
        ours,
        reference,
        reference / ours - 1,
        by,
        second,
        second / ours - 1,
        epsilon([averaged(events)], setting.delta) if len(events) > 1 else None,
        setting.published.value if setting.published else None,
        published_value(setting),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Epsilon by independent implementations.")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    arguments = parser.parse_args()
    rows = []
    if not arguments.json:
        print(
            f"{'setting':<38}{'relation':>9}{'delta':>8}{'steps':>7}{'epsilon':>10}"
            f"{'reference':>11}{'diff':>9}{'second':>22}{'diff':>9}{'averaged':>10}  published"
        )
    for setting in settings():
        row = measure(setting)
        rows.append(row)
        print(json.dumps(asdict(row)) if arguments.json else _line(row), flush=True)
    if not arguments.json:
        worst = [max(abs(d) for d in (r.reference_difference, r.second_difference)) for r in rows]
        print(f"{len(rows)} settings, largest difference {max(worst):.2%}")


def _line(row: Row) -> str:
    published = f"{row.published:g} (here {row.published_here:.4g})" if row.published else ""
    wrong = "" if row.averaged is None else f"{row.averaged:.4f}"
    return (
        f"{row.name[:37]:<38}{row.relation.split('-')[0]:>9}{row.delta:>8.0e}{row.steps:>7}"
        f"{row.epsilon:>10.4f}{row.reference:>11.4f}{row.reference_difference:>9.3%}"
        f"{row.second_by:>11}{row.second:>11.4f}{row.second_difference:>9.3%}{wrong:>10}"
        f"  {published}"
    )


if __name__ == "__main__":
    main()
