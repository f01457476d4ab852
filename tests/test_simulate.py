"""Whole federations: reproducible, resumable, equal to plain averaging when all is off."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from reticent.client.training import student_model, trained_alone
from reticent.core.errors import LedgerError, NetworkError, PlanError, RunError
from reticent.core.plan import Plan, parse_plan
from reticent.core.run import Run, create_run, open_run
from reticent.core.tasks import load_task
from reticent.core.update import Layout, vector_digest
from reticent.privacy.ledger import Ledger
from reticent.privacy.randomness import SeededRandomness
from reticent.privacy.report import collect
from reticent.server.export import finished_run
from reticent.server.journal import Journal
from reticent.server.preparation import Prepared
from reticent.simulations.admission import check_codecs
from reticent.simulations.grid import InProcessGrid
from reticent.simulations.runs import describe
from reticent.simulations.simulate import simulate

SMALL = [
    "task.name=digits",
    "task.clients=6",
    "task.public_examples=200",
    "teacher.epochs=1",
    "student.epochs=2",
    "federation.clients_per_round=6",
    "federation.rounds=4",
    "federation.sampling_rate=0.2",
    "engine.workers=1",
]


def plan_of(*overrides: str) -> Plan:
    return parse_plan("", [*SMALL, *overrides])


class Stopped(Exception):
    """Stands for a crash: raised where a process could have been killed."""


def stop_after(rounds: int) -> Any:
    def progress(metrics: dict[str, Any]) -> None:
        if metrics["round"] == rounds:
            raise Stopped

    return progress


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return simulate(plan_of(), tmp_path_factory.mktemp("finished") / "run")


def final_weights(run: Run) -> np.ndarray:
    journal = Journal(run)
    try:
        state = journal.latest()
        assert state is not None
        return state.average
    finally:
        journal.close()


def test_a_run_holds_what_the_design_names(finished: Run) -> None:
    names = {p.name for p in finished.folder.iterdir()}
    assert {"plan.toml", "metrics.jsonl", "journal.db", "ledger", "checkpoints"} <= names
    assert {"artifact", "keys", "summary.json"} <= names
    summary = finished.read_summary()
    assert summary["model"] == vector_digest(final_weights(finished))
    assert len(finished.read_metrics()) == 4
    assert summary["privacy"]["epsilon"] <= 8.0
    assert summary["privacy"]["server_epsilon"] > summary["privacy"]["epsilon"]


def test_the_same_seed_gives_the_same_model(finished: Run, tmp_path: Path) -> None:
    again = simulate(plan_of(), tmp_path / "again")
    other = simulate(plan_of("seed=1"), tmp_path / "other")
    assert again.read_summary()["model"] == finished.read_summary()["model"]
    assert other.read_summary()["model"] != finished.read_summary()["model"]


def test_plans_that_begin_alike_are_prepared_once_and_end_as_alone(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = Prepared()
    simulate(plan_of("privacy.epsilon=2"), tmp_path / "first", prepared=prepared)
    monkeypatch.setattr("reticent.server.preparation.lesson", None)  # would fail if it were asked
    again = simulate(plan_of(), tmp_path / "again", prepared=prepared)
    assert again.read_summary()["model"] == finished.read_summary()["model"]
    changed = ("student.prune.kind=none", "federation.rounds=1")
    simulate(plan_of(*changed), tmp_path / "dense", prepared=prepared)
    few = plan_of(*changed, "student.quantize.bits=4")
    shared = simulate(few, tmp_path / "few", prepared=prepared)
    assert (len(prepared.starts), len(prepared.lessons), len(prepared.teachers)) == (2, 1, 1)
    monkeypatch.undo()
    alone = simulate(few, tmp_path / "alone")
    assert shared.read_summary()["model"] == alone.read_summary()["model"]
    simulate(plan_of("student.epochs=1"), tmp_path / "other", prepared=prepared)
    assert (len(prepared.starts), len(prepared.lessons), len(prepared.teachers)) == (3, 2, 1)
    dynamic = plan_of("student.quantize.kind=dynamic")
    with pytest.raises(PlanError, match="dynamic"):
        simulate(dynamic, tmp_path / "dynamic", prepared=prepared)


def test_worker_processes_give_the_same_model(finished: Run, tmp_path: Path) -> None:
    run = simulate(plan_of("engine.workers=2"), tmp_path / "two")
    assert run.read_summary()["model"] == finished.read_summary()["model"]
    with Ledger.open(run.ledger) as ledger:
        assert len(ledger.devices()) == 6
        ledger.verify()


def test_worker_processes_give_the_same_model_after_several_local_steps(tmp_path: Path) -> None:
    """Clients then have weights of their own, and pass through a step together."""
    several = ("privacy.trust=local", "federation.steps_per_round=3", "federation.rounds=2")
    one = simulate(plan_of(*several), tmp_path / "one")
    two = simulate(plan_of(*several, "engine.workers=2"), tmp_path / "two")
    assert one.read_summary()["model"] == two.read_summary()["model"]


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_resumed_run_ends_bit_for_bit_like_one_that_was_never_stopped(
    finished: Run, tmp_path: Path, rounds: int
) -> None:
    folder = tmp_path / "stopped"
    with pytest.raises(Stopped):
        simulate(plan_of(), folder, progress=stop_after(rounds))
    run = simulate(plan_of(), folder, resume=True)
    assert (final_weights(run) == final_weights(finished)).all()
    assert run.read_summary()["model"] == finished.read_summary()["model"]
    with Ledger.open(run.ledger) as ledger, Ledger.open(finished.ledger) as twin:
        assert [r.epsilon for r in ledger.summary(1e-5)] == [
            r.epsilon for r in twin.summary(1e-5)
        ], "resuming must not charge a round twice"


def test_a_changed_plan_is_refused_on_resume(finished: Run) -> None:
    with pytest.raises(RunError, match=r"federation.rounds \(4 before, 5 now\)"):
        simulate(plan_of("federation.rounds=5"), finished.folder, resume=True)


def test_a_used_run_directory_is_refused(finished: Run) -> None:
    with pytest.raises(RunError, match="already exists"):
        simulate(plan_of(), finished.folder)


@pytest.mark.parametrize(
    ("first", "then"),
    [("flower-ray", "inprocess"), ("inprocess", "flower-ray"), ("ray", "flower-ray")],
)
def test_a_run_is_not_resumed_where_nodes_have_other_names(
    first: str, then: str, tmp_path: Path
) -> None:
    """Rounds would be counted under two names for one client, and epsilon come out too small."""
    create_run(tmp_path / "run", plan_of(f"engine.kind={first}"))
    with pytest.raises(RunError, match="cannot be resumed"):
        simulate(plan_of(f"engine.kind={then}"), tmp_path / "run", resume=True)


def test_epsilon_so_far_counts_who_really_took_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes of six are connected, so both take part in every round of a pass of three."""
    everyone = InProcessGrid.get_node_ids
    monkeypatch.setattr(InProcessGrid, "get_node_ids", lambda grid: list(everyone(grid))[:2])
    plan = plan_of(
        "federation.clients_per_round=2",
        "federation.rounds=6",
        "federation.eval_every=5",
        "federation.timeout=1.0",
    )
    with pytest.raises(NetworkError, match="fewer than the 2 rounds"):
        simulate(plan, tmp_path / "run")
    run = Run(tmp_path / "run")
    with Ledger.open(run.ledger) as ledger:
        spent = ledger.spent("client-0", 1e-5)
    assert [m["round"] for m in run.read_metrics()] == [1, 2]
    assert run.read_metrics()[-1]["epsilon"] == pytest.approx(spent)


