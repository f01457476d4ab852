"""The owner's policy: what may be written in it, and what it says against orders and moments."""

from __future__ import annotations

from datetime import datetime, time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reticent.client.budget import budget_of
from reticent.client.policy import Policy, changed, parse_policy, policy_from
from reticent.client.rules import MEGABYTE, against_now, against_plan, against_room
from reticent.client.sensors import Readings, Sensors, metered
from reticent.core.errors import PolicyError, PrivacyError
from reticent.core.plan import parse_plan
from reticent.core.protocol import PROTOCOL, Order
from reticent.privacy.ledger import Budget
from reticent.server.enrolment import POLICY

BUDGET = {"budget": {"epsilon": 2.0, "delta": 1e-5}}
PLAN = parse_plan("")
NOW = datetime(2026, 3, 1, 12, 0)


def policy(**sections: dict[str, Any]) -> Policy:
    return policy_from({**BUDGET, **sections})


def order(noise: float = 1.0) -> Order:
    return Order(PROTOCOL, "run", PLAN.digest, 1, "00", noise, 10.0, 0.5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "budget is absent: the device's owner must set it"),
        ("[budget]\nepsilon = 1.0", "budget.delta is absent"),
        ("[budget]\nepsilon = 0\ndelta = 1e-5", "budget.epsilon=0: input should be greater"),
        ('[budget]\nepsilon = "1"\ndelta = 1e-5', 'budget.epsilon="1": input should be a valid'),
        ("[budget]\nepsilon = 1.0\ndelta = 1e-5\nlifetime_epsilon = 9.0", "without window_days"),
        ("[budget]\nepsilon = 1.0\ndelta = 1e-5\n[wen]", "did you mean when"),
        ("[budget]\nepsilon = 1.0\ndelta = 1e-5\n[when]\ncharge = 1", "did you mean when.charging"),
        ('[budget]\nepsilon = 1.0\ndelta = 1e-5\n[when]\nhours = ["9-5"]', 'like "22:00-06:00"'),
        ('[budget]\nepsilon = 1.0\ndelta = 1e-5\n[when]\nunknown = "hm"', "'refuse' or 'allow'"),
        ('[budget]\nepsilon = 1.0\ndelta = 1e-5\n[allow]\nsigners = ["ab"]', "allow.signers.0"),
        ("[budget]\nepsilon = 1.0\ndelta = 1e-5\nwindow_days = 1e-9", "window_days=1e-09: must"),
        ("[budget]\nepsilon = 1.0\ndelta = 1e-5\nwindow_days = 1e308", "window_days=1e+308: must"),
        ("[budget]\nepsilon = 2026-01-01\ndelta = 1e-5", "budget.epsilon=2026-01-01: must not"),
        ("[budget]\nepsilon = 1.0\n[when]\nhours = [07:30:00]", "when.hours.0=07:30:00: must not"),
        ("[budget]\nepsilon = " + "[" * 200 + "]" * 200, "recursion limit"),
        ("[budget]\nepsilon = " + "[" * 20_000, "not TOML"),
        ("[budget", "not TOML"),
    ],
)
def test_a_wrong_policy_is_refused_with_key_value_and_what_is_allowed(text: str, said: str) -> None:
    with pytest.raises(PolicyError) as error:
        parse_policy(text, "mine.toml")
    assert str(error.value).startswith("mine.toml: ")
    assert said in str(error.value)


def test_what_the_operator_proposes_is_a_policy() -> None:
    assert parse_policy(POLICY).budget.epsilon == 10.0


def test_a_budget_may_be_endless_if_the_owner_says_so() -> None:
    endless = parse_policy("[budget]\nepsilon = inf\ndelta = 1e-5")
    assert endless.budget.epsilon == float("inf")
    assert endless.model_dump(mode="json")["budget"]["epsilon"] == "infinity"


@given(st.text(max_size=200))
def test_any_text_is_a_policy_or_a_policy_error(text: str) -> None:
    with pytest.raises(PolicyError):
        parse_policy(text)


def test_changes_set_keys_and_take_them_out() -> None:
    more = changed(dict(BUDGET), "when.charging=true")
    assert policy_from(more).when.charging
    assert policy_from(changed(more, "when.charging=")) == policy()
    for wrong in ("when.charging", "charging=true", "a.b.c=1"):
        with pytest.raises(PolicyError, match=r"section\.key=value"):
            changed({}, wrong)


@pytest.mark.parametrize("depth", [100, 200, 300, 400, 20_000])
def test_a_change_that_is_nested_deeply_is_a_policy_error(depth: int) -> None:
    with pytest.raises(PolicyError):
        policy_from(changed(dict(BUDGET), "budget.epsilon=" + "[" * depth + "]" * depth))
    with pytest.raises(PolicyError, match=r"budget\.epsilon"):
        policy_from(changed(dict(BUDGET), "budget.epsilon=" + "[" * depth))


