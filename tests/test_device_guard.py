"""The owner's policy is enforced by the ClientApp, whatever a server sends, and costs no budget."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Context, RecordDict
from test_deployment import PLAN, TASK, ask, order, released, scheduled

from reticent.client import deployment, guard, rate, turn
from reticent.client.diary import (
    BEGUN,
    ENDED,
    FAILED,
    INSTALLED,
    MOST_LINES,
    MOST_REFUSALS,
    MOST_TEXT,
    REFUSED,
    RELEASED,
    Diary,
    Line,
)
from reticent.client.failures import MOST_PLANS
from reticent.client.folder import Device, accept_policy, create_device
from reticent.client.guard import MOST_FAILURES
from reticent.client.order import Refused
from reticent.client.policy import parse_policy
from reticent.client.resources import Memory, training_bytes
from reticent.client.round import _site
from reticent.client.rules import against_model, against_plan
from reticent.client.status import device_status
from reticent.core.bundle import read_bundle, sign_plan
from reticent.core.errors import DataError
from reticent.core.plan import parse_plan
from reticent.core.protocol import Refusal
from reticent.core.run import without_none
from reticent.core.signing import PRIVATE_KEY, read_private_key
from reticent.privacy.accounting import epsilon
from reticent.privacy.anchor import public_hex
from reticent.privacy.ledger import Ledger
from reticent.server.certificates import utc_now
from reticent.server.enrolment import POLICY, enroll
from reticent.server.home import create_home

BUDGET = "[budget]\nepsilon = 99.0\ndelta = 1e-5\n"
MEGABYTE = 2**20


@pytest.fixture
def device(tmp_path: Path) -> Device:
    """A device whose owner accepted a budget and nothing more."""
    home = create_home(tmp_path / "server", ["127.0.0.1"], 8000, utc_now())
    (bundle,) = enroll(home, ["pi-1"], POLICY, utc_now())
    made = create_device(tmp_path / "pi-1", read_bundle(bundle))
    accept_policy(made, BUDGET, "test")
    return made


def signature(device: Device, key: Ed25519PrivateKey | None = None) -> str:
    plans = device.folder.parent / "server" / "keys" / "plans" / PRIVATE_KEY
    return sign_plan(key or read_private_key(plans), PLAN.digest)


def context(device: Device, **run: Any) -> Context:
    from test_deployment import CONFIG

    config = {"plan": CONFIG["plan"], "plan-signature": signature(device), **run}
    return Context(1, 2, {"device-dir": str(device.folder)}, RecordDict(), config)


def charges(device: Device) -> int:
    with Ledger.open(device.state) as ledger:
        return ledger.overview("device", deployment.budget_of(device.owners_policy())).charges


def reply_code(reply: Any) -> int:
    return reply.error.code if reply.has_error() else 0


def refused(device: Device, given: Context | None = None, number: int = 1) -> tuple[int, str]:
    """Return the code that the server gets and the reason that the owner reads."""
    reply = ask(given or context(device), order(number))
    assert reply.has_error()
    assert reply.error.reason == Refusal(reply.error.code).text
    line = Diary(device.state).lines()[-1]
    assert (line.what, line.code, line.round) == (REFUSED, reply.error.code, number)
    return reply.error.code, line.reason


def test_what_the_policy_allows_is_run_and_written_down(device: Device) -> None:
    given = context(device)
    released(ask(given, order(1)))
    released(ask(given, order(2)))
    assert [line.what for line in Diary(device.state).lines()] == [BEGUN, RELEASED] * 2
    assert charges(device) == 2


def test_a_round_beyond_the_plans_is_refused_and_costs_nothing(device: Device) -> None:
    given = context(device)
    for number in (PLAN.federation.rounds + 1, 2**31 - 1):
        assert refused(device, given, number)[0] == Refusal.BAD_ORDER
    assert charges(device) == 0


def test_a_plan_that_counts_on_secret_coins_is_refused(device: Device) -> None:
    changes = ["privacy.unit=client", "privacy.trust=aggregator", "privacy.secret_cohort=true"]
    plan = parse_plan("", [*changes, "federation.sampling=poisson", "task.name=digits"])
    text = tomli_w.dumps(without_none(plan.model_dump(mode="json")))
    key = device.folder.parent / "server" / "keys" / "plans" / PRIVATE_KEY
    signed = {"plan": text, "plan-signature": sign_plan(read_private_key(key), plan.digest)}
    code, reason = refused(device, context(device, **signed))
    assert code == Refusal.POLICY and "secret_cohort=true" in reason


SECRET = "Alice Miller is ill"


def raises(error: Exception) -> Any:
    def broken(*_: object) -> Any:
        raise error

    return broken


def test_the_diary_holds_no_text_of_an_error_that_may_hold_data(
    device: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A foreseen error's own text is made for the owner, and its cause may be a value."""
    known = DataError("column 3 of people.db is no number")
    known.__cause__ = ValueError(SECRET)
    for error in (known, ValueError(SECRET)):
        monkeypatch.setattr("reticent.client.round._site_of", raises(error))
        reply = ask(context(device), order(1))
        assert reply.has_error() and SECRET not in reply.error.reason
    first, second = [line for line in Diary(device.state).lines() if line.code]
    assert (first.what, first.reason) == (REFUSED, str(known))
    assert (second.what, second.reason) == (FAILED, "unexpected ValueError")
    assert SECRET not in (device.state / "diary.jsonl").read_text()
    assert SECRET not in caplog.text and str(known) in caplog.text


