"""Weights that learned from private data before a run: declared, charged once, composed, shown."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation
from flwr.app import Context, RecordDict
from test_deployment import CONFIG, ask, order, released
from test_ledger_windows import HandClock
from torch import nn

from reticent.client.order import charges
from reticent.client.policy import parse_policy
from reticent.client.rules import against_plan
from reticent.core.errors import DataError, LedgerError, PayloadError, PlanError, PrivacyError
from reticent.core.plan import Plan, TaskSection, parse_plan
from reticent.core.protocol import BEFORE, Order, Refusal
from reticent.core.run import Run
from reticent.core.tasks import ArrayTask
from reticent.privacy.accounting import epsilon
from reticent.privacy.earlier import fits_after, rounds_that_fit
from reticent.privacy.events import Composed, PoissonGaussian, gaussian
from reticent.privacy.ledger import Budget, BudgetExceeded, Ledger
from reticent.privacy.report.collect import collect
from reticent.privacy.report.render import render_data
from reticent.privacy.report.schema import problems
from reticent.privacy.report.spending import apart
from reticent.privacy.schedule import Schedule, schedule_for
from reticent.server.possible import require_new_models, weights_digest
from reticent.simulations.compress.public_half import PublicHalf
from reticent.simulations.explain import explain_plan
from reticent.simulations.simulate import simulate

DELTA = 1e-5
EARLIER = PoissonGaussian(0.05, 1.1, 60)
NAMED = "ab" * 32


def declared(weights: object = NAMED, **changed: object) -> list[str]:
    given: dict[str, object] = {
        "weights": weights,
        "sampling_rate": 0.05,
        "noise_multiplier": 1.1,
        "steps": 60,
        "unit": "example",
        "relation": "add-or-remove-one",
    }
    return [f"teacher.trained.{key}={value}" for key, value in {**given, **changed}.items()]


def planned(*overrides: str) -> Plan:
    few = ["task.clients=4", "federation.clients_per_round=4", "federation.rounds=5"]
    return parse_plan("", [*few, *overrides])


def schedule_of(plan: Plan) -> Schedule:
    schedule = schedule_for(plan)
    assert schedule is not None
    return schedule


# Accounting


def by_hand(*parts: tuple[float, float, int]) -> float:
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    for rate, noise, steps in parts:
        accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps)
    return float(accountant.get_epsilon(DELTA))


def test_accounting_is_that_of_composing_by_hand() -> None:
    schedule = schedule_of(planned("privacy.epsilon=6.0", *declared()))
    whole = epsilon([schedule.over(schedule.round_event(), 5)], DELTA)
    rate, noise = schedule.sampling_rate, schedule.noise_multiplier
    assert whole == pytest.approx(by_hand((0.05, 1.1, 60), (rate, noise, 5)), rel=2e-3)
    assert whole > 1.05 * by_hand((rate, noise, 5))  # which would leave the weights out


def test_a_plain_gaussian_may_be_declared() -> None:
    schedule = schedule_of(
        planned("privacy.epsilon=6.0", *declared(sampling_rate=1.0, noise_multiplier=3.0, steps=1))
    )
    assert schedule.earlier == gaussian(3.0)


@pytest.mark.parametrize(
    "others",
    [
        ["privacy.epsilon=6.0"],
        ["privacy.epsilon=3.0", "privacy.relation=replace-one"],
        ["privacy.epsilon=8.0", "privacy.unit=client"],
        [
            "privacy.epsilon=8.0",
            "privacy.unit=client",
            "privacy.clip_quantile=0.5",
            "task.clients=100",
            "federation.clients_per_round=100",
        ],
    ],
)
def test_noise_leaves_room_and_ledgers_accept_every_round_and_not_at_two_thirds_of_it(
    tmp_path: Path, others: list[str]
) -> None:
    unit = "client" if "privacy.unit=client" in others else "example"
    relation = "replace-one" if "privacy.relation=replace-one" in others else "add-or-remove-one"
    said = declared(unit=unit, relation=relation, sampling_rate=0.02)
    plan, alone = planned(*others, *said), schedule_of(planned(*others))
    schedule, target = schedule_of(plan), plan.private and plan.private.epsilon
    assert target is not None
    assert schedule.noise_multiplier > alone.noise_multiplier
    assert epsilon([schedule.over(schedule.round_event(), 5)], DELTA) <= target
    stop = Budget(target, DELTA)

    def accepted(noise: float, name: str) -> int:
        count = 0
        with Ledger.open(tmp_path / name) as ledger:
            for number in range(1, 6):
                try:
                    for due in charges(plan, noise, "run", number):
                        ledger.charge("device", due.run, due.round, due.event, stop)
                except BudgetExceeded:
                    break
                count += 1
        return count

    assert accepted(schedule.noise_multiplier, "ledger") == 5
    assert accepted(schedule.noise_multiplier / 1.5, "less") < 5


def test_a_larger_stop_leaves_the_exact_accountant_to_decide() -> None:
    strict = schedule_of(planned("privacy.epsilon=6.0", *declared()))
    loose = schedule_of(planned("privacy.epsilon=6.0", "privacy.budget=9.0", *declared()))
    low = schedule_of(planned("privacy.epsilon=6.0", "privacy.budget=2.0", *declared()))
    assert low.noise_multiplier == loose.noise_multiplier < strict.noise_multiplier
    spent = epsilon([loose.over(loose.round_event(), 5)], DELTA)
    assert 5.98 < spent <= 6.0


def test_the_rounds_that_fit_are_those_that_a_ledger_accepts() -> None:
    event, limit = PoissonGaussian(0.1, 1.5, 1), 6.0
    fit, stop = rounds_that_fit(EARLIER, event, limit, DELTA), Budget(limit, DELTA)
    assert fits_after(EARLIER, event, fit, stop)
    assert not fits_after(EARLIER, event, fit + 1, stop)
    assert 0 < fit < rounds_that_fit(None, event, limit, DELTA)
    assert rounds_that_fit(EARLIER, event, 0.5, DELTA) == 0  # the weights alone spend more


def test_weights_that_spend_the_target_alone_are_refused() -> None:
    with pytest.raises(PrivacyError, match=r"own epsilon is \d\.\d+ .*privacy\.epsilon=1"):
        schedule_for(planned("privacy.epsilon=1.0", *declared()))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (declared(unit="client"), r'trained\.unit="client": must be privacy\.unit.*"example"'),
        (declared(relation="replace-one"), r'relation="replace-one": must be privacy\.relation'),
        ([*declared(), "privacy=off"], r'must be absent when privacy is "off"'),
        (declared()[:-1], r"teacher\.trained\.relation"),
        (declared(weights="short"), r"teacher\.trained\.weights"),
        (declared(steps=0), r"teacher\.trained\.steps=0"),
    ],
)
def test_a_declaration_that_cannot_be_composed_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        planned(*overrides)


def test_without_a_declaration_nothing_changes() -> None:
    plain = planned()
    assert schedule_of(plain).earlier is None
    assert "trained" not in str(charges(plain, 1.0, "run", 1))
    assert [one.run for one in charges(plain, 1.0, "run", 1)] == ["run"]
    assert plain.digest != planned(*declared()).digest


# The ledger


def due(number: int, run: str = "a", plan: Plan | None = None) -> list[Any]:
    return charges(plan or planned("privacy.noise_multiplier=2.0", *declared()), 2.0, run, number)


def test_a_ledger_charges_weights_once_whatever_run_asks(tmp_path: Path) -> None:
    budget = Budget(50.0, DELTA)
    with Ledger.open(tmp_path / "ledger") as ledger:
        for run in ("a", "b"):
            for number in (1, 2):
                for one in due(number, run):
                    ledger.charge("device", one.run, one.round, one.event, budget)
        rounds = PoissonGaussian(0.1, 2.0, 4)
        assert set(ledger.events("device")) == {EARLIER, rounds}
        assert ledger.rounds("device", "c", 1) == 4  # the weights are none
        assert ledger.is_charged("device", BEFORE + NAMED, 0)
        ledger.verify()


def test_the_same_weights_cannot_cost_something_else(tmp_path: Path) -> None:
    cheaper = planned("privacy.noise_multiplier=2.0", *declared(noise_multiplier=2.2))
    with Ledger.open(tmp_path / "ledger") as ledger:
        for plan, run in ((None, "a"), (cheaper, "b")):
            first = due(1, run, plan)[0]
            if plan is None:
                ledger.charge("device", first.run, first.round, first.event, Budget(50.0, DELTA))
                continue
            with pytest.raises(LedgerError, match="cannot be charged again"):
                ledger.charge("device", first.run, first.round, first.event, Budget(50.0, DELTA))


def test_weights_that_have_left_the_window_are_not_charged_again(tmp_path: Path) -> None:
    hand, daily = HandClock(), Budget(6.0, DELTA, window=86_400)
    with Ledger.open(tmp_path / "ledger", clock=hand) as ledger:
        for number in (1, 2):
            for one in due(number):
                ledger.charge("device", one.run, one.round, one.event, daily)
            hand.wait(2 * 86_400)
        assert set(ledger.events("device")) == {EARLIER, PoissonGaussian(0.1, 2.0, 2)}
        with pytest.raises(LedgerError, match="window ago"):  # a round, to compare
            ledger.charge("device", "a", 1, due(1)[-1].event, daily)


def test_no_run_can_have_the_name_of_weights() -> None:
    config = order().to_config()
    assert Order.from_config(config).run == "a"
    with pytest.raises(PayloadError, match="must not begin with"):
        Order.from_config({**config, "run": BEFORE + NAMED})


# A device


def device_plan(**changed: object) -> tuple[str, Plan]:
    lines = [f"{key.split('.')[-1]} = {value!r}" for key, value in _pairs(declared(**changed))]
    text = CONFIG["plan"] + "\n[teacher.trained]\n" + "\n".join(lines) + "\n"
    return text, parse_plan(text)


def _pairs(overrides: list[str]) -> Iterator[tuple[str, object]]:
    for one in overrides:
        key, _, value = one.partition("=")
        number = value.replace(".", "", 1).isdecimal()
        yield key, (float(value) if "." in value else int(value)) if number else value


def asked(text: str, plan: Plan, folder: Path, budget: float, number: int, run: str) -> Any:
    settings = {"state-dir": str(folder), "budget-epsilon": budget, "budget-delta": DELTA}
    context = Context(1, 2, {**settings, "partition-id": 0}, RecordDict(), {"plan": text})
    sigma = schedule_of(plan).noise_multiplier
    wanted = dataclasses.replace(order(number, run), plan=plan.digest, noise_multiplier=sigma)
    return ask(context, wanted)


def test_a_device_charges_weights_before_its_first_release_and_never_again(tmp_path: Path) -> None:
    text, plan = device_plan()
    for run, number in (("a", 1), ("a", 2), ("b", 1)):
        released(asked(text, plan, tmp_path, 50.0, number, run))
    round_event = schedule_of(plan).round_event()
    with Ledger.open(tmp_path) as ledger:
        assert set(ledger.events("device")) == {EARLIER, round_event.times(3)}


def test_a_device_whose_budget_cannot_bear_the_weights_declines(tmp_path: Path) -> None:
    text, plan = device_plan(noise_multiplier=0.8)
    alone = epsilon([dataclasses.replace(EARLIER, noise_multiplier=0.8)], DELTA)
    reply = asked(text, plan, tmp_path, 0.9 * alone, 1, "a")
    assert reply.error.code == Refusal.BUDGET
    with Ledger.open(tmp_path) as ledger:
        assert ledger.events("device") == []


def test_an_owners_limits_hold_for_the_weights_too() -> None:
    plan = planned("privacy.noise_multiplier=2.0", *declared())
    asks = dataclasses.replace(order(), noise_multiplier=2.0)
    budget = "[budget]\nepsilon = 9.0\ndelta = 1e-5\n[limits]\n"

    def said(limit: str) -> list[str]:
        return against_plan(parse_policy(budget + limit), plan, asks)

    assert said("") == []
    assert "trained.noise_multiplier=1.1" in said("least_noise_multiplier = 1.5")[0]
    assert any("trained.sampling_rate=0.05" in s for s in said("largest_sampling_rate = 0.01"))


# The server


def linear(_: tuple[int, ...], classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(2, classes))


def learned(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    model = linear(shape, classes)
    values = torch.arange(2.0 * classes).view(classes, 2)
    model.load_state_dict({**model.state_dict(), "1.weight": values})
    return model


def own(section: TaskSection | None = None, **models: Any) -> ArrayTask:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(120, 2))
    labels = (inputs > 0).sum(axis=1)
    return ArrayTask(
        section or TaskSection(name="own", clients=4, public_examples=24),
        0,
        inputs=inputs,
        labels=labels,
        test_inputs=inputs[:30],
        test_labels=labels[:30],
        classes=3,
        **{
            "student": lambda _, shape, classes: linear(shape, classes),
            "teacher": linear,
            **models,
        },
    )


def digest_of(task: ArrayTask) -> str:
    return weights_digest([task.teacher().state_dict()["1.weight"]])


def test_only_the_declared_weights_are_taken() -> None:
    task = own(teacher=learned)
    with pytest.raises(DataError, match=f'weights = "{digest_of(task)}"'):  # what to declare
        require_new_models(planned(), task)
    require_new_models(planned(*declared(digest_of(task))), task)
    require_new_models(planned(*declared(digest_of(task))), PublicHalf(task, 0))
    with pytest.raises(PlanError, match=f'must be "{digest_of(task)}"'):
        require_new_models(planned(*declared()), task)
    with pytest.raises(PlanError, match="begin at random"):
        require_new_models(planned(*declared()), own())
    with pytest.raises(PlanError, match="public_weights"):
        require_new_models(planned(*declared()), own(teacher=learned, public_weights=True))


def test_a_digest_is_of_values_alone() -> None:
    a, b = torch.arange(4.0), torch.arange(6.0).view(2, 3)
    assert weights_digest([a, b]) == weights_digest([b, a, b.clone()])
    assert weights_digest([a, b]) != weights_digest([a, b.view(3, 2)])
    assert weights_digest([a]) != weights_digest([a + 1e-7 * torch.eye(1, 4)[0]])


# A whole run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    module = ModuleType("task_with_weights")
    vars(module)["task"] = lambda section, seed: own(section, teacher=learned)
    vars(module)["student"] = linear
    sys.modules["task_with_weights"] = module
    yield simulate(whole(), tmp_path_factory.mktemp("runs") / "run")
    del sys.modules["task_with_weights"]


def whole(*overrides: str) -> Plan:
    settings = [
        "task.name=task_with_weights:task",
        "task.public_examples=24",
        "student.model=task_with_weights:student",
        "student.epochs=1",
        "teacher.epochs=1",
        "privacy.epsilon=6.0",
        "engine.workers=1",
        "federation.eval_every=5",
        *declared(digest_of(own(teacher=learned))),
    ]
    return planned(*settings, *overrides)


def test_a_run_charges_the_weights_to_every_client_and_stays_within_its_target(run: Run) -> None:
    rounds = schedule_of(run.plan()).round_event().times(5)
    with Ledger.open(run.ledger) as ledger:
        for client in range(4):
            assert set(ledger.events(f"client-{client}")) == {EARLIER, rounds}
    found = run.read_summary()["privacy"]["epsilon"]
    assert found == pytest.approx(epsilon([EARLIER, rounds], DELTA))
    assert 4.4 < found <= 6.0


def test_a_report_shows_the_weights_as_a_release_of_their_own(run: Run) -> None:
    data = collect(run)
    assert problems(data) == []
    assert data["weights"]["epsilon"] == pytest.approx(epsilon([EARLIER], DELTA))
    first = data["releases"][0]
    assert first["value"].startswith("Weights that the models begin with")
    assert "q = 0.05, σ = 1.1" in first["mechanism"]
    (charge,) = [r["answer"] for r in data["checklist"] if r["field"] == "Charge for the teacher"]
    assert charge.startswith(f"ε = {data['weights']['epsilon']:.2f}"[:7])
    assert any("were trained" in row["what"] for row in data["not_covered"])
    for kind in ("html", "md", "json"):
        assert data["weights"]["sha256"][:12] in render_data(data, kind)


def test_the_server_sees_shares_of_the_rounds_and_the_same_weights_as_everybody(run: Run) -> None:
    schedule = schedule_of(run.plan())
    rows = {row["name"]: row["epsilon"] for row in collect(run)["adversaries"]}
    server = [EARLIER, schedule.server_event().times(5)]
    assert rows["The server"] == pytest.approx(epsilon(server, DELTA))
    assert rows["Readers of the models"] == run.read_summary()["privacy"]["epsilon"]


def test_weights_are_found_in_a_history_even_where_they_equal_a_round() -> None:
    one = PoissonGaussian(0.05, 1.1, 20)
    assert apart([EARLIER, one], EARLIER) == ([one], [EARLIER])
    assert apart([one], EARLIER) == ([one], [])
    other = PoissonGaussian(0.2, 1.1, 20)
    assert apart([Composed((EARLIER, other))], EARLIER) == ([other], [EARLIER])
    assert apart([other], None) == ([other], [])


def test_a_plan_explains_what_the_weights_cost(run: Run) -> None:
    price = explain_plan(run.plan())["privacy"]
    assert price["weights_epsilon"] == epsilon([EARLIER], DELTA)
    assert price["rounds_epsilon"] < price["epsilon"] <= 6.0
    assert price["rounds_that_fit"] == 5
    assert price["half_noise_rounds"] < 5
