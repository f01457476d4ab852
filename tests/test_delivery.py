"""A device takes a model whole, verified, tested and newer than the last, or keeps what it has."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from deliveries import (
    OWNERS,
    PIECE,
    PLAN,
    Fleet,
    bring,
    make_artifact,
    make_fleet,
    offered,
    parts,
    receipt,
)

from reticent.client import trial as trials
from reticent.client.delivery import Part
from reticent.client.diary import INSTALLED, Diary
from reticent.client.folder import accept_policy
from reticent.client.installed import load_installed
from reticent.client.models import (
    MOST_TRIED,
    MOST_TRIES,
    Models,
    Slot,
    State,
    Tried,
    parse_state,
)
from reticent.client.order import Refused
from reticent.client.resources import Memory
from reticent.client.status import device_status
from reticent.client.trial import CutShort, needed_of, try_model
from reticent.compression.artifact import SelfTest
from reticent.core.errors import ArtifactError, PayloadError
from reticent.core.offer import (
    MOST_CHUNK,
    MOST_MODEL,
    MOST_OFFER,
    RECEIPT_BYTES,
    Receipt,
    offer_of,
    open_offer,
    sign_offer,
)
from reticent.core.plan import parse_plan
from reticent.core.protocol import Refusal
from reticent.server.certificates import utc_now

Files = dict[str, bytes]


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return make_fleet(tmp_path)


@pytest.fixture
def files(fleet: Fleet, tmp_path: Path) -> Files:
    return make_artifact(fleet, tmp_path / "artifact")


@pytest.fixture
def newer(fleet: Fleet, tmp_path: Path) -> Files:
    return make_artifact(fleet, tmp_path / "newer", seed=1)


def refusal(of: Callable[[], Any]) -> Refusal:
    with pytest.raises(Refused) as caught:
        of()
    return caught.value.refusal


def installed(fleet: Fleet) -> list[int]:
    return [slot.version for slot in fleet.models.state().slots]


def on_disk(fleet: Fleet) -> set[str]:
    return {path.name for path in fleet.device.models.iterdir()} - {".lock", "incoming"}


# ----- what is taken -----


def test_a_model_that_arrived_whole_is_installed_and_used(fleet: Fleet, files: Files) -> None:
    offer, signed, data = offered(fleet, files)
    recipient = fleet.recipient()
    assert receipt(recipient, Part(signed)) == Receipt(0, 0)
    *before, last = parts(signed, data)
    for number, part in enumerate(before, 1):
        assert receipt(recipient, part) == Receipt(0, number * PIECE)
    assert receipt(recipient, last) == Receipt(1, 0)
    assert receipt(recipient, Part(signed)) == Receipt(1, 0)  # asked again, it is there
    assert fleet.models.state().slots == (Slot(1, PLAN.digest, offer.sha256),)
    assert {p.name: p.read_bytes() for p in fleet.models.path(1).iterdir()} == files
    used = load_installed(fleet.device)
    assert (used.version, used.problem) == (1, "")
    assert used.artifact.predict(torch.zeros(1, 4)).shape == (1, 3)
    (line,) = Diary(fleet.device.state).lines()
    assert (line.what, line.reason, line.plan) == (INSTALLED, "model 1", PLAN.digest)
    status = device_status(fleet.device, utc_now())
    assert [m["version"] for m in status["model"]["installed"]] == [1]


def test_the_real_self_test_runs_in_a_process_of_its_own(fleet: Fleet, files: Files) -> None:
    _, signed, data = offered(fleet, files)
    assert bring(fleet.recipient(trial=try_model), signed, data) == Receipt(1, 0)


def test_a_part_that_comes_twice_or_out_of_order_changes_nothing(
    fleet: Fleet, files: Files
) -> None:
    _, signed, data = offered(fleet, files)
    recipient, (one, two, *_) = fleet.recipient(), parts(signed, data)
    assert receipt(recipient, two) == Receipt(0, 0)
    assert receipt(recipient, one) == receipt(recipient, one) == Receipt(0, PIECE)
    assert receipt(recipient, two) == receipt(recipient, one) == Receipt(0, 2 * PIECE)
    assert bring(recipient, signed, data) == Receipt(1, 0)


def test_what_has_arrived_serves_a_later_offer_of_the_same_content(
    fleet: Fleet, files: Files
) -> None:
    recipient = fleet.recipient()
    _, signed, data = offered(fleet, files)
    receipt(recipient, parts(signed, data)[0])
    _, again, data = offered(fleet, files, version=2)
    assert receipt(recipient, Part(again)) == Receipt(0, PIECE)
    assert bring(recipient, again, data) == Receipt(2, 0)


def test_what_has_arrived_of_another_model_is_forgotten(
    fleet: Fleet, files: Files, newer: Files
) -> None:
    recipient = fleet.recipient()
    _, signed, data = offered(fleet, files)
    receipt(recipient, parts(signed, data)[0])
    _, other, more = offered(fleet, newer, version=2)
    assert receipt(recipient, parts(other, more)[0]) == Receipt(0, PIECE)
    assert len(list(fleet.models.incoming.folder.iterdir())) == 1
    assert bring(recipient, other, more) == Receipt(2, 0)


def test_the_last_good_model_is_kept_and_older_ones_are_not(
    fleet: Fleet, files: Files, newer: Files
) -> None:
    for version, content in ((1, files), (2, newer), (5, files)):
        _, signed, data = offered(fleet, content, version)
        assert bring(fleet.recipient(), signed, data) == Receipt(version, 0)
    assert installed(fleet) == [5, 2]
    assert on_disk(fleet) == {"5", "2", "state.json"}


# ----- what is refused -----


def test_an_offer_that_the_key_of_artifacts_did_not_sign_is_refused(
    fleet: Fleet, files: Files
) -> None:
    offer, signed, data = offered(fleet, files)
    other = sign_offer(Ed25519PrivateKey.generate(), offer)
    plans = sign_offer(fleet.key("plans"), offer)  # a key of the same server, for other things
    changed = bytearray(signed)
    changed[-3] ^= 1
    for wrong in (b"", other, plans, bytes(changed), signed + b" ", signed + b" " * MOST_OFFER):
        assert refusal(lambda w=wrong: bring(fleet.recipient(), w, data)) is Refusal.UNTRUSTED
    assert not fleet.device.models.exists()


def test_older_versions_and_others_of_the_same_number_are_refused(
    fleet: Fleet, files: Files, newer: Files
) -> None:
    _, signed, data = offered(fleet, files, version=3)
    bring(fleet.recipient(), signed, data)
    for version, content in ((2, files), (2, newer), (3, newer)):
        _, old, more = offered(fleet, content, version)
        assert refusal(lambda o=old, m=more: bring(fleet.recipient(), o, m)) is Refusal.OLD_MODEL
    assert installed(fleet) == [3]


def test_an_older_version_stays_refused_after_the_owner_went_back(
    fleet: Fleet, files: Files, newer: Files
) -> None:
    for version, content in ((1, files), (2, newer)):
        _, signed, data = offered(fleet, content, version)
        bring(fleet.recipient(), signed, data)
    with fleet.models.alone():
        assert fleet.models.roll_back().version == 1
    assert on_disk(fleet) == {"1", "state.json"}
    assert refusal(lambda: bring(fleet.recipient(), signed, data)) is Refusal.OLD_MODEL
    with fleet.models.alone(), pytest.raises(ArtifactError, match="no model before"):
        fleet.models.roll_back()
    _, signed, data = offered(fleet, newer, 3)
    assert bring(fleet.recipient(), signed, data) == Receipt(3, 0)


def test_the_owner_goes_back_to_no_damaged_model_and_keeps_the_current_one(
    fleet: Fleet, files: Files, newer: Files
) -> None:
    for version, content in ((1, files), (2, newer)):
        _, signed, data = offered(fleet, content, version)
        bring(fleet.recipient(), signed, data)
    damaged = fleet.models.path(1) / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with fleet.models.alone(), pytest.raises(ArtifactError, match=r"models/1: is damaged"):
        fleet.models.roll_back()
    assert installed(fleet) == [2, 1]
    assert on_disk(fleet) == {"2", "1", "state.json"}
    assert load_installed(fleet.device).version == 2


def test_a_model_of_another_plan_is_refused(fleet: Fleet, files: Files, tmp_path: Path) -> None:
    _, signed, data = offered(fleet, files, plan="cd" * 32)
    assert refusal(lambda: bring(fleet.recipient(), signed, data)) is Refusal.WRONG_PLAN
    # An artifact of another plan behind an offer that names the right one.
    other = make_artifact(fleet, tmp_path / "other", plan_digest="cd" * 32)
    _, signed, data = offered(fleet, other)
    assert refusal(lambda: bring(fleet.recipient(), signed, data)) is Refusal.SELF_TEST
    assert not fleet.models.state().slots


def test_a_plan_that_nobody_trusted_signed_brings_no_model(fleet: Fleet, files: Files) -> None:
    _, signed, data = offered(fleet, files)
    recipient = replace(fleet.recipient(), signature="00" * 64)
    assert refusal(lambda: bring(recipient, signed, data)) is Refusal.UNSIGNED


@pytest.mark.parametrize(
    ("policy", "code", "said"),
    [
        ("[delivery]\naccept = false", Refusal.POLICY, "delivery.accept is false"),
        ('[allow]\ntasks = ["digits"]', Refusal.POLICY, "allow.tasks is digits"),
        ('[allow]\nmodels = ["other"]', Refusal.POLICY, "allow.models is other"),
        ("[when]\nlargest_celsius = 0.001", Refusal.NOT_NOW, ""),
    ],
)
def test_the_owner_decides_which_models_come_and_when(
    fleet: Fleet, files: Files, policy: str, code: Refusal, said: str
) -> None:
    accept_policy(fleet.device, OWNERS + policy, "test")
    _, signed, data = offered(fleet, files)
    with pytest.raises(Refused) as caught:
        bring(fleet.recipient(), signed, data)
    assert caught.value.refusal is code and said in str(caught.value.__cause__)
    assert not fleet.models.state().slots
    accept_policy(fleet.device, OWNERS, "test")
    assert bring(fleet.recipient(), signed, data) == Receipt(1, 0)


def test_a_model_larger_than_the_owner_allows_is_refused(fleet: Fleet, files: Files) -> None:
    accept_policy(fleet.device, f"{OWNERS}[delivery]\nlargest_mb = 1", "test")
    large = {**files, "model.safetensors": bytes(2**20 + 1)}
    _, signed, data = offered(fleet, large)
    assert refusal(lambda: bring(fleet.recipient(), signed, data)) is Refusal.POLICY


def test_a_model_that_leaves_too_little_disk_is_refused(fleet: Fleet, files: Files) -> None:
    free = shutil.disk_usage(fleet.device.folder).free // 2**20
    policy = OWNERS + f"spare_disk_mb = {free + 1000}\n"
    accept_policy(fleet.device, policy, "test")
    _, signed, data = offered(fleet, files)
    assert refusal(lambda: bring(fleet.recipient(), signed, data)) is Refusal.NOT_NOW


def test_a_part_that_does_not_fit_is_refused(fleet: Fleet, files: Files) -> None:
    _, signed, data = offered(fleet, files)
    for chunk, offset in ((data, 1), (b"x", len(data)), (b"x", -1), (bytes(MOST_CHUNK + 1), 0)):
        part = Part(signed, chunk, offset)
        assert refusal(lambda p=part: fleet.recipient().receive(p)) is Refusal.BAD_ORDER
    assert fleet.models.incoming.offset(offered(fleet, files)[0]) == 0


def test_damaged_content_is_found_before_it_is_parsed_and_fetched_anew(
    fleet: Fleet, files: Files
) -> None:
    _, signed, data = offered(fleet, files)
    for place in (0, PIECE, len(data) - 1):
        wrong = bytearray(data)
        wrong[place] ^= 0x10
        recipient = fleet.recipient(trial=lambda *_: pytest.fail("it was looked at"))
        assert refusal(lambda r=recipient, w=wrong: bring(r, signed, bytes(w))) is Refusal.DAMAGED
        assert receipt(fleet.recipient(), Part(signed)) == Receipt(0, 0)
    assert bring(fleet.recipient(), signed, data) == Receipt(1, 0)


# ----- the self-test -----


def broken(fleet: Fleet, folder: Path) -> Files:
    """An artifact that is signed and does not give the logits of its own self-test here."""
    files = make_artifact(fleet, folder, seed=2)
    other = make_artifact(fleet, folder.with_name("test"), seed=3)
    manifest = json.loads(files["manifest.json"])
    test = other["self_test.safetensors"]
    digest = hashlib.sha256(test).hexdigest()
    manifest["files"]["self_test.safetensors"] = {"bytes": len(test), "sha256": digest}
    text = json.dumps(manifest).encode()
    signature = fleet.key("artifacts").sign(text)
    changes = {"manifest.json": text, "manifest.sig": signature, "self_test.safetensors": test}
    return {**files, **changes}


def test_a_model_that_fails_its_self_test_leaves_the_one_before(
    fleet: Fleet, files: Files, tmp_path: Path
) -> None:
    _, signed, data = offered(fleet, files)
    bring(fleet.recipient(), signed, data)
    _, bad, more = offered(fleet, broken(fleet, tmp_path / "broken"), 2)
    with pytest.raises(Refused) as caught:
        bring(fleet.recipient(trial=try_model), bad, more)
    assert caught.value.refusal is Refusal.SELF_TEST
    assert "self test: logits differ" in str(caught.value.__cause__)
    assert (installed(fleet), load_installed(fleet.device).version) == ([1], 1)
    assert on_disk(fleet) == {"1", "state.json"}


def test_a_self_test_that_keeps_failing_is_not_tried_for_ever(fleet: Fleet, files: Files) -> None:
    tried: list[int] = []

    def failing(folder: Path, key: Path, plan: str, size: int) -> str:
        tried.append(1)
        return "it does not work"

    _, signed, data = offered(fleet, files)
    for _ in range(MOST_TRIES + 2):
        recipient = fleet.recipient(trial=failing)
        assert refusal(lambda r=recipient: bring(r, signed, data)) is Refusal.SELF_TEST
    assert len(tried) == MOST_TRIES
    _, signed, data = offered(fleet, files, 2)  # another version is another matter
    assert bring(fleet.recipient(), signed, data) == Receipt(2, 0)


def dying(words: str) -> Callable[[Path, Path, str, int], str]:
    """The self-test's process, with other code in the model's place."""

    def test(folder: Path, key: Path, plan: str, size: int) -> str:
        program = folder.parent.parent / "python"
        program.write_text(f"#!{sys.executable}\n{words}\n")
        program.chmod(0o700)
        before, sys.executable = sys.executable, str(program)
        try:
            return try_model(folder, key, plan, size, seconds=1)
        finally:
            sys.executable = before

    return test


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
        ("import os; os._exit(0)", "ended with status 0"),
        ("print('passed'); raise SystemExit(7)", "passed"),
    ],
)
def test_a_model_that_takes_its_process_down_is_not_installed(
    fleet: Fleet, files: Files, words: str, said: str
) -> None:
    _, signed, data = offered(fleet, files)
    with pytest.raises(Refused) as caught:
        bring(fleet.recipient(trial=dying(words)), signed, data)
    assert caught.value.refusal is Refusal.SELF_TEST and said in str(caught.value.__cause__)
    assert not fleet.models.state().slots


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL"),
        ("import os; os.kill(os.getpid(), 15)", "ended by SIGTERM"),
        ("import time; time.sleep(60)", "did not end within 1 s"),
        ("while True: print('x' * 999)", "did not end within 1 s"),
    ],
)
def test_a_self_test_that_the_device_cut_short_is_not_held_against_the_model(
    fleet: Fleet, files: Files, words: str, said: str
) -> None:
    offer, signed, data = offered(fleet, files)
    with pytest.raises(Refused) as caught:
        bring(fleet.recipient(trial=dying(words)), signed, data)
    assert caught.value.refusal is Refusal.NOT_NOW and said in str(caught.value.__cause__)
    state = fleet.models.state()
    assert not state.slots and on_disk(fleet) == {"state.json"}
    assert (state.tests_of(1).failed, state.tests_of(1).cut_short) == (0, 1)
    assert fleet.models.incoming.offset(offer) == len(data)  # it need not be sent again


def test_a_self_test_that_cannot_be_started_is_not_held_against_the_model(
    fleet: Fleet, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, signed, data = offered(fleet, files)
    monkeypatch.setattr(sys, "executable", str(fleet.device.folder / "none"))
    assert refusal(lambda: bring(fleet.recipient(trial=try_model), signed, data)) is Refusal.NOT_NOW
    assert fleet.models.state().tests_of(1).failed == 0


def cut_short(folder: Path, key: Path, plan: str, size: int) -> str:
    raise CutShort("the self-test was ended by SIGKILL")


def test_after_a_test_that_was_cut_short_there_is_a_pause_and_never_an_end(
    fleet: Fleet, files: Files
) -> None:
    _, signed, data = offered(fleet, files)

    def at(seconds: float, **changes: Any) -> Any:
        moment = datetime(2026, 1, 1) + timedelta(seconds=seconds)
        return fleet.recipient(now=lambda: moment, **changes)

    seconds, waited = 0.0, list[float]()
    for _ in range(7):
        recipient = at(seconds, trial=cut_short)
        assert refusal(lambda r=recipient: bring(r, signed, data)) is Refusal.NOT_NOW
        pause = fleet.models.state().tests_of(1).pause
        for later in (0, pause - 1):
            recipient = at(seconds + later, trial=lambda *_: pytest.fail("too soon"))
            with pytest.raises(Refused) as caught:
                recipient.receive(Part(signed))
            assert caught.value.refusal is Refusal.NOT_NOW
            assert "came to no end" in str(caught.value.__cause__)
        seconds += pause
        waited.append(pause / 60)
    assert waited == [10, 40, 160, 640, 1440, 1440, 1440]
    assert receipt(at(seconds), Part(signed)) == Receipt(1, 0)
    assert fleet.models.state().tried == ()


def test_a_clock_that_was_set_back_does_not_put_a_self_test_off_for_years(
    fleet: Fleet, files: Files
) -> None:
    _, signed, data = offered(fleet, files)
    ahead = fleet.recipient(trial=cut_short, now=lambda: datetime(2036, 1, 1))
    assert refusal(lambda: bring(ahead, signed, data)) is Refusal.NOT_NOW
    right = fleet.recipient(now=lambda: datetime(2026, 1, 1))
    assert bring(right, signed, data) == Receipt(1, 0)


def test_what_a_full_disk_does_is_not_held_against_the_model(
    fleet: Fleet, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _, signed, data = offered(fleet, files)
    with monkeypatch.context() as context:
        context.setattr(Models, "_unpack", full)
        for _ in range(MOST_TRIES + 1):
            with pytest.raises(Refused) as caught:
                bring(fleet.recipient(), signed, data)
            assert caught.value.refusal is Refusal.NOT_STORED
            assert "cannot be stored: No space left" in str(caught.value.__cause__)
    assert bring(fleet.recipient(), signed, data) == Receipt(1, 0)


def test_a_model_waits_for_the_memory_that_its_self_test_needs(
    fleet: Fleet, files: Files, tmp_path: Path
) -> None:
    _, signed, data = offered(fleet, files)
    needed = needed_of(len(data)) + 2 * len(data)
    (tmp_path / "proc").mkdir()

    def having(free: int) -> Any:
        text = f"MemAvailable: {-(-free // 1024)} kB\n"
        (tmp_path / "proc/meminfo").write_text(text)
        return fleet.recipient(memory=Memory(tmp_path))

    assert refusal(lambda: bring(having(needed - 2048), signed, data)) is Refusal.NOT_NOW
    assert bring(having(needed), signed, data) == Receipt(1, 0)


def test_a_self_test_may_take_so_much_memory_and_no_more(
    fleet: Fleet, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = fleet.device.key_file("artifacts")
    monkeypatch.setattr(trials, "_MOST_LIBRARIES", 32 * 2**20)
    # What Python or torch says of it depends on who asked for the memory.
    said = try_model(tmp_path / "artifact", key, PLAN.digest, 1000)
    assert any(word in said for word in ("MemoryError", "SIGABRT", "SIGSEGV", "memory"))


def test_a_model_for_a_backend_that_refuses_its_self_test_cannot_be_made(
    fleet: Fleet, tmp_path: Path
) -> None:
    wrong = SelfTest(torch.zeros(2, 4), torch.full((2, 3), 99.0))
    with pytest.raises(ArtifactError, match="self test"):
        make_artifact(fleet, tmp_path / "wrong", self_test=wrong)


# ----- what is damaged on the device -----


def test_a_current_model_that_is_damaged_is_not_used_but_the_one_before(
    fleet: Fleet, files: Files, newer: Files
) -> None:
    for version, content in ((1, files), (2, newer)):
        _, signed, data = offered(fleet, content, version)
        bring(fleet.recipient(), signed, data)
    (fleet.models.path(2) / "model.json").write_bytes(b"{}")
    used = load_installed(fleet.device)
    assert used.version == 1 and used.problem.startswith("model 2: ")
    # The same version comes again, whole: this is no downgrade.
    assert bring(fleet.recipient(), signed, data) == Receipt(2, 0)
    assert load_installed(fleet.device).problem == "" and installed(fleet) == [2, 1]


def test_a_damaged_model_is_not_kept_as_the_last_good_one(
    fleet: Fleet, files: Files, newer: Files
) -> None:
    for version, content in ((1, files), (2, newer)):
        _, signed, data = offered(fleet, content, version)
        bring(fleet.recipient(), signed, data)
    shutil.rmtree(fleet.models.path(2))
    _, signed, data = offered(fleet, files, 3)
    bring(fleet.recipient(), signed, data)
    assert installed(fleet) == [3, 1]


def test_without_a_model_there_is_nothing_to_predict_with(fleet: Fleet, files: Files) -> None:
    with pytest.raises(ArtifactError, match="holds no model"):
        load_installed(fleet.device)
    _, signed, data = offered(fleet, files)
    bring(fleet.recipient(), signed, data)
    shutil.rmtree(fleet.models.path(1))
    with pytest.raises(ArtifactError, match="model 1: "):
        load_installed(fleet.device)


def test_a_damaged_record_is_said_and_not_guessed_around(fleet: Fleet, files: Files) -> None:
    _, signed, data = offered(fleet, files)
    bring(fleet.recipient(), signed, data)
    (fleet.device.models / "state.json").write_text('{"slots": []}')
    with pytest.raises(ArtifactError, match=r"state\.json: damaged"):
        fleet.recipient().receive(Part(signed))
    assert "damaged" in device_status(fleet.device, utc_now())["model"]["problem"]
    assert fleet.models.path(1).is_dir()  # nothing was cleared away on such a record


# ----- a full disk -----


def limited(limit: int, do: Callable[[], object]) -> int:
    """Do something in a process whose files may not grow beyond ``limit``; return its status."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            do()
        except Refused as refused:
            os._exit(refused.refusal - 1000)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_full_disk_leaves_the_model_and_what_has_arrived(
    fleet: Fleet, files: Files, newer: Files
) -> None:
    _, signed, data = offered(fleet, files)
    bring(fleet.recipient(), signed, data)
    offer, signed, data = offered(fleet, newer, 2)
    status = limited(2 * PIECE + 10, lambda: bring(fleet.recipient(), signed, data))
    assert status == Refusal.NOT_STORED - 1000
    assert fleet.models.incoming.offset(offer) == 2 * PIECE
    assert (installed(fleet), load_installed(fleet.device).version) == ([1], 1)
    assert bring(fleet.recipient(), signed, data) == Receipt(2, 0)


