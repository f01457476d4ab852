"""What choosing among runs costs: the numbers, and where a report states them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from report_runs import build

from reticent.core.errors import PrivacyError, RunError
from reticent.core.plan import Plan, parse_plan
from reticent.core.signing import read_public_key
from reticent.privacy.accounting import epsilon
from reticent.privacy.events import Event, NonPrivate, PoissonGaussian
from reticent.privacy.report import collect, render, verify_report, write_reports
from reticent.privacy.report.tuning import (
    candidate,
    figures,
    read_tuning,
    tuning_text,
    write_tuning,
)
from reticent.privacy.schedule import schedule_for
from reticent.privacy.selection import in_terms_of, selection_epsilon

SIZES = ["task.clients=10", "federation.clients_per_round=10", "federation.rounds=4"]


def plan_of(*settings: str) -> Plan:
    return parse_plan("", [*SIZES, *settings])


def test_runs_of_one_promise_cost_what_one_run_with_all_their_rounds_costs() -> None:
    plans = [plan_of("privacy.noise_multiplier=1.5", f"seed={k}") for k in range(5)]
    found = figures([candidate(p, schedule_for(p)) for p in plans], plans[0])
    schedule = schedule_for(plans[0])
    assert schedule is not None
    assert found["epsilon"] == epsilon([schedule.round_event().times(4 * 5)], 1e-5)
    assert found["server_epsilon"] == epsilon([schedule.server_event().times(4 * 5)], 1e-5)
    assert found["epsilon"] > epsilon([schedule.round_event().times(4 * 4)], 1e-5)


def test_weights_that_several_runs_begin_with_are_counted_once(tmp_path: Path) -> None:
    """One release is one; other weights, or the same under another event, are others."""
    earlier = PoissonGaussian(0.05, 1.1, 20)

    def beginning(seed: int, weights: str = "ab" * 32, noise: float = 1.1) -> Plan:
        trained = (
            f'teacher.trained={{weights="{weights}",sampling_rate=0.05,noise_multiplier={noise},'
            'steps=20,unit="example",relation="add-or-remove-one"}'
        )
        return plan_of("privacy.noise_multiplier=1.5", f"seed={seed}", trained)

    plans = [beginning(0), beginning(1), beginning(2)]
    candidates = [candidate(p, schedule_for(p)) for p in plans]
    found = figures(candidates, plans[0])
    schedule = schedule_for(plans[0])
    assert schedule is not None
    rounds = schedule.round_event().times(4 * 3)
    assert found["epsilon"] == epsilon([earlier, rounds], 1e-5)
    assert found["server_epsilon"] == epsilon([earlier, schedule.server_event().times(4 * 3)], 1e-5)
    whole = [schedule.over(schedule.round_event(), 4)]
    assert found["selection"] == pytest.approx(selection_epsilon([whole], 1e-5, 3), rel=1e-9)
    other = PoissonGaussian(0.05, 1.2, 20)
    for third, event in ((beginning(2, "cd" * 32), earlier), (beginning(2, noise=1.2), other)):
        more = [*candidates[:2], candidate(third, schedule_for(third))]
        assert figures(more, plans[0])["epsilon"] == epsilon([earlier, event, rounds], 1e-5)
    run = build(tmp_path / "run")
    write_tuning(run, [*candidates, candidate(run.plan(), schedule_for(run.plan()))])
    kept = json.loads((run.folder / "tuning.json").read_text())
    assert kept["schema"] == 2 and kept["runs"][0]["earlier"]["weights"] == "ab" * 32
    read = read_tuning(run, plans[0])
    assert read is not None and read["epsilon"] > found["epsilon"]
    # A file without them is as it always was, and what weights once cost each run is read as that.
    write_tuning(run, [candidate(run.plan(), schedule_for(run.plan()))])
    assert json.loads((run.folder / "tuning.json").read_text())["schema"] == 1


def test_one_run_without_privacy_leaves_nothing_to_promise() -> None:
    plans = [plan_of(), plan_of("privacy=off")]
    candidates = [candidate(p, schedule_for(p)) for p in plans]
    assert figures(candidates, plans[0])["epsilon"] == "infinity"
    assert figures(candidates, plans[1])["epsilon"] == "infinity"


def test_an_example_in_client_level_noise_is_an_exchanged_client() -> None:
    client = PoissonGaussian(1.0, 4.0, 3, unit="client")
    exchanged = [PoissonGaussian(1.0, 4.0, 3, "replace-one", "example")]
    for relation in ("add-or-remove-one", "replace-one"):
        assert in_terms_of([client], "example", relation) == exchanged
    # Where everyone takes part, that is the Gaussian mechanism at half the multiplier.
    half = PoissonGaussian(1.0, 2.0, 3, unit="example")
    assert epsilon(exchanged, 1e-5) == pytest.approx(epsilon([half], 1e-5), rel=1e-3)


@pytest.mark.parametrize(("rate", "noise"), [(0.05, 1.0), (0.3, 2.0), (0.5, 0.8)])
def test_an_example_of_a_sampled_client_is_bounded_by_the_pair_of_its_client(
    rate: float, noise: float
) -> None:
    """Against divergences of the very distributions, by quadrature: the client adds C, or -C.

    Half the multiplier, added, is not a pair that dominates: it is too small below e^eps = 1.
    """
    x = np.linspace(-40, 40, 400_001)

    def law(mean: float, spread: float) -> np.ndarray:
        def density(mu: float) -> np.ndarray:
            return np.exp(-((x - mu) ** 2) / 2 / spread**2) / (spread * math.sqrt(2 * math.pi))

        return (1 - rate) * density(0.0) + rate * density(mean)

    def divergence(upper: np.ndarray, lower: np.ndarray, order: float) -> float:
        return float(np.maximum(upper - order * lower, 0).sum() * (x[1] - x[0]))

    steps, delta = 4, 1e-5
    client = PoissonGaussian(rate, noise, 1, unit="client")
    (event,) = in_terms_of([client], "example", "add-or-remove-one")
    assert isinstance(event, PoissonGaussian)
    with_it, without_it = law(1.0, noise), law(-1.0, noise)
    for eps in (0.1, 0.5, 1.0, 2.0):
        least = divergence(with_it, without_it, math.exp(eps))
        if least > 1e-9:
            assert epsilon([event], least * (1 - 1e-6), alike=False) >= eps * (1 - 1e-6)
    added, nothing = law(2.0, noise), law(0.0, noise)
    assert divergence(added, nothing, 0.8) < divergence(with_it, without_it, 0.8) - 1e-3
    half = PoissonGaussian(rate, noise / 2, steps)
    assert epsilon([event.times(steps)], delta) < 0.8 * epsilon([half], delta)
    # With another run of example-level noise: at least what either costs, and no more than both.
    other = PoissonGaussian(0.1, 1.0, steps)
    mixed = epsilon([event, other], delta, alike=False)
    parts = [epsilon([one], delta / 2, alike=False) for one in (event, other)]
    assert max(epsilon([one], delta) for one in (event, other)) <= mixed <= 1.001 * sum(parts)
    with pytest.raises(PrivacyError, match="must agree in unit and relation"):
        epsilon([event, other], delta)
    with pytest.raises(PrivacyError, match="the only relation it knows"):
        epsilon([event, other], delta, "prv", alike=False)


def test_a_sweep_with_units_client_and_example_states_one_epsilon() -> None:
    secret = ("privacy.unit=client", "privacy.secret_cohort=true", "federation.sampling=poisson")
    noise = "privacy.noise_multiplier=2.0"
    sizes = ["task.clients=40", "federation.clients_per_round=10", "federation.rounds=4"]
    client = parse_plan("", [*sizes, noise, *secret])
    example = plan_of(noise)
    candidates = [candidate(p, schedule_for(p)) for p in (example, client)]
    both = figures(candidates, example)
    alone = figures(candidates[:1], example)
    assert math.inf > both["epsilon"] > alone["epsilon"] and both["selection"] > 0
    assert figures(candidates, client)["epsilon"] == "infinity"


def test_a_client_is_not_covered_by_example_level_noise() -> None:
    assert in_terms_of([PoissonGaussian(0.1, 4.0, 3)], "client", "replace-one") == [NonPrivate()]


def test_random_selection_is_the_theorem_of_papernot_and_steinke() -> None:
    """Their formula, by a plain loop over orders, for the Gaussian: renyi(a) = a / (2 s^2)."""
    sigma, mean, delta = 3.0, 7.0, 1e-5
    orders = [1 + k / 100 for k in range(1, 20_000)]

    def curve(order: float) -> float:
        return order / (2 * sigma**2)

    extra = min((1 - 1 / o) * curve(o) + math.log(mean) / o for o in orders)
    least = min(
        curve(o)
        + 2 * extra
        + math.log(mean) / (o - 1)
        + math.log1p(-1 / o)
        - (math.log(delta) + math.log(o)) / (o - 1)
        for o in orders
    )
    history: list[Event] = [PoissonGaussian(1.0, sigma, 1)]
    found = selection_epsilon([history], delta, mean)
    assert least - 1e-9 <= found <= 1.005 * least
    assert selection_epsilon([history, [PoissonGaussian(1.0, 2 * sigma, 1)]], delta, mean) == found
    assert selection_epsilon([history, [NonPrivate()]], delta, mean) == math.inf


@pytest.mark.parametrize("mean", [0.0, 0.5, math.nan])
def test_fewer_than_one_run_on_average_is_refused(mean: float) -> None:
    with pytest.raises(PrivacyError, match="mean_runs"):
        selection_epsilon([[PoissonGaussian(1.0, 1.0, 1)]], 1e-5, mean)


def test_the_report_of_a_run_of_a_sweep_states_the_charge_and_still_verifies(
    tmp_path: Path,
) -> None:
    run = build(tmp_path / "run", "seed=1")
    others = [parse_plan(run.plan_file.read_text(), [f"seed={k}"]) for k in (1, 2, 3)]
    candidates = [candidate(p, schedule_for(p)) for p in others]
    assert write_tuning(run, candidates)
    assert not write_tuning(run, candidates)  # it says the same
    write_reports(run)
    data = json.loads((run.folder / "report.json").read_text())
    assert data["tuning"]["runs"] == 3
    assert data["tuning"]["epsilon"] > data["promise"]["epsilon"]
    (charge,) = [r["answer"] for r in data["checklist"] if r["field"] == "Charge for tuning"]
    assert charge == tuning_text(data["tuning"]) and charge.startswith("3 runs were planned")
    for kind in ("html", "md"):
        assert "One of 3 runs." in render(run, kind)
    (row,) = [r["remark"] for r in data["not_covered"] if r["what"] == "Choice of settings"]
    assert "one of 3" in row
    key = read_public_key(run.keys / "signing_key.pub.pem")
    assert len(verify_report(run, key)) == 5
    # One more run than the report counts: it no longer fits.
    more = parse_plan(run.plan_file.read_text(), ["seed=4"])
    signature = run.folder / "report.sig"
    kept = signature.read_bytes()
    write_tuning(run, [*candidates, candidate(more, schedule_for(more))])
    assert not signature.exists()  # it went first, so that no stop between leaves it
    signature.write_bytes(kept)
    with pytest.raises(Exception, match="does not fit"):
        verify_report(run, key)


def test_a_run_by_itself_has_no_such_section(tmp_path: Path) -> None:
    run = build(tmp_path / "run")
    data = collect(run)
    assert "tuning" not in data
    assert "One of" not in render(run, "html")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"schema": 2, "runs": [1]}',
        '{"schema": 1, "runs": []}',
        '{"schema": 1, "runs": [{"plan": "a", "readers": {"kind": "magic"}, "server": 1}]}',
    ],
)
def test_damaged_words_about_tuning_are_an_error(tmp_path: Path, content: str) -> None:
    run = build(tmp_path / "run")
    (run.folder / "tuning.json").write_text(content)
    with pytest.raises(RunError, match=r"tuning\.json"):
        collect(run)


def test_words_about_other_runs_are_an_error(tmp_path: Path) -> None:
    run = build(tmp_path / "run")
    other = plan_of()
    write_tuning(run, [candidate(other, schedule_for(other))])
    with pytest.raises(RunError, match="does not name the run's own plan"):
        collect(run)
