"""Whole runs whose students are deployed in other ways than int8 on QNNPACK."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from engines import has_vnni
from torch import nn

from reticent.cli.main import cli
from reticent.compression.artifact import load_artifact
from reticent.compression.backends.base import Backend, Deployed, deploy
from reticent.compression.backends.profiles import NO_LIMITS
from reticent.compression.deployable import Spec
from reticent.compression.dynamic import DynamicGraph
from reticent.compression.integer import IntegerModel
from reticent.compression.packing import unpack
from reticent.core.errors import ArtifactError, PlanError
from reticent.core.plan import parse_plan
from reticent.core.run import Run
from reticent.core.signing import read_public_key
from reticent.server import bench
from reticent.server.bench import bench_run
from reticent.server.export import export_run
from reticent.simulations.simulate import simulate

SMALL = [
    "task.name=digits",
    "task.clients=4",
    "task.public_examples=100",
    "teacher.epochs=1",
    "student.epochs=1",
    "federation.clients_per_round=4",
    "federation.rounds=1",
    "engine.workers=1",
]


def perceptron(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    size = torch.Size(input_shape).numel()
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 24), nn.ReLU(), nn.Linear(24, classes))


def run_of(folder: Path, *overrides: str) -> Run:
    chosen = [f"student.quantize.{override}" for override in overrides]
    return simulate(parse_plan("", [*SMALL, *chosen]), folder / "run")


def test_two_bits_reach_the_artifact_and_every_measurement(tmp_path: Path) -> None:
    run = run_of(tmp_path, "bits=2", "observer=histogram", "granularity=tensor")
    summary = json.loads(run.summary.read_text())
    size = (run.artifact / "model.safetensors").stat().st_size
    # Half of 15,248 weights are pruned; plain int8 would take a byte each.
    assert summary["bytes"]["int8"] == size < 6000
    assert {r["backend"]: r["bytes"] for r in bench_run(run, 10, NO_LIMITS)}["qnnpack"] == size
    assert summary["agreement"]["fake_quantized"] >= 0.97
    key = read_public_key(run.keys / "signing_key.pub.pem")
    artifact = load_artifact(run.artifact, key)
    assert artifact.manifest.backend == "qnnpack"
    arrays = unpack(safetensors.torch.load(artifact.data))
    tops = [int(v.abs().max()) for v in arrays.values() if v.dtype == torch.int8]
    assert sorted(tops) == [1, 1, 1, 127]
    if not has_vnni:  # the first layer has 8 bits
        with pytest.raises(ArtifactError, match="may saturate"):
            export_run(run, tmp_path / "x86", "x86", 0.9)
        return
    export_run(run, tmp_path / "x86", "x86", 0.9)
    other = load_artifact(tmp_path / "x86", key)
    assert isinstance(other.model, IntegerModel)
    assert other.manifest.backend == other.model.engine == "x86"
    assert other.data == artifact.data


def test_a_dynamic_student_reaches_the_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reticent.core.models.own_student", lambda _, *given: perceptron(*given))
    plan = ["student.model=some.module:perceptron", "student.quantize.kind=dynamic"]
    run = simulate(parse_plan("", [*SMALL, *plan]), tmp_path / "run")
    artifact = load_artifact(run.artifact, read_public_key(run.keys / "signing_key.pub.pem"))
    assert isinstance(artifact.graph, DynamicGraph)
    assert json.loads(run.summary.read_text())["agreement"]["fp32"] >= 0.95


@pytest.mark.parametrize(
    "overrides",
    [
        ("teacher.count=2",),
        ("student.distill.mode=self",),
        ("student.distill.mode=self", "teacher.count=2", "student.model=tiny-gn"),
    ],
)
def test_every_kind_of_teacher_is_measured(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    run = simulate(parse_plan("", [*SMALL, *overrides]), tmp_path / "run")
    rows = {row["model"]: row for row in bench_run(run, 10, NO_LIMITS)}
    assert rows.keys() == {"teacher", "fp32", "int8"}
    assert all(row["median_us"] > 0 for row in rows.values())


def test_a_backend_that_has_no_form_of_the_model_here_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deployed(spec: Spec, backend: Backend, shape: tuple[int, ...]) -> Deployed:
        if backend.name == "x86":
            raise ArtifactError("sums would saturate")
        return deploy(spec, backend, shape)

    monkeypatch.setattr(bench, "deploy", deployed)
    run = run_of(tmp_path, "bits=8")
    rows = {row["backend"]: row for row in bench_run(run, 10, NO_LIMITS)}
    assert (rows["x86"]["misfit"], rows["x86"]["bytes"]) == ("sums would saturate", None)
    assert rows["qnnpack"]["median_us"] > 0
    result = CliRunner().invoke(cli, ["bench", str(run.folder), "--repeats", "10"])
    assert result.exit_code == 0
    assert "int8 on x86 has no form here: sums would saturate" in result.output


def test_a_student_without_a_dynamic_form_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"layer 0 \(Conv2d\) has no dynamic form"):
        run_of(tmp_path, "kind=dynamic")