# ----- offers and receipts -----


def test_an_offer_and_a_receipt_come_back_as_they_were_sent(fleet: Fleet, files: Files) -> None:
    offer, signed, data = offered(fleet, files, 7)
    assert open_offer(fleet.key("artifacts").public_key(), signed) == offer
    assert len(signed) < MOST_OFFER and offer.cut(data) == files
    for given in (Receipt(0, 0), Receipt(7, 12345)):
        assert len(given.encode()) == RECEIPT_BYTES and Receipt.decode(given.encode()) == given
    for wrong in (
        b"",
        bytes(RECEIPT_BYTES),
        Receipt(1, MOST_MODEL + 1).encode(),
        b"\1" + b"\xff" * 16,
    ):
        with pytest.raises(PayloadError):
            Receipt.decode(wrong)


@pytest.mark.parametrize("name", ["../x", "/x", "", ".x", "a/b", "x" * 65, "a\0"])
def test_an_offer_holds_no_names_that_lead_elsewhere(name: str) -> None:
    with pytest.raises(ArtifactError, match="no name of a file"):
        offer_of(1, "ab" * 32, {name: b"x"})


def test_offers_that_take_turns_do_not_make_the_device_forget_which_failed(
    fleet: Fleet, files: Files, newer: Files
) -> None:
    tried: list[str] = []

    def failing(folder: Path, key: Path, plan: str, size: int) -> str:
        tried.append(folder.name)
        return "it does not work"

    for _ in range(MOST_TRIES + 2):
        for version, content in ((1, files), (2, newer)):
            _, signed, data = offered(fleet, content, version)
            with pytest.raises(Refused):
                bring(fleet.recipient(trial=failing), signed, data)
    assert sorted(tried) == ["1"] * MOST_TRIES + ["2"] * MOST_TRIES


