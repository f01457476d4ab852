"""Changes instead of models: everybody trains on one model, and errors do not add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict

from reticent.client.downlink import MODEL, ModelMissing, changed, remember
from reticent.compression.codec import build_codec
from reticent.core.errors import PayloadError, PlanError
from reticent.core.plan import Plan, parse_plan
from reticent.core.update import Layout, Vector, vector_digest
from reticent.server.downlink import Downlink
from reticent.simulations.simulate import simulate

LAYOUT = Layout(("w", "b"), ((90, 10), (20,)))
SIZE = LAYOUT.size
CODEC = build_codec(("int4", "ans"))
SMALL = [
    "task.name=digits",
    "task.clients=4",
    "task.public_examples=100",
    "teacher.epochs=1",
    "student.epochs=1",
    "federation.clients_per_round=4",
    "federation.rounds=3",
    "engine.workers=1",
]


def plan_of(*overrides: str) -> Plan:
    return parse_plan("", [*SMALL, 'updates.delta=["int4", "ans"]', *overrides])


def models(rounds: int) -> list[Vector]:
    """A model that moves by a hundredth of its scale in every round."""
    generator = np.random.default_rng(0)
    steps = 0.01 * generator.normal(size=(rounds, SIZE))
    return list((generator.normal(size=SIZE) + np.cumsum(steps, axis=0)).astype(np.float32))


def test_a_device_that_follows_changes_has_the_model_of_one_that_gets_it_whole() -> None:
    downlink, held, state = Downlink(plan_of(), LAYOUT), None, RecordDict()
    whole = build_codec(("identity",))
    errors, sizes = [], []
    for number, weights in enumerate(models(30), 1):
        sent = downlink.broadcast(weights, held, number)
        assert sent.model is not None
        fresh = whole.decode(sent.whole, LAYOUT.blocks)
        assert vector_digest(fresh) == vector_digest(sent.model)
        if sent.change is None:
            remember(state, fresh)
        else:
            model = changed(CODEC, sent.change, sent.marks, LAYOUT.blocks, state)
            assert vector_digest(model) == vector_digest(sent.model)
            remember(state, model)
            sizes.append(len(sent.change))
            errors.append(float(np.linalg.norm(sent.model - weights)))
        held = sent.model
    # As far off after 29 changes as after a few, and within what one change of four bits loses.
    assert np.mean(errors[-5:]) < 1.3 * np.mean(errors[5:10])
    assert max(errors) < 0.01 * np.sqrt(SIZE)
    assert np.mean(sizes) < 0.15 * 4 * SIZE


def test_changes_against_the_servers_own_models_would_drift() -> None:
    """The control: without what earlier changes lost, errors add up as a random walk does."""
    drifted, last, generator = models(30)[0], models(30)[0], np.random.default_rng(1)
    errors = []
    for weights in models(30)[1:]:
        payload = CODEC.encode(weights - last, LAYOUT.blocks, generator)
        drifted = drifted + CODEC.decode(payload, LAYOUT.blocks)
        last = weights
        errors.append(float(np.linalg.norm(drifted - weights)))
    assert np.mean(errors[-5:]) > 1.5 * np.mean(errors[5:10])


def one_change() -> tuple[RecordDict, bytes, bytes, Vector]:
    downlink, (first, second) = Downlink(plan_of(), LAYOUT), models(2)
    sent = downlink.broadcast(second, first, 2)
    assert sent.change is not None and sent.model is not None
    state = RecordDict()
    remember(state, first)
    return state, sent.change, sent.marks, sent.model


def test_a_device_that_has_the_model_already_keeps_it() -> None:
    state, payload, marks, model = one_change()
    remember(state, model)
    assert np.array_equal(changed(CODEC, payload, marks, LAYOUT.blocks, state), model)


def test_a_device_without_the_model_says_so_and_damage_is_refused() -> None:
    state, payload, marks, _ = one_change()
    other = RecordDict()
    remember(other, models(1)[0] + 1)
    for without in (other, RecordDict()):
        with pytest.raises(ModelMissing):
            changed(CODEC, payload, marks, LAYOUT.blocks, without)
    with pytest.raises(PayloadError, match="must have 64"):
        changed(CODEC, payload, marks[:-1], LAYOUT.blocks, state)
    with pytest.raises(PayloadError, match="another model"):
        changed(CODEC, payload, marks[:32] + bytes(32), LAYOUT.blocks, state)
    with pytest.raises(PayloadError):
        changed(CODEC, payload[:-1], marks, LAYOUT.blocks, state)


def test_without_changes_the_broadcast_is_the_plans_and_no_model_is_kept() -> None:
    plan = parse_plan("", SMALL)
    sent = Downlink(plan, LAYOUT).broadcast(models(1)[0], None, 1)
    assert (sent.change, sent.marks, sent.model) == (None, b"", None)
    decoded = build_codec(plan.updates.broadcast).decode(sent.whole, LAYOUT.blocks)
    assert decoded.shape == (SIZE,)


def test_a_plan_whose_clients_would_rarely_hold_the_last_model_is_refused() -> None:
    with pytest.raises(PlanError, match=r"updates\.delta=.*hardly any client"):
        plan_of("task.clients=8")
    plan_of("task.clients=7")


def finished(folder: Path, *overrides: str) -> tuple[bytes, list[dict[str, Any]]]:
    run = simulate(plan_of(*overrides), folder)
    kept = sorted(run.checkpoints.glob("round-*.safetensors"))
    return b"".join(path.read_bytes() for path in kept), run.read_metrics()


def test_a_run_sends_whole_models_once_and_changes_afterwards(tmp_path: Path) -> None:
    model, rounds = finished(tmp_path / "a")
    again, _ = finished(tmp_path / "b")
    assert again == model
    down = [r["bytes_down"] for r in rounds]
    assert down[1] < 0.2 * down[0]
    assert all(r["dropped"] == {} for r in rounds)


def test_a_device_that_lost_its_model_gets_a_whole_one_in_the_same_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = finished(tmp_path / "a")
    from reticent.simulations.workers import Site

    answer = Site.answer_many

    def forgetful(self: Site, messages: Any) -> Any:
        for message in messages:  # one by one, as each forgets what the one before it learned
            if message.metadata.group_id == "2":
                self._state.pop(MODEL, None)
            yield from answer(self, [message])

    monkeypatch.setattr(Site, "answer_many", forgetful)
    with_loss, rounds = finished(tmp_path / "b")
    assert with_loss == model
    assert rounds[1]["dropped"] == {
        "the client does not hold the model that a change is against": 4
    }
    assert rounds[1]["replies"] == 4


class Stop(Exception):
    pass


def interrupted(folder: Path, *overrides: str) -> tuple[bytes, list[dict[str, Any]]]:
    """Return what :func:`finished` does, of a run that was stopped after its second round."""

    def stop(metrics: dict[str, Any]) -> None:
        if metrics["round"] == 2:
            raise Stop

    with pytest.raises(Stop):
        simulate(plan_of(*overrides), folder, progress=stop)
    run = simulate(plan_of(*overrides), folder, resume=True)
    kept = sorted(run.checkpoints.glob("round-*.safetensors"))
    return b"".join(path.read_bytes() for path in kept), run.read_metrics()


def test_a_run_that_was_stopped_goes_on_to_the_same_bits_with_changes_and_feedback(
    tmp_path: Path,
) -> None:
    fed = [
        "privacy.trust=local",
        "privacy.noise_multiplier=1.0",
        'updates.codec=["topk:0.05", "ans"]',
        "updates.error_feedback=true",
    ]
    model, _ = finished(tmp_path / "a", *fed)
    again, rounds = interrupted(tmp_path / "b", *fed)
    assert again == model
    # Nobody is known to hold a model any more, so all get whole ones again.
    down = [r["bytes_down"] for r in rounds]
    assert down[1] < 0.2 * down[0] and down[2] == down[0]


def test_a_run_that_was_stopped_goes_on_to_the_same_bits_where_not_all_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some then get a change and some a whole model; whom they train with must not follow."""
    from reticent.client import round as client_round

    some = [
        *("task.clients=8", "federation.clients_per_round=6", "federation.rounds=4"),
        *("privacy.unit=client", "privacy.epsilon=100", "federation.steps_per_round=2"),
        'updates.codec=["hadamard", "int4", "ans"]',
    ]
    sizes: list[int] = []
    run_alike = client_round._run_alike

    def counted(block: Any) -> Any:
        sizes.append(len(block.requests))
        return run_alike(block)

    monkeypatch.setattr(client_round, "_run_alike", counted)
    model, rounds = finished(tmp_path / "a", *some)
    assert any(r["bytes_down"] not in (rounds[0]["bytes_down"], 0) for r in rounds[1:])
    assert set(sizes) == {6}
    again, _ = interrupted(tmp_path / "b", *some)
    assert again == model