def test_a_change_changes_one_key() -> None:
    with pytest.raises(PolicyError, match=r"budget\.epsilon"):
        policy_from(changed(dict(BUDGET), "budget.epsilon=1.0\ndelta=0.5"))


@given(st.floats(min_value=0, exclude_min=True, allow_infinity=False))
def test_a_window_is_accepted_if_a_ledger_takes_it(days: float) -> None:
    section = {**BUDGET["budget"], "window_days": days}
    try:
        taken = Budget(section["epsilon"], section["delta"], days * 86400)
    except PrivacyError:
        with pytest.raises(PolicyError, match="window_days"):
            policy_from({"budget": section})
    else:
        assert budget_of(policy_from({"budget": section})) == taken


@pytest.mark.parametrize(
    ("section", "key", "refuses", "allows"),
    [
        ("limits", "least_noise_multiplier", 1.01, 1.0),
        ("limits", "largest_sampling_rate", 0.09, 0.1),
        ("limits", "largest_rounds", 59, 60),
        ("allow", "tasks", ["digits2"], ["digits"]),
        ("allow", "models", [], ["tiny"]),
        ("allow", "trust", ["local"], ["aggregator"]),
    ],
)
def test_each_limit_refuses_what_is_beyond_it_and_nothing_else(
    section: str, key: str, refuses: Any, allows: Any
) -> None:
    if section == "allow" and key == "tasks":
        allows = [PLAN.task.name]
    assert len(against_plan(policy(**{section: {key: refuses}}), PLAN, order())) == 1
    assert against_plan(policy(**{section: {key: allows}}), PLAN, order()) == []


def test_steps_and_a_plan_without_privacy_are_refused_too() -> None:
    plan = parse_plan("", ["privacy=off", "federation.steps_per_round=5"])
    said = against_plan(policy(limits={"largest_steps_per_round": 4}), plan, order(0.0))
    assert len(said) == 2
    assert "steps_per_round=5" in said[0] and "trust off" in said[1]


def test_a_module_of_this_device_is_run_only_if_it_is_named() -> None:
    plan = parse_plan('[task]\nname = "os:path"')
    assert "allow.tasks must name it" in against_plan(policy(), plan, order())[0]
    assert against_plan(policy(allow={"tasks": ["os:path"]}), plan, order()) == []


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        ("09:00-17:00", [time(9), time(16, 59, 59)], [time(8, 59), time(17)]),
        ("22:00-06:00", [time(22), time(23, 59), time(0), time(5, 59)], [time(6), time(21, 59)]),
        ("00:00-00:00", [time(0), time(12)], []),
    ],
)
def test_hours_include_their_begin_and_not_their_end_also_over_midnight(
    hours: str, inside: list[time], outside: list[time]
) -> None:
    when = policy(when={"hours": [hours]}).when
    assert all(when.includes(moment) for moment in inside)
    assert not any(when.includes(moment) for moment in outside)


CONDITIONS: list[tuple[dict[str, Any], Readings, Readings]] = [
    ({"charging": True}, Readings(charging=True), Readings(charging=False)),
    ({"unmetered": True}, Readings(metered=False), Readings(metered=True)),
    ({"least_battery": 0.5}, Readings(battery=0.5), Readings(battery=0.49)),
    ({"largest_celsius": 60.0}, Readings(celsius=60.0), Readings(celsius=60.1)),
    ({"largest_pressure": 0.1}, Readings(pressure=0.1), Readings(pressure=0.11)),
]


@pytest.mark.parametrize(("when", "good", "bad"), CONDITIONS)
def test_each_condition_holds_or_not_and_unknown_is_as_the_owner_says(
    when: dict[str, Any], good: Readings, bad: Readings
) -> None:
    wanted = policy(when=when).when
    assert against_now(wanted, good, NOW) == []
    assert len(against_now(wanted, bad, NOW)) == 1
    assert "cannot be read" in against_now(wanted, Readings(), NOW)[0]
    lenient = policy(when={**when, "unknown": "allow"}).when
    assert against_now(lenient, Readings(), NOW) == []
    assert len(against_now(lenient, bad, NOW)) == 1
    assert against_now(policy().when, bad, NOW) == []  # what is not asked for is not looked at


