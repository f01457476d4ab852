"""Sinks: what goes in, once, whatever stops the run between; with the real packages."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from report_runs import PLAN, build

from reticent.core.errors import DependencyError
from reticent.core.plan import parse_plan
from reticent.core.run import Run
from reticent.simulations.sinks import Feed, values_of
from reticent.simulations.sinks.mlflow import MLflow
from reticent.simulations.sinks.sink import date_of, final_values, parameters_of
from reticent.simulations.sinks.tensorboard import TensorBoard

SUMMARY = {
    "accuracy": {"fp32": 0.8, "public_only": math.nan},
    "bytes": {"int8": 17_200},
    "privacy": {"epsilon": 2.0, "server_epsilon": "infinity"},
}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = build(tmp_path / "run")
    lines = [json.loads(line) | {"seconds": 0.5} for line in made.metrics.read_text().splitlines()]
    made.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return made


def rounds(run: Run) -> list[dict[str, Any]]:
    return run.read_metrics()


def test_only_released_and_public_values_go_in(run: Run) -> None:
    values = values_of(rounds(run)[1], run.plan())
    assert set(values) == {"accuracy", "epsilon", "bytes_up", "bytes_down", "replies"}
    assert values["bytes_up"] == 12_000  # 11,102 under aggregator trust: two figures, rounded up
    assert "seconds" not in values  # how long clients took is not noised
    assert set(values_of(rounds(run)[0], run.plan())) == {
        "epsilon",
        "bytes_up",
        "bytes_down",
        "replies",
    }


SECRET = (
    "privacy.unit=client",
    "privacy.secret_cohort=true",
    "federation.sampling=poisson",
    "privacy.budget=90.0",
)


@pytest.fixture
def secret(tmp_path: Path) -> Run:
    """A run whose cohorts are secret; epsilon is known of every round, as a server writes it."""
    made = build(tmp_path / "run", *SECRET)
    lines = [json.loads(line) for line in made.metrics.read_text().splitlines()]
    known = [line | {"seconds": 0.5, "epsilon": 1.0 + line["round"]} for line in lines]
    made.metrics.write_text("".join(json.dumps(line) + "\n" for line in known))
    return made


def test_nothing_that_follows_from_a_secret_draw_goes_in(secret: Run) -> None:
    plan, first = secret.plan(), rounds(secret)[1]
    drawn = {"replies": 2, "asked": 2, "bytes_up": 7, "bytes_down": 9, "bytes_constants": 1}
    values = values_of(first, plan)
    assert values == values_of({**first, **drawn, "seconds": 0.1, "dropped": {}}, plan)
    assert set(values) == {"accuracy", "epsilon"}
    seen = parse_plan(PLAN, [*SECRET, "privacy.secret_cohort=false"])
    assert "replies" in values_of(first, seen)  # where the draw is no secret it is shown
    assert (date_of(plan, 3), date_of(seen, 3)) == (3.0, None)


def test_what_was_not_measured_or_is_infinite_is_left_out() -> None:
    assert final_values(SUMMARY) == {
        "final_accuracy_fp32": 0.8,
        "final_bytes_int8": 17_200,
        "final_epsilon": 2.0,
    }


def test_every_key_of_the_plan_is_a_parameter(run: Run) -> None:
    parameters = parameters_of(run.plan())
    assert parameters["task.name"] == "digits" and parameters["federation.rounds"] == "4"


def test_a_missing_extra_names_the_command_that_installs_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reticent.simulations.sinks.sink.find_spec", lambda name: None)
    for kind, where in (("tensorboard", tmp_path / "t"), ("mlflow", "x")):
        with pytest.raises(DependencyError, match=rf"pip install 'reticent\[{kind}\]'"):
            Feed(run, run.plan(), print, **{kind: where})  # type: ignore[arg-type]


def test_without_sinks_nothing_is_opened(run: Run) -> None:
    feed = Feed(run, run.plan(), print)
    feed.round(rounds(run)[0])
    feed.end(SUMMARY)
    feed.close()


class Broken:
    """A sink whose server goes away after the second round."""

    def last(self) -> int:
        return 4

    def log(self, number: int, values: Mapping[str, float]) -> None:
        raise ConnectionError("gone: http://user:secret@host.example/api?a@b")

    def end(self, values: Mapping[str, float]) -> None:
        raise AssertionError("left out")

    def close(self) -> None:
        raise AssertionError("left out")


def test_a_sink_that_fails_is_left_out_and_costs_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("reticent.simulations.sinks.feed.require", lambda kind: None)
    monkeypatch.setattr("reticent.simulations.sinks.feed._tensorboard", lambda *_: Broken())
    feed = Feed(run, run.plan(), said.append, tensorboard=tmp_path)
    for number in (5, 6):
        feed.round({**rounds(run)[0], "round": number})
    feed.end(SUMMARY)
    feed.close()
    assert len(said) == 1 and "left out" in said[0]
    assert said[0].endswith("gone: http://host.example/api?a@b")


def stopped_then_resumed(run: Run, **where: Any) -> None:
    """Feed two rounds, lose the third between commit and sink, go on with the fourth."""
    whole = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join(whole[:1]))
    first = Feed(run, run.plan(), pytest.fail, **where)
    first.round(json.loads(whole[0]))
    run.metrics.write_text("".join(whole[:2]))
    first.round(json.loads(whole[1]))
    first.close()
    run.metrics.write_text("".join(whole))
    second = Feed(run, run.plan(), pytest.fail, **where)
    second.round(json.loads(whole[3]))
    second.round(json.loads(whole[3]))  # given twice, kept once
    second.end(SUMMARY)
    second.close()


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_has_every_round_once(run: Run, tmp_path: Path) -> None:
    module = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="the extra tensorboard is not installed",
    )
    stopped_then_resumed(run, tensorboard=tmp_path / "boards")
    (board,) = (tmp_path / "boards").iterdir()
    assert board.name == f"run-{run.plan().digest[:8]}"
    events = module.EventAccumulator(str(board))
    events.Reload()
    assert [e.step for e in events.Scalars("bytes_down")] == [1, 2, 3, 4]
    assert [e.step for e in events.Scalars("accuracy")] == [2, 4]
    assert events.Scalars("accuracy")[1].value == pytest.approx(0.8)
    assert events.Scalars("accuracy")[1].wall_time > 1e9


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_keeps_two_plans_whose_folders_have_one_name_apart(tmp_path: Path) -> None:
    module = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="the extra tensorboard is not installed",
    )
    for parent, seed in (("a", 1), ("b", 2)):
        made = build(tmp_path / parent / "run", f"seed={seed}")
        feed = Feed(made, made.plan(), pytest.fail, tensorboard=tmp_path / "boards")
        for metrics in made.read_metrics():
            feed.round(metrics)
        feed.close()
    boards = sorted((tmp_path / "boards").iterdir())
    assert len(boards) == 2
    for board in boards:
        events = module.EventAccumulator(str(board))
        events.Reload()
        assert [e.step for e in events.Scalars("bytes_down")] == [1, 2, 3, 4]


def test_the_board_of_a_run_is_known_by_name_and_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            opened.append(folder)

        def add_text(self, *_: Any) -> None:
            """Take the plan."""

    module = "reticent.simulations.sinks.tensorboard.import_module"
    monkeypatch.setattr(module, lambda name: SimpleNamespace(SummaryWriter=Writer))
    plan, other = parse_plan(PLAN), parse_plan(PLAN, ["seed=2"])
    own = f"demo-{plan.digest[:8]}"
    for name, given in (("demo", plan), ("demo", other), (own, plan)):
        TensorBoard(tmp_path, given, name)
    assert opened[0] == opened[2] == str(tmp_path / own) != opened[1]


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_goes_on_without_bytes_where_the_draw_is_secret(
    secret: Run, tmp_path: Path
) -> None:
    module = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="the extra tensorboard is not installed",
    )
    stopped_then_resumed(secret, tensorboard=tmp_path / "boards")
    (board,) = (tmp_path / "boards").iterdir()
    events = module.EventAccumulator(str(board))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"accuracy", "epsilon"}
    # A date would tell how long the clients of the round took, and so how many they were.
    assert [(e.step, e.wall_time) for e in events.Scalars("epsilon")] == [
        (n, float(n)) for n in (1, 2, 3, 4)
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sqlite", "file"])
def test_mlflow_goes_on_with_one_run(run: Run, tmp_path: Path, kind: str) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    uri = f"sqlite:///{tmp_path}/ml.db" if kind == "sqlite" else (tmp_path / "ml").as_uri()
    disabled = logging.root.manager.disable
    try:
        stopped_then_resumed(run, mlflow=uri)
        client = mlflow.MlflowClient(tracking_uri=uri)
        (experiment,) = [e for e in client.search_experiments() if e.name == "reticent"]
        (kept,) = client.search_runs([experiment.experiment_id])
        history = client.get_metric_history(kept.info.run_id, "bytes_down")
    finally:
        logging.disable(disabled)
    assert [m.step for m in history] == [1, 2, 3, 4]
    assert kept.info.status == "FINISHED"
    assert kept.data.params["task.name"] == "digits"
    assert kept.data.metrics["final_accuracy_fp32"] == 0.8
    assert kept.data.tags["reticent.plan"] == run.plan().digest


class Server:
    """What the sink asks of MLflow's client, and the modules that it comes with."""

    def __init__(self) -> None:
        self.begun, self.continued = 0, list[str]()

    def module(self, name: str) -> Any:
        return SimpleNamespace(MlflowClient=lambda tracking_uri: self, Param=lambda k, v: (k, v))

    def get_experiment_by_name(self, name: str) -> None:
        """There is none."""

    def create_experiment(self, name: str) -> str:
        return "1"

    def create_run(self, number: str, **_: Any) -> Any:
        self.begun += 1
        return SimpleNamespace(info=SimpleNamespace(run_id=f"id-{self.begun}"))

    def log_batch(self, *_: Any, **__: Any) -> None:
        """Take it."""

    def update_run(self, known: str, status: str) -> None:
        self.continued.append(known)

    def get_metric_history(self, *_: str) -> list[Any]:
        return []


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server()
    monkeypatch.setattr("reticent.simulations.sinks.mlflow.import_module", made.module)
    return made