def test_a_summary_of_fewer_rounds_goes_once_the_run_goes_on(tmp_path: Path) -> None:
    plan, folder = plan_of("federation.rounds=2"), tmp_path / "run"
    with pytest.raises(Stopped):
        simulate(plan, folder, progress=stop_after(1))
    Run(folder).summary.write_text('{"rounds": 1, "stopped": {"round": 2}}')
    there, summary = list[bool](), Run(folder).summary
    simulate(plan, folder, resume=True, progress=lambda _: there.append(summary.exists()))
    assert there == [False] and "stopped" not in Run(folder).read_summary()


def test_an_altered_checkpoint_is_refused_on_resume(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        simulate(plan_of(), folder, progress=stop_after(2))
    latest = sorted((folder / "checkpoints").glob("round-*"))[-1]
    data = bytearray(latest.read_bytes())
    data[-1] ^= 1
    latest.write_bytes(bytes(data))
    with pytest.raises(RunError, match="truncated or altered"):
        simulate(plan_of(), folder, resume=True)


def test_a_ledger_that_was_rolled_back_is_refused_on_resume(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        simulate(plan_of(), folder, progress=stop_after(2))
    for file in (folder / "ledger").iterdir():
        file.unlink()
    with pytest.raises(LedgerError, match="rolled back, truncated or replaced"):
        simulate(plan_of(), folder, resume=True)


def test_an_altered_plan_in_the_run_directory_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        simulate(plan_of(), folder, progress=stop_after(1))
    plan_file = folder / "plan.toml"
    plan_file.write_text(plan_file.read_text().replace("rounds = 4", "rounds = 3"))
    with pytest.raises(RunError, match="altered"):
        open_run(folder).plan()


def test_a_run_that_is_to_go_on_with_another_device_is_told_that_it_differs_there(
    tmp_path: Path,
) -> None:
    """And at nothing else of the engine, which cannot change its bits."""
    plan = plan_of("engine.workers=1")
    folder = create_run(tmp_path / "run", plan).folder
    open_run(folder, plan_of("engine.workers=2"))
    with pytest.raises(RunError, match=r"differs at engine\.device \(cpu before, cuda now\)$"):
        open_run(folder, plan_of("engine.device=cuda", "engine.prefetch=false"))


def test_devices_stop_at_their_budget_and_the_run_ends_with_the_reason(tmp_path: Path) -> None:
    plan = plan_of("privacy.budget=7.0", "federation.retries=0")
    with pytest.raises(NetworkError, match="6 x the privacy budget of the device"):
        simulate(plan, tmp_path / "run")
    rounds = len(Run(tmp_path / "run").read_metrics())
    assert 0 < rounds < 4
    with Ledger.open(tmp_path / "run" / "ledger") as ledger:
        assert max(ledger.spent(d, 1e-5) for d in ledger.devices()) <= 7.0
    # What was spent is reported, and what it bought is there.
    assert Run(tmp_path / "run").read_summary()["stopped"]["round"] == rounds + 1
    assert (tmp_path / "run" / "artifact" / "manifest.json").is_file()
    with finished_run(Run(tmp_path / "run")) as (_, state):  # it can be exported, and measured
        assert state.round == rounds
    data = collect(Run(tmp_path / "run"))
    assert (data["run"]["rounds"], data["spent"]["refusals"]) == (rounds, 6)
    assert data["spent"]["maximum"] <= 7.0
    require_one_epsilon(Run(tmp_path / "run"))  # what the ledger refused was not spent


def require_one_epsilon(run: Run) -> None:
    """The summary, ``reticent runs`` and the report say the same of who spent most."""
    data, found = collect(run), run.read_summary()["privacy"]
    against = {row["name"]: row["epsilon"] for row in data["adversaries"]}
    assert found["epsilon"] == against["Readers of the models"] == data["spent"]["maximum"]
    assert found["server_epsilon"] == against["The server"]
    shown = describe(run.folder)
    assert (shown["epsilon"], shown["server_epsilon"]) == (
        found["epsilon"],
        found["server_epsilon"],
    )


def test_the_epsilon_of_a_whole_run_is_that_of_its_report(finished: Run) -> None:
    require_one_epsilon(finished)


def test_the_public_baseline_is_not_touched_by_the_rounds(tmp_path: Path) -> None:
    run = simulate(plan_of("student.prune.kind=none", "federation.rounds=2"), tmp_path / "run")
    found = run.read_summary()["accuracy"]
    assert abs(found["public_only_int8"] - found["public_only"]) < 0.03
    assert abs(found["fp32"] - found["public_only"]) > 0.03, "the rounds changed nothing"


PLAIN = [
    "privacy=off",
    "student.prune.kind=none",
    "student.quantize.kind=none",
    "student.distill.kind=none",
    'updates.codec=["identity"]',
    'updates.broadcast=["identity"]',
    "federation.average=0.0",
    "federation.server.kind=sgd",
    "federation.server.momentum=0.0",
    "federation.server.learning_rate=0.1",
    "federation.learning_rate=0.1",
    "federation.steps_per_round=3",
]


def federated_averaging(plan: Plan, start: np.ndarray) -> np.ndarray:
    """Federated averaging as in McMahan et al. 2017, written by hand with nothing of ours but data.

    Every client runs ``steps`` SGD steps from the global model on its Poisson batches; the new
    global model is the mean of the clients' models.
    """
    task, federation = load_task(plan.task, plan.seed), plan.federation
    model = student_model(task, plan)
    layout = Layout.of(model)
    randomness = SeededRandomness(plan.seed)
    denominator = federation.sampling_rate * task.nominal_examples
    rate = federation.learning_rate
    world = start
    for number in range(1, federation.rounds + 1):
        moves = np.zeros(layout.size)
        for client in range(task.clients):
            examples, local = task.client(client), world
            moved = np.zeros(layout.size)
            for step in range(federation.steps_per_round):
                stream = randomness.stream("batch", plan.digest[:16], client, number, step)
                batch = stream.uniform(len(examples.labels)) < federation.sampling_rate
                layout.write(model, local)
                model.zero_grad()
                loss = F.cross_entropy(
                    model(examples.inputs[batch]), examples.labels[batch], reduction="sum"
                )
                loss.backward()
                gradient = layout.gather([p.grad for p in model.parameters()])  # type: ignore[misc]
                moved += gradient.astype(np.float64) / denominator
                local = (local - rate * gradient.astype(np.float64) / denominator).astype(
                    np.float32
                )
            moves += moved.astype(np.float32)
        world = (world - rate * (moves / task.clients)).astype(np.float32)
    return world


def test_with_everything_off_it_is_federated_averaging_exactly(tmp_path: Path) -> None:
    plan = plan_of(*PLAIN)
    # In common passes torch would add up the same numbers in another order.
    assert "to the bit" in (trained_alone(plan, load_task(plan.task, plan.seed)) or "")
    run = simulate(plan, tmp_path / "run")
    journal = Journal(run)
    start = student_model(load_task(plan.task, plan.seed), plan)
    arrays = journal.restore("start")
    journal.close()
    assert arrays is not None
    start.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in arrays.items()})
    torch.set_num_threads(1)
    expected = federated_averaging(plan, Layout.of(start).read(start))
    assert (final_weights(run) == expected).all()
    assert run.read_summary()["privacy"]["epsilon"] == "infinity"