@pytest.mark.parametrize("where", ["_site_of", "_ready"])
def test_the_owner_reads_why_there_are_no_data_and_the_plan_has_not_failed(
    device: Device, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Whoever mends the data must not wait a day for the next round."""
    if where == "_site_of":
        monkeypatch.setattr("reticent.client.round._site_of", raises(DataError("people.db: ?")))
    else:
        monkeypatch.setattr(type(TASK), "client", raises(DataError("people.db: ?")))
    for number in range(MOST_FAILURES + 1):
        reply = ask(context(device), order(1, f"run {number}"))
        assert reply.error.code == Refusal.NO_DATA
        assert Diary(device.state).lines()[-1].reason == "people.db: ?"
    assert Diary(device.state).failures(PLAN.digest)[0] == 0


def test_text_that_came_with_a_message_does_nothing_to_a_terminal_or_a_log(
    device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    key = "\x1b]0;mine\x07\x1b[2J\nSuperNode ID: 777"
    ask(context(device, plan=f"{json.dumps(key)} = 1\n"), order(1))
    reason = Diary(device.state).lines()[-1].reason
    assert "SuperNode ID: 777" in reason
    for text in (reason, caplog.records[-1].getMessage()):
        assert text.isprintable()


REFUSALS = [
    ("[limits]\nlargest_rounds = 1", Refusal.POLICY, "limits.largest_rounds is 1"),
    ("[limits]\nleast_noise_multiplier = 90.0", Refusal.POLICY, "least_noise_multiplier is 90"),
    ("[limits]\nlargest_sampling_rate = 0.1", Refusal.POLICY, "largest_sampling_rate is 0.1"),
    ('[allow]\ntasks = ["fashion"]', Refusal.POLICY, "task digits: allow.tasks is fashion"),
    ('[allow]\nmodels = ["other"]', Refusal.POLICY, "allow.models is other"),
    ("[allow]\nmodels = []", Refusal.POLICY, "allow.models is empty"),
    ('[allow]\ntrust = ["aggregator"]', Refusal.POLICY, "trust local"),
    ("[when]\nlargest_celsius = 0.001", Refusal.NOT_NOW, ""),
    ("[resources]\nspare_memory_mb = 99999999", Refusal.NOT_NOW, "MB of memory free"),
    ("[resources]\nspare_disk_mb = 99999999", Refusal.NOT_NOW, "MB of disk free"),
]


@pytest.mark.parametrize(("policy", "code", "said"), REFUSALS)
def test_a_refusal_has_a_fixed_code_and_a_reason_for_the_owner_and_costs_no_budget(
    device: Device, policy: str, code: Refusal, said: str
) -> None:
    accept_policy(device, BUDGET + policy, "test")
    given, reason = refused(device)
    assert given == code
    assert said in reason
    assert charges(device) == 0
    status = device_status(device, datetime.now().astimezone())
    assert status["refusals"] == {reason: 1}
    assert status["budget"]["spent"] == 0.0
    accept_policy(device, BUDGET, "test")  # an edit holds from the next order on
    released(ask(context(device), order()))


@pytest.mark.parametrize(
    "limits", ["[limits]\nlargest_participations = 1", "lifetime_epsilon = {once}"]
)
def test_orders_that_come_at_once_do_not_overspend_what_the_ledger_does_not_check(
    device: Device, monkeypatch: pytest.MonkeyPatch, limits: str
) -> None:
    """Each order has a process of its own; this one begins a second order before it charges."""
    once = 1.01 * epsilon([scheduled().round_event()], 1e-5)
    accept_policy(device, f"{BUDGET}window_days = 1.0\n" + limits.format(once=once), "test")
    codes: list[int] = []

    def second() -> None:
        codes.append(reply_code(ask(context(device), order(2))))

    other = threading.Thread(target=second)
    admit = guard.Guard.admit

    def admitted(self: guard.Guard, *given: Any) -> None:
        admit(self, *given)
        if not other.ident:
            other.start()
            time.sleep(1.0)  # it waits for its turn, and is admitted and charged without one

    monkeypatch.setattr(guard.Guard, "admit", admitted)
    monkeypatch.setattr(deployment, "_ledger", Ledger.open)  # a connection is of one thread
    released(ask(context(device), order(1)))
    other.join(60)
    assert codes and codes[0] in {Refusal.POLICY, Refusal.BUDGET}
    assert charges(device) == 1


@pytest.mark.parametrize(("key", "name"), [("task.name", "tasks"), ("student.model", "models")])
def test_a_module_of_the_device_is_run_only_if_the_policy_names_it(key: str, name: str) -> None:
    """The plan is signed, as all here are; that is not enough to run what happens to be there."""
    plan = parse_plan("", [f"{key}=this:s"])
    for policy, allowed in (("", False), (f'[allow]\n{name} = ["this:s"]', True)):
        owners = parse_policy(BUDGET + policy)
        for said in (against_plan(owners, plan, order(1)), against_model(owners, plan, 1)):
            assert any(f"allow.{name}" in reason for reason in said) is not allowed


def test_an_order_does_not_wait_for_ever_for_its_turn(tmp_path: Path) -> None:
    with turn.turn(tmp_path):
        with pytest.raises(Refused) as refusal, turn.turn(tmp_path, patience=0.0):
            pass
        assert refusal.value.refusal == Refusal.NOT_NOW
    with turn.turn(tmp_path, patience=0.0):
        pass
    with pytest.raises(Refused), turn.turn(tmp_path / "absent"):
        pass


def test_rounds_are_counted_by_the_ledger_whatever_the_diary_still_holds(device: Device) -> None:
    now = datetime.now().astimezone()
    assert device_status(device, now)["rounds_released"] == 0
    given = context(device)
    for number in (1, 2, 2):  # the second is asked again, and is one round
        released(ask(given, order(number)))
    fill(device.state, BEGUN, ENDED)
    Diary(device.state).add(BEGUN)
    status = device_status(device, now)
    assert (status["rounds_released"], status["budget"]["rounds"]) == (2, 2)
    assert status["last_round"]["round"] == 2
    device.policy.unlink()
    status = device_status(device, now)
    assert (status["rounds_released"], status["budget"]) == (2, None)
    (device.state / "ledger.tip").unlink()
    status = device_status(device, now)
    assert (status["rounds_released"], status["budget"]) == (None, None)
    policy, ledger = status["against"]
    assert "accepted no policy" in policy
    assert "ledger.tip" in ledger


def test_unsigned_plans_and_those_of_other_keys_are_refused(device: Device) -> None:
    other = Ed25519PrivateKey.generate()
    for wrong in ("", "00" * 64, signature(device, other)):
        given = context(device, **{"plan-signature": wrong})
        assert refused(device, given)[0] == Refusal.UNSIGNED
    assert charges(device) == 0
    name = public_hex(other.public_key())
    accept_policy(device, f'{BUDGET}[allow]\nsigners = ["{name}"]', "test")
    assert refused(device)[0] == Refusal.UNSIGNED  # the owner chose another signer instead
    released(ask(context(device, **{"plan-signature": signature(device, other)}), order()))


def test_participations_are_counted_over_runs_and_a_retry_is_none(device: Device) -> None:
    accept_policy(device, f"{BUDGET}[limits]\nlargest_participations = 2", "test")
    given = context(device)
    for run in ("a", "b", "b"):
        released(ask(given, order(1, run=run)))
    assert ask(given, order(1, run="c")).error.code == Refusal.POLICY
    assert charges(device) == 2


def test_no_more_orders_are_begun_in_an_hour_than_the_owner_allows(device: Device) -> None:
    """Over runs and restarts, as each order is a process of its own; refused ones do not count."""
    accept_policy(device, f"{BUDGET}[limits]\nlargest_orders_per_hour = 2", "test")
    given = context(device)
    assert ask(context(device, **{"plan-signature": ""}), order(1)).error.code == Refusal.UNSIGNED
    for run in ("a", "b"):
        released(ask(given, order(1, run=run)))
    assert ask(given, order(1, run="c")).error.code == Refusal.NOT_NOW
    assert "largest_orders_per_hour=2" in Diary(device.state).lines()[-1].reason
    assert charges(device) == 2
    now = Diary(device.state).clock()
    assert not rate.Rate(device.state, lambda: now + 3590).take(2)
    assert rate.Rate(device.state, lambda: now + 3620).take(1)


def test_a_clock_that_was_set_back_and_a_damaged_file_hold_no_order_up(tmp_path: Path) -> None:
    assert rate.Rate(tmp_path, lambda: 1e9).take(1)
    assert not rate.Rate(tmp_path, lambda: 1e9 - 10).take(1)
    assert rate.Rate(tmp_path, lambda: 1e9 - 4000).take(1)
    for text in ('{"a": 1}', "[", '["a", null, {}]', "[" * 100000):
        (tmp_path / "orders.json").write_text(text)
        assert rate.Rate(tmp_path).take(1)
        assert not rate.Rate(tmp_path).take(1)


def test_a_budget_for_life_holds_beside_one_that_renews(device: Device) -> None:
    once = epsilon([scheduled().round_event()], 1e-5)
    renewing = f"{BUDGET}window_days = 1.0\nlifetime_epsilon = {once * 1.01}"
    accept_policy(device, renewing, "test")
    given = context(device)
    first = released(ask(given, order(1)))
    code, reason = refused(device, given, 2)
    assert code == Refusal.BUDGET
    assert "lifetime_epsilon" in reason
    assert released(ask(given, order(1))) == first  # a retry of what was charged is no more
    assert charges(device) == 1


def test_without_an_accepted_policy_nothing_runs(device: Device) -> None:
    device.policy.unlink()
    code, reason = refused(device)
    assert code == Refusal.FAILED
    assert "accepted no policy" in reason
    assert not (device.state / "ledger.db").exists()


def test_an_order_that_fails_again_and_again_is_not_followed_any_more(
    device: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that dies leaves a begun round without an end, and so does an exception."""
    from reticent.client import round as client_round

    def broken(*_: object) -> Any:
        raise MemoryError(f"of a client's {16 + 1} examples")

    monkeypatch.setattr(client_round, "_charge", broken)
    for number in range(1, MOST_FAILURES + 1):
        assert ask(context(device), order(1, f"run {number}")).error.code == Refusal.FAILED
    diary = Diary(device.state)
    assert diary.lines()[-1].what == FAILED
    assert "17 examples" not in (device.state / "diary.jsonl").read_text() + caplog.text
    assert "MemoryError" in caplog.text
    monkeypatch.undo()
    code, reason = refused(device, number=1)
    assert code == Refusal.NOT_NOW
    assert "failed 3 times in a row" in reason
    assert refused(device, number=2)[0] == Refusal.NOT_NOW  # its own refusal forgives nothing
    monkeypatch.setattr(guard, "FORGIVEN_AFTER", 0.0)  # a day later
    released(ask(context(device), order(1)))
    assert diary.failures(PLAN.digest)[0] == 0


def test_a_clock_that_was_set_back_neither_blocks_a_plan_nor_lets_it_fail_for_ever(
    device: Device,
) -> None:
    """Far back is forgiven once, a little back is not."""
    now = Diary(device.state).clock()
    ahead = Diary(device.state, lambda: now + 3 * 365 * 86400)
    for number in range(1, MOST_FAILURES + 1):
        ahead.add(BEGUN, plan=PLAN.digest, round=number)
    given = context(device)
    released(ask(given, order(1)))
    for number in range(1, MOST_FAILURES + 1):
        ahead.add(BEGUN, plan=PLAN.digest, round=number)
    Diary(device.state, lambda: now + 3600).add(BEGUN, plan=PLAN.digest, round=5)
    assert "failed 4 times in a row" in refused(device, number=2)[1]


def test_a_release_forgives_and_an_early_refusal_does_not_count(tmp_path: Path) -> None:
    diary = Diary(tmp_path)
    for what in (BEGUN, FAILED, BEGUN, RELEASED, BEGUN):
        diary.add(what, plan="p")
    assert diary.failures("p")[0] == 1
    diary.add(REFUSED, plan="p")  # by the policy, before it began
    assert diary.failures("p")[0] == 1
    diary.add(ENDED, plan="p")  # by the budget, after it began
    diary.add(BEGUN, plan="other")
    assert diary.failures("p")[0] == 0


def fill(folder: Path, *whats: str) -> None:
    """Add as many lines to a diary as make the next one trim it, each of a plan of its own."""
    lines = [asdict(Line(5.0, what, plan=f"{n}")) for n in range(2 * MOST_LINES) for what in whats]
    with (folder / "diary.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def test_nothing_pushes_out_how_often_a_plan_failed(tmp_path: Path) -> None:
    diary = Diary(tmp_path, lambda: 5.0)
    for number in range(3):
        diary.add(BEGUN, plan="p", round=number)
    fill(tmp_path, BEGUN, RELEASED)
    for what in (BEGUN, RELEASED) * 2:
        diary.add(what, plan="other")
    assert diary.failures("p") == (3, 5.0)
    assert diary.failures("other") == (0, 0.0)
    for number in range(MOST_PLANS + 3):  # as many as somebody signs
        diary.add(BEGUN, plan=f"signed {number}")
    assert len(json.loads((tmp_path / "failures.json").read_text())) == MOST_PLANS


@pytest.mark.parametrize("text", [None, "", "[]", '{"p": [3]}', '{"p": [3, NaN]}', "[" * 100000])
def test_failures_are_counted_from_the_diary_where_they_are_not_kept(
    tmp_path: Path, text: str | None
) -> None:
    """A device of an older version, or a damaged file."""
    diary = Diary(tmp_path, lambda: 5.0)
    for what in (BEGUN, RELEASED, BEGUN, BEGUN, BEGUN, ENDED):
        diary.add(what, plan="p")
    kept = tmp_path / "failures.json"
    kept.unlink() if text is None else kept.write_text(text)
    assert diary.failures("p") == (2, 5.0)
    diary.add(BEGUN, plan="p")
    assert json.loads(kept.read_text()) == {"p": [3, 5.0]}


def test_the_diary_is_short_private_and_survives_a_torn_line(tmp_path: Path) -> None:
    diary = Diary(tmp_path, lambda: 1.0)
    path = tmp_path / "diary.jsonl"
    path.write_text('{"at": 1.0, "what": "beg')
    diary.add(REFUSED, "x" * 5000)
    assert [line.what for line in diary.lines()] == [REFUSED]
    assert len(diary.lines()[0].reason) == MOST_TEXT
    fill(tmp_path, BEGUN)
    diary.add(RELEASED)
    assert len(diary.lines()) == MOST_LINES + 2
    assert path.stat().st_mode & 0o077 == 0


def test_refusals_and_failures_push_out_nothing_that_was_done(tmp_path: Path) -> None:
    diary = Diary(tmp_path, lambda: 5.0)
    for what in (INSTALLED, BEGUN, RELEASED):
        diary.add(what, "mine", plan="p")
    diary.add(REFUSED, "before")
    fill(tmp_path, REFUSED, FAILED)
    diary.add(BEGUN, plan="p")
    done = [line.what for line in diary.lines() if line.what not in (REFUSED, FAILED)]
    assert done == [INSTALLED, BEGUN, RELEASED, BEGUN]
    assert len(diary.lines()) == len(done) + MOST_REFUSALS
    assert [line.plan for line in diary.lines()[-3:]] == [f"{2 * MOST_LINES - 1}"] * 2 + ["p"]


def test_refusals_are_kept_and_counted_however_much_was_done(tmp_path: Path) -> None:
    diary = Diary(tmp_path, lambda: 5.0)
    diary.add(RELEASED, plan="p", round=7)
    for number, reason in enumerate(["not charging", "hot", "not charging"] * 4):
        diary.add(REFUSED, reason, "p", number, 1012)
    for _ in range(3):
        fill(tmp_path, BEGUN, ENDED)
        diary.add(REFUSED, "hot", "p", 99, 1012)
    assert diary.refusals() == {"not charging": 8, "hot": 7}
    seen = [(line.round, line.times) for line in diary.lines() if line.reason == "not charging"]
    assert seen == [(11, 8)]  # the last of them
    assert [line.round for line in diary.lines() if line.what == RELEASED] == [7]
    assert diary.lines()[-1].round == 99


def test_lines_of_a_diary_without_numbers_are_read(tmp_path: Path) -> None:
    """As the first versions wrote them."""
    line = {"at": 5.0, "what": REFUSED, "reason": "hot", "plan": "p", "round": 1, "code": 1012}
    odd = [{**line, "times": times} for times in (0, -1, 1.0, True, "1")]
    path = tmp_path / "diary.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in [line, *odd, line]))
    assert Diary(tmp_path).lines() == [Line(5.0, REFUSED, "hot", "p", 1, 1012)] * 2
    assert Diary(tmp_path).refusals() == {"hot": 2}


def test_a_refusal_needs_no_torch(device: Device) -> None:
    """So that saying no costs a device neither the time nor the memory of a training."""
    script = (
        "import sys, reticent.client.deployment, reticent.client.status, reticent.client.agent\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def put(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_free_memory_is_the_least_of_machine_and_groups(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    assert memory.free() is None
    put(tmp_path, "proc/meminfo", "MemTotal: 9 kB\nMemAvailable:  1048576 kB\n")
    assert memory.free() == 1024 * MEGABYTE
    put(tmp_path, "proc/self/cgroup", "0::/system.slice/reticent-device.service\n")
    group = "sys/fs/cgroup/system.slice"
    put(tmp_path, f"{group}/reticent-device.service/memory.max", "max\n")
    put(tmp_path, f"{group}/reticent-device.service/memory.current", "1\n")
    assert memory.free() == 1024 * MEGABYTE
    put(tmp_path, f"{group}/memory.max", f"{512 * MEGABYTE}\n")
    put(tmp_path, f"{group}/memory.current", f"{500 * MEGABYTE}\n")
    put(tmp_path, f"{group}/memory.stat", f"anon 5\ninactive_file {100 * MEGABYTE}\n")
    assert memory.free() == 112 * MEGABYTE


def test_free_memory_is_found_in_old_groups_too(tmp_path: Path) -> None:
    put(tmp_path, "proc/self/cgroup", "5:cpu:/a\n4:memory:/device\n")
    group = "sys/fs/cgroup/memory/device"
    put(tmp_path, f"{group}/memory.limit_in_bytes", f"{64 * MEGABYTE}\n")
    put(tmp_path, f"{group}/memory.usage_in_bytes", f"{60 * MEGABYTE}\n")
    assert Memory(tmp_path).free() == 4 * MEGABYTE


def test_the_estimate_of_memory_grows_until_the_microbatch(device: Device) -> None:
    small, large, larger = (training_bytes(1000, 5000, n, bounded=True) for n in (1.0, 64.0, 1e6))
    assert small < large == larger < training_bytes(1000, 5000, 1e6, bounded=False)
    from test_deployment import CONSTANTS

    site = _site(PLAN.canonical(), CONSTANTS)
    assert 100_000 < site.trainer.needed_bytes(TASK.nominal_examples) < 200 * MEGABYTE