def test_a_state_remembers_the_tests_of_the_versions_that_were_tried_last() -> None:
    state = State()
    for version in (*range(1, MOST_TRIED + 3), 4):
        state = state.having(Tried(version, state.tests_of(version).failed + 1))
    assert [one.version for one in state.tried] == [3, *range(5, MOST_TRIED + 3), 4]
    assert state.tests_of(4) == Tried(4, 2)
    assert state.tests_of(99) == Tried(99)
    data = json.dumps(asdict(state)).encode()
    assert parse_state(data) == state and len(data) < 4096


def test_a_record_of_an_earlier_version_is_read() -> None:
    text = '{"slots": [], "highest": 3, "tried": %d, "tries": 2}'
    assert parse_state((text % 4).encode()) == State((), 3, (Tried(4, 2),))
    assert parse_state((text % 0).encode()) == State((), 3)


@pytest.mark.parametrize(
    "tried",
    [
        "3",
        "[3]",
        '[{"version": 1}]',
        '[{"version": 0, "failed": 0, "cut_short": 0, "at": 0.0}]',
        '[{"version": 1, "failed": -1, "cut_short": 0, "at": 0.0}]',
        '[{"version": 1, "failed": 0, "cut_short": true, "at": 0.0}]',
        '[{"version": 1, "failed": 0, "cut_short": 0, "at": 1e999}]',
        str([{"version": n + 1, "failed": 1, "cut_short": 0, "at": 0.0} for n in range(9)]),
    ],
)
def test_a_damaged_record_of_tests_is_said(tried: str) -> None:
    text = f'{{"slots": [], "highest": 3, "tried": {tried}}}'.replace("'", '"')
    with pytest.raises(ArtifactError, match="damaged"):
        parse_state(text.encode())


def test_another_task_of_the_same_server_has_its_own_plan(fleet: Fleet, files: Files) -> None:
    other = parse_plan("", ["seed=5"])
    _, signed, data = offered(fleet, files)
    assert refusal(lambda: bring(fleet.recipient(other), signed, data)) is Refusal.WRONG_PLAN
    assert installed(fleet) == []