@pytest.mark.parametrize("codec", [["int4", "ans"], ["int8"], ["topk"], ["topk:0.05", "zstd"]])
def test_codecs_whose_error_depends_on_the_value_need_local_trust(codec: list[str]) -> None:
    chosen = f"updates.codec={json.dumps(codec)}"
    with pytest.raises(PlanError, match="error depends on the value"):
        check_codecs(plan_of(chosen))
    check_codecs(plan_of(chosen, "privacy.trust=local"))
    check_codecs(plan_of(chosen, "privacy=off"))


@pytest.mark.parametrize("codec", [["dither4", "ans"], ["dither8"], ["identity", "zstd"]])
def test_codecs_with_independent_error_are_admitted_under_aggregator_trust(
    codec: list[str],
) -> None:
    check_codecs(plan_of(f"updates.codec={json.dumps(codec)}"))


@pytest.mark.parametrize("codec", [["int4", "ans"], ["int8", "zstd"], ["topk:0.5"], ["dither8"]])
def test_every_codec_runs_under_local_trust(codec: list[str], tmp_path: Path) -> None:
    plan = plan_of(
        "privacy.trust=local",
        "federation.rounds=1",
        "federation.steps_per_round=2",
        f"updates.codec={json.dumps(codec)}",
    )
    run = simulate(plan, tmp_path / "run")
    summary = run.read_summary()
    assert summary["privacy"]["epsilon"] == summary["privacy"]["server_epsilon"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["student.model=tiny-gn"],
        ["student.distill.local_weight=0.3"],
        ["task.partition.kind=dirichlet", "task.partition.alpha=0.3"],
        ["task.partition.kind=shards"],
    ],
)
def test_variants_run_to_the_end(overrides: list[str], tmp_path: Path) -> None:
    run = simulate(plan_of("federation.rounds=1", *overrides), tmp_path / "run")
    assert run.read_summary()["agreement"]["fake_quantized"] > 0.97


def test_a_million_clients_cost_memory_only_for_the_cohort(tmp_path: Path) -> None:
    plan = plan_of(
        "task.clients=1000000",
        "task.partition.examples_per_client=20",
        "federation.rounds=2",
    )
    tracemalloc.start()
    try:
        run = simulate(plan, tmp_path / "run")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 150e6
    assert sum(m["replies"] for m in run.read_metrics()) == 12


def test_replies_are_computed_as_they_are_consumed() -> None:
    """Memory does not depend on the cohort: nothing is computed ahead of the window."""
    answered: list[int] = []

    class Backend:
        window = 2

        def answer(self, messages: list[Any]) -> Any:
            for message in messages:
                answered.append(message.metadata.dst_node_id)
                yield message

    from flwr.app import RecordDict

    from reticent.simulations.grid import enter_task

    enter_task()
    grid = InProcessGrid(10, Backend())
    messages = (
        grid.create_message(RecordDict(), "train", node, "1") for node in grid.get_node_ids()
    )
    replies = iter(grid.send_and_receive(messages))
    next(replies)
    assert len(answered) == 1
    assert len(list(replies)) == 9