@pytest.mark.parametrize(
    "uri",
    [
        "https://user:secret@host.example:5000/path",
        "postgresql://user:secret@host.example/db?password=secret#secret",
        "sqlite:////folder/ml.db",
        "folder/ml",
    ],
)
def test_the_file_that_knows_mlflows_run_holds_no_password(
    run: Run, server: Server, uri: str
) -> None:
    MLflow(uri, run.plan(), run)
    kept = (run.folder / "mlflow.json").read_text()
    assert "secret" not in kept and "user" not in kept
    assert uri in kept or "secret" in uri
    MLflow(uri, run.plan(), run)
    MLflow(uri.replace("user:secret@", "other:new@"), run.plan(), run)  # the same store
    assert (server.begun, server.continued) == (1, ["id-1", "id-1"])
    MLflow(uri.replace("folder", "another").replace("host", "another"), run.plan(), run)
    assert server.begun == 2


def test_a_file_of_before_is_found_and_loses_its_password(run: Run, server: Server) -> None:
    uri = "https://user:secret@host.example"
    path = run.folder / "mlflow.json"
    path.write_text(json.dumps({uri: "old", "sqlite:///ml.db": "other"}))
    MLflow(uri, run.plan(), run)
    assert (server.begun, server.continued) == (0, ["old"])
    known = json.loads(path.read_text())
    assert known == {"https://host.example": "old", "sqlite:///ml.db": "other"}