def test_room_is_what_is_needed_and_what_is_spared() -> None:
    tight = policy(resources={"spare_memory_mb": 10, "spare_disk_mb": 5})
    need = 20 * MEGABYTE
    assert against_room(tight, 30 * MEGABYTE, 5 * MEGABYTE, need) == []
    assert "30 MB are needed" in against_room(tight, 30 * MEGABYTE - 1, 5 * MEGABYTE, need)[0]
    assert "spare_disk_mb" in against_room(tight, 30 * MEGABYTE, 5 * MEGABYTE - 1, need)[0]
    assert len(against_room(tight, None, 5 * MEGABYTE, need)) == 1


def put(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_sensors_read_what_linux_writes(tmp_path: Path) -> None:
    supply = "sys/class/power_supply"
    for name, text in {
        f"{supply}/AC/type": "Mains\n",
        f"{supply}/AC/online": "0\n",
        f"{supply}/BAT0/type": "Battery\n",
        f"{supply}/BAT0/capacity": "71\n",
        f"{supply}/BAT0/status": "Discharging\n",
        f"{supply}/mouse/type": "Battery\n",
        f"{supply}/mouse/scope": "Device\n",
        f"{supply}/mouse/capacity": "3\n",
        "sys/class/thermal/thermal_zone0/temp": "47500\n",
        "sys/class/thermal/thermal_zone1/temp": "0\n",
        "sys/class/thermal/thermal_zone2/temp": "61200\n",
        "proc/pressure/cpu": "some avg10=0.00 avg60=12.50 avg300=1.00 total=5\nfull avg60=90.00\n",
    }.items():
        put(tmp_path, name, text)
    network = "GENERAL.STATE:100 (connected)\nGENERAL.METERED:no (guessed)\n"
    seen = Sensors(tmp_path, lambda: network).read()
    assert seen == Readings(
        charging=False, battery=0.71, metered=False, celsius=61.2, pressure=0.125
    )
    put(tmp_path, f"{supply}/AC/online", "1\n")
    assert Sensors(tmp_path, lambda: network).read().charging is True


def test_a_battery_tells_whether_it_charges_where_no_supply_is_listed(tmp_path: Path) -> None:
    folder = "sys/class/power_supply/BAT1"
    put(tmp_path, f"{folder}/type", "Battery")
    for status, charging in {"Charging": True, "Discharging": False, "Unknown": None}.items():
        put(tmp_path, f"{folder}/status", status)
        assert Sensors(tmp_path, lambda: "").read().charging is charging


@pytest.mark.parametrize(
    ("online", "status", "charging"),
    [
        ({}, "Full", True),
        ({}, "Not charging", True),
        ({"AC": "0"}, "Full", False),
        ({"AC": "0"}, "Not charging", False),
        ({"AC": "0"}, "Unknown", False),
        ({"AC": "0"}, "Charging", True),  # from a supply that is not listed
        ({"AC": "1", "USB": "0"}, "Full", True),
        ({"AC": "0", "USB": "1"}, "Discharging", True),  # from a weak supply
        ({"AC": "0", "USB": ""}, "Full", False),
        ({"AC": ""}, "Full", None),  # listed, and cannot be read
        ({"AC": ""}, "Discharging", False),
    ],
)
def test_a_full_battery_is_no_supply_where_supplies_are_listed(
    tmp_path: Path, online: dict[str, str], status: str, charging: bool | None
) -> None:
    folder = tmp_path / "sys/class/power_supply"
    for name, text in online.items():
        put(folder, f"{name}/type", "Mains" if name == "AC" else "USB")
        put(folder, f"{name}/online", text)
    put(folder, "BAT0/type", "Battery")
    put(folder, "BAT0/status", status)
    assert Sensors(tmp_path, lambda: "").read().charging is charging


def test_what_cannot_be_read_is_unknown_and_no_guess(tmp_path: Path) -> None:
    assert Sensors(tmp_path, lambda: "").read() == Readings()
    put(tmp_path, "sys/class/power_supply/B/type", "Battery")
    put(tmp_path, "sys/class/power_supply/B/capacity", "full")
    put(tmp_path, "sys/class/thermal/thermal_zone0/temp", "")
    put(tmp_path, "proc/pressure/cpu", "some avg60=nan total=1\n")
    assert Sensors(tmp_path, lambda: "garbage").read() == Readings()


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([("100 (connected)", "yes")], True),
        ([("100 (connected)", "yes (guessed)"), ("100 (connected)", "no")], True),
        ([("30 (disconnected)", "yes"), ("100 (connected)", "no")], False),
        ([("100 (connected)", "unknown")], None),
        ([], None),
    ],
)
def test_one_metered_connection_is_enough(
    states: list[tuple[str, str]], expected: bool | None
) -> None:
    answer = "\n".join(f"GENERAL.STATE:{s}\nGENERAL.METERED:{m}" for s, m in states)
    assert metered(answer) is expected