@pytest.mark.filterwarnings("ignore")
def test_a_server_that_does_not_answer_is_given_up_soon(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow reads the patience from the environment, where a user's own words come first."""
    variables = pytest.importorskip(
        "mlflow.environment_variables", reason="the extra mlflow is not installed"
    )
    names = ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(names[1], "7")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    said: list[str] = []
    disabled = logging.root.manager.disable
    try:
        feed = Feed(run, run.plan(), said.append, mlflow=f"http://127.0.0.1:{port}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
        feed.round(rounds(run)[0])
        feed.close()
        assert [getattr(variables, name).get() for name in names] == [2, 7]
    finally:
        logging.disable(disabled)
        for name in names:
            os.environ.pop(name, None)
    assert len(said) == 1 and "left out" in said[0]


@pytest.mark.filterwarnings("ignore")
def test_mlflow_goes_on_without_bytes_where_the_draw_is_secret(secret: Run, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    uri, disabled = f"sqlite:///{tmp_path}/ml.db", logging.root.manager.disable
    try:
        stopped_then_resumed(secret, mlflow=uri)
        client = mlflow.MlflowClient(tracking_uri=uri)
        (experiment,) = [e for e in client.search_experiments() if e.name == "reticent"]
        (kept,) = client.search_runs([experiment.experiment_id])
        history = client.get_metric_history(kept.info.run_id, "epsilon")
    finally:
        logging.disable(disabled)
    assert [(m.step, m.timestamp) for m in history] == [(n, 1000 * n) for n in (1, 2, 3, 4)]
    assert (kept.info.start_time, kept.info.end_time) == (1000, 4000)
    assert not {"bytes_up", "bytes_down", "replies"} & kept.data.metrics.keys()
