"""The ``reticent`` command: what it prints, and the exit status of each kind of error."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from reticent.cli import main as command
from reticent.cli.output import epsilon_text, table
from reticent.core.errors import ArtifactError
from reticent.core.plan import Plan, load_plan
from reticent.core.run import Run, create_run

SETTINGS = (
    "task.name=digits",
    "task.clients=10",
    "task.public_examples=200",
    "teacher.epochs=2",
    "student.epochs=2",
    "federation.rounds=3",
    "federation.clients_per_round=10",
    "federation.eval_every=1",
    "engine.workers=1",
)
TINY = [part for setting in SETTINGS for part in ("--set", setting)]

Capture = pytest.CaptureFixture[str]


def call(*arguments: str | Path) -> int:
    """Run the command in this process, exactly as its console entry does."""
    before, threads = sys.argv, torch.get_num_threads()
    sys.argv = ["reticent", *map(str, arguments)]
    try:
        command.main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    finally:
        sys.argv = before
        torch.set_num_threads(threads)
    raise AssertionError("the command did not exit")


def process(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the installed console entry."""
    entry = shutil.which("reticent", path=str(Path(sys.executable).parent))
    assert entry is not None
    environment = {k: v for k, v in os.environ.items() if k != "RETICENT_DATA"} | variables
    return subprocess.run(
        [entry, *map(str, arguments)], capture_output=True, text=True, env=environment, check=False
    )


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "digits.toml"
    assert call("plan", "new", path, *TINY) == 0
    return path


@pytest.fixture(scope="module")
def simulated(
    plan: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("runs") / "demo"
    return folder, process("simulate", plan, "--run", folder)


@pytest.fixture(scope="module")
def run(simulated: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    assert simulated[1].returncode == 0, simulated[1].stderr
    return simulated[0]


def fails(capsys: Capture, status: int, *arguments: str | Path) -> str:
    """Check that a command ends with ``status`` and no traceback; return its standard error."""
    capsys.readouterr()
    given = call(*arguments)
    captured = capsys.readouterr()
    assert given == status, captured.err
    assert "error: " in captured.err
    assert "Traceback" not in captured.err + captured.out
    return captured.err


def test_new_writes_a_plan_that_check_accepts(plan: Path, capsys: Capture) -> None:
    assert load_plan(plan).task.name == "digits"
    assert call("plan", "check", plan) == 0
    assert capsys.readouterr().out == f"{plan}: good (plan {load_plan(plan).digest[:12]})\n"
    before = plan.read_bytes()
    assert "--force" in fails(capsys, 3, "plan", "new", plan)
    assert plan.read_bytes() == before


def test_new_overwrites_only_when_forced(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    assert call("plan", "new", path) == 0
    assert call("plan", "new", path, "--force", "--set", "seed=5") == 0
    assert load_plan(path).seed == 5


def test_explain_prices_a_plan(plan: Path, capsys: Capture) -> None:
    assert call("plan", "explain", plan) == 0
    lines = capsys.readouterr().out
    assert "noise multiplier σ" in lines
    assert "one example, add-or-remove-one" in lines and "(δ 1e-05)" in lines
    assert call("plan", "explain", plan, "--json") == 0
    price = json.loads(capsys.readouterr().out)
    assert price["plan"] == load_plan(plan).digest
    assert price["privacy"]["epsilon"] <= 8 < price["privacy"]["server_epsilon"]
    assert price["privacy"]["participations"] == 3
    assert (price["privacy"]["relation"], price["privacy"]["delta"]) == ("add-or-remove-one", 1e-5)
    assert price["bytes"]["up"] < price["bytes"]["fp32"] / 10
    assert call("plan", "explain", plan, "--set", "privacy=off") == 0
    assert "ε = ∞" in capsys.readouterr().out


def test_a_count_of_rounds_that_was_cut_off_says_so(plan: Path, capsys: Capture) -> None:
    assert call("plan", "explain", plan, "--set", "privacy.epsilon=1e9") == 0
    assert "10,000,000 or more" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "settings", "words"),
    [
        (3, ["federation.round=3"], "did you mean federation.rounds?"),
        (3, ["privacy.noise_multiplier=1"], "not both"),
        (3, ['updates.codec=["int8","ans"]'], "not admitted"),
        (3, ['updates.codec=["topk"]'], "not admitted"),
        (3, ["task.name=digit"], 'did you mean "digits"?'),
        (4, ["task.public_examples=5000"], "task.public_examples=5000"),
        (5, ["privacy.epsilon=1e-7", "federation.sampling_rate=1.0"], "can meet"),
    ],
)
def test_a_plan_that_cannot_work_is_refused(
    plan: Path, capsys: Capture, status: int, settings: list[str], words: str
) -> None:
    overrides = [part for setting in settings for part in ("--set", setting)]
    assert words in fails(capsys, status, "plan", "check", plan, *overrides)


def test_any_codec_is_admitted_under_local_trust(plan: Path) -> None:
    local = ["--set", "privacy.trust=local", "--set", 'updates.codec=["int8","ans"]']
    assert call("plan", "check", plan, *local) == 0


def test_missing_data_are_a_data_error(
    plan: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETICENT_DATA", str(tmp_path))
    monkeypatch.setattr("reticent.core.tasks.sources.SYSTEM", tmp_path / "none")
    settings = ["--set", "task.name=fashion-full"]
    assert "RETICENT_DATA" in fails(capsys, 4, "plan", "explain", plan, *settings)


def test_the_console_entry_returns_the_status_and_no_traceback(plan: Path) -> None:
    unknown = process("plan", "check", plan, "--set", "federation.round=3")
    assert (unknown.returncode, unknown.stdout) == (3, "")
    assert unknown.stderr.startswith("\nerror: ") and "Traceback" not in unknown.stderr
    usage = process("nonsense")
    assert usage.returncode == 2 and "No such command" in usage.stderr


def test_simulate_prints_plain_lines_when_it_is_not_on_a_terminal(
    simulated: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = simulated
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout and "\r" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[1] == f"run directory {folder}"
    assert [line.split()[1] for line in lines if line.startswith("round ")] == ["1/3", "2/3", "3/3"]
    assert any(line.startswith("federated student, int8") for line in lines)
    (privacy,) = [line for line in lines if line.startswith("privacy ")]
    summary = json.loads((folder / "summary.json").read_text())
    assert f"readers of the models ε {epsilon_text(summary['privacy']['epsilon'])}," in privacy
    assert f"the server ε {epsilon_text(summary['privacy']['server_epsilon'])} " in privacy
    assert f"model     {summary['model']}" in lines


def test_simulate_json_is_one_object_a_line(
    plan: Path, run: Path, tmp_path: Path, capsys: Capture
) -> None:
    capsys.readouterr()
    assert call("simulate", plan, "--run", tmp_path / "again", "--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["round"] for r in records if "round" in r] == [1, 2, 3]
    assert records[-1]["run"] == str(tmp_path / "again")
    assert records[-1]["plan"] == load_plan(plan).digest


def test_run_directories_that_cannot_be_used(plan: Path, run: Path, capsys: Capture) -> None:
    assert "not empty" in fails(capsys, 8, "simulate", plan, "--run", run)
    below = plan / "below"  # a path below a file cannot be written, not even by root
    assert "cannot be written" in fails(capsys, 8, "simulate", plan, "--run", below)
    assert "no plan.toml" in fails(capsys, 8, "report", run / "nothing")
    changed = ["--set", "federation.rounds=4"]
    message = fails(capsys, 8, "simulate", "--run", run, "--resume", *changed)
    assert "federation.rounds (3 before, 4 now)" in message
    assert "--run" in fails(capsys, 3, "simulate", "--resume")


def test_why_a_run_failed_is_kept_in_its_own_folder_alone(
    plan: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETICENT_DATA", str(tmp_path))
    monkeypatch.setattr("reticent.core.tasks.sources.SYSTEM", tmp_path / "none")
    missing = ["--set", "task.name=fashion-full"]
    mine, others, own = (tmp_path / name for name in ("mine", "others", "own"))
    mine.mkdir()
    shutil.copy(plan, mine / "plan.toml")  # somebody's plan is no run
    fails(capsys, 4, "simulate", mine / "plan.toml", *missing, "--run", mine)
    create_run(others, load_plan(plan))
    fails(capsys, 4, "simulate", plan, *missing, "--run", others, "--resume")
    create_run(own, load_plan(plan, ["task.name=fashion-full"]))
    fails(capsys, 4, "simulate", plan, *missing, "--run", own)  # it did not go on
    assert not list(tmp_path.glob("*/failure.json"))
    fails(capsys, 4, "simulate", "--run", own, "--resume")
    assert "RETICENT_DATA" in json.loads((own / "failure.json").read_text())["reason"]


@pytest.mark.parametrize("begun", [False, True])
def test_ctrl_c_says_how_to_go_on_only_where_a_run_began(
    plan: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    def interrupted(given: Plan, folder: Path, **_: object) -> None:
        if begun:
            create_run(folder, given)
        raise KeyboardInterrupt

    monkeypatch.setattr("reticent.simulations.simulate.simulate", interrupted)
    assert call("simulate", plan, "--run", tmp_path / "run") == 130
    said = capsys.readouterr().err
    assert ("--resume" in said) == begun and ("before the run began" in said) != begun


def test_an_unfinished_run_has_no_report(run: Path, tmp_path: Path, capsys: Capture) -> None:
    for name in ("plan.toml", "plan.sha256"):
        shutil.copy(run / name, tmp_path / name)
    for verb in ("report", "export", "bench"):
        assert "not" in fails(capsys, 8, verb, tmp_path)


def test_report_prints_one_format_or_writes_all(run: Path, capsys: Capture) -> None:
    capsys.readouterr()
    assert call("report", run, "--format", "md") == 0
    assert capsys.readouterr().out.startswith("# Privacy-budget report: digits")
    assert call("report", run, "--format", "json") == 0
    assert json.loads(capsys.readouterr().out)["run"]["plan"] == load_plan(run / "plan.toml").digest
    assert call("report", run) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    names = {"report.html", "report.json", "report.md", "report.sig"}
    assert {path.name for path in written} == names
    assert all(path.is_file() for path in written)


def test_report_verifies_what_it_wrote_with_the_artifacts_key(
    run: Path, tmp_path: Path, capsys: Capture
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    assert call("report", copy) == 0
    capsys.readouterr()
    assert call("report", "--verify", copy) == 0
    assert "not who wrote it" in capsys.readouterr().out
    key = run / "keys" / "signing_key.pub.pem"
    assert call("report", "--verify", copy, "--key", key) == 0
    shown = capsys.readouterr().out
    assert f"verified with {key}" in shown and "not who wrote it" not in shown
    page = copy / "report.html"
    page.write_bytes(page.read_bytes().replace(b"Nobody", b"nobody", 1) + b" ")
    assert "report.html: was altered" in fails(capsys, 7, "report", "--verify", copy)
    (copy / "keys" / "signing_key.pub.pem").unlink()
    assert "--key" in fails(capsys, 7, "report", "--verify", copy)
    assert "cannot be read" in fails(capsys, 7, "report", "--verify", copy, "--key", tmp_path)


def test_report_without_a_key_says_that_it_is_not_signed(
    run: Path, tmp_path: Path, capsys: Capture
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "keys")
    capsys.readouterr()
    assert call("report", copy) == 0
    printed = capsys.readouterr()
    assert "report.sig" not in printed.out and "not signed" in printed.err


def test_report_compares_two_runs(run: Path, capsys: Capture) -> None:
    capsys.readouterr()
    assert call("report", run, run) == 0
    shown = capsys.readouterr().out
    assert "Noise multiplier σ" in shown and "differs" not in shown
    assert call("report", run, run, "--format", "json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {"what": "Task", "a": "digits", "b": "digits"}.items() <= rows[1].items()


def test_report_prints_its_schema(capsys: Capture) -> None:
    capsys.readouterr()
    assert call("report", "--schema") == 0
    assert json.loads(capsys.readouterr().out)["$id"] == "urn:reticent:report:2"


def test_report_refuses_arguments_that_make_no_sense_together(run: Path, capsys: Capture) -> None:
    for arguments in (
        (),
        (run, run, run),
        (run, "--schema"),
        (run, run, "--verify"),
        (run, "--verify", "--format", "md"),
        (run, "--key", run),
    ):
        assert call("report", *arguments) == 2
    capsys.readouterr()


def test_export_writes_an_artifact_that_needs_the_runs_key(
    run: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "copy"
    assert call("export", run, "--out", out) == 0
    assert capsys.readouterr().out.startswith(f"wrote {out}\n")
    first, second = ((p / "model.safetensors").read_bytes() for p in (run / "artifact", out))
    assert first == second
    assert "--key" in fails(capsys, 7, "bench", out, "--repeats", "10")
    key = run / "keys" / "signing_key.pub.pem"
    assert call("bench", out, "--repeats", "10", "--key", key, "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["accuracy"] is None and row["bytes"] == (out / "model.safetensors").stat().st_size


def test_bench_reports_what_does_not_fit_a_device(run: Path, capsys: Capture) -> None:
    capsys.readouterr()
    assert call("bench", run / "artifact", "--device-profile", "memory=20MB,cpus=1") == 0
    out = capsys.readouterr().out
    assert "int8 on qnnpack does not fit: " in out
    assert "may allocate 20.0 MB and use 1 of" in out and "the processor is not" in out
    error = fails(capsys, 4, "bench", run, "--device-profile", "memory=20")
    assert '"memory=20"' in error and "pi4" in error


def test_export_refuses_too_little_agreement(
    run: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reticent.compression.convert import Agreement
    from reticent.server import finish

    monkeypatch.setattr(finish, "agreement_on_test", lambda *_: Agreement(0.9, 1.0))
    out = tmp_path / "copy"
    error = fails(capsys, 7, "export", run, "--out", out)
    assert "90.00%" in error and "at least 99.00%" in error and not out.exists()
    assert call("export", run, "--out", out, "--min-agreement", "0.9") == 0


def test_no_agreement_satisfies_nan(
    run: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reticent.compression.convert import Agreement
    from reticent.server import finish
    from reticent.server.export import export_run

    out = tmp_path / "copy"
    for found, least in ((0.1, math.nan), (math.nan, 0.99)):
        monkeypatch.setattr(finish, "agreement_on_test", lambda *_, a=found: Agreement(a, 1.0))
        with pytest.raises(ArtifactError, match="must be at least"):
            export_run(Run(run), out, "qnnpack", least)
    assert not out.exists()


@pytest.mark.parametrize(
    "line",
    [
        "export a --min-agreement nan",
        "server deliver a --timeout NaN",
    ],
)
def test_options_of_a_range_refuse_nan(line: str) -> None:
    done = CliRunner().invoke(command.cli, line.split())
    assert done.exit_code == 2 and "must be a number in the range" in done.output


def test_export_for_another_backend_lies_beside_the_artifact(run: Path, capsys: Capture) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    assert call("export", run, "--backend", "onnx", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    folder = run / "artifact-onnx"
    assert summary["artifact"] == str(folder) and summary["agreement"]["test"] >= 0.99
    assert summary["bytes"]["int8"] == (folder / "model.onnx.zst").stat().st_size
    labels = []
    for artifact in (run / "artifact", folder):
        assert call("predict", artifact, run / "artifact" / "self_test.safetensors") == 0
        labels.append([line.split("\t")[1] for line in capsys.readouterr().out.splitlines()])
    assert labels[0] == labels[1]


def test_a_backend_that_is_not_installed_has_its_exit_status(
    run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "reticent[onnx]" in fails(capsys, 10, "export", run, "--backend", "onnx")


def test_bench_puts_a_runs_models_side_by_side(run: Path, capsys: Capture) -> None:
    capsys.readouterr()
    assert call("bench", run, "--repeats", "10", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in listed[:3]] == ["teacher", "fp32", "int8"]
    assert [row["backend"] for row in listed[:3]] == ["torch", "torch", "qnnpack"]
    assert all(row["misfit"] is None and row["median_us"] <= row["p95_us"] for row in listed)
    assert all(0 < row["memory_bytes"] < row["process_bytes"] for row in listed)
    rows = {row["model"]: row for row in listed[:3]}
    assert rows["int8"]["bytes"] < rows["fp32"]["bytes"] < rows["teacher"]["bytes"]
    assert (
        rows["int8"]["accuracy"]
        == json.loads((run / "summary.json").read_text())["accuracy"]["int8"]
    )


def test_predict_reads_safetensors_and_npy(run: Path, tmp_path: Path, capsys: Capture) -> None:
    artifact = run / "artifact"
    capsys.readouterr()
    assert call("predict", artifact, artifact / "self_test.safetensors", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(int(np.argmax(row["logits"])) == row["label"] for row in rows)
    images = np.zeros((3, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    assert call("predict", artifact, tmp_path / "images.npy") == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["0", "1", "2"]
    assert lines[0][1:] == lines[1][1:] == lines[2][1:]


def test_inputs_that_cannot_be_predicted(run: Path, tmp_path: Path, capsys: Capture) -> None:
    artifact, path = run / "artifact", tmp_path / "bad.npy"
    assert "no such file" in fails(capsys, 4, "predict", artifact, path)
    path.write_bytes(b"not an array")
    assert str(path) in fails(capsys, 4, "predict", artifact, path)
    np.save(path, np.zeros((2, 9, 9), dtype=np.float32))
    assert "(9, 9)" in fails(capsys, 4, "predict", artifact, path)
    np.save(path, np.full((2, 8, 8), 1e300))
    assert "not finite" in fails(capsys, 4, "predict", artifact, path)
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    fails(capsys, 4, "predict", artifact, path)


def test_artifacts_that_are_not_what_was_signed(run: Path, tmp_path: Path, capsys: Capture) -> None:
    key, other = run / "keys" / "signing_key.pub.pem", tmp_path / "artifact"
    shutil.copytree(run / "artifact", other)
    model, inputs = other / "model.safetensors", run / "artifact" / "self_test.safetensors"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    assert "model.safetensors" in fails(capsys, 7, "predict", other, inputs, "--key", key)
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    assert call("predict", other, inputs, "--key", key) == 0
    assert "no such folder" in fails(capsys, 7, "bench", tmp_path / "none")


def test_another_key_is_refused(run: Path, tmp_path: Path, capsys: Capture) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = Ed25519PrivateKey.generate().public_key()
    path = tmp_path / "other.pem"
    path.write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    artifact = run / "artifact"
    fails(capsys, 7, "predict", artifact, artifact / "self_test.safetensors", "--key", path)


def test_resuming_a_finished_run_gives_the_same_model(run: Path, capsys: Capture) -> None:
    before = json.loads((run / "summary.json").read_text())["model"]
    assert call("simulate", "--run", run, "--resume") == 0
    assert f"model     {before}" in capsys.readouterr().out


def test_no_color_and_usage_errors() -> None:
    done = process("plan", NO_COLOR="1")
    assert done.returncode == 2 and "\x1b" not in done.stdout + done.stderr


def test_epsilon_is_rounded_up_and_never_down() -> None:
    assert epsilon_text(7.9921) == "8.00"
    assert epsilon_text(8.0) == "8.00"
    assert epsilon_text(0.29) == "0.29"  # 0.29 * 100 is 28.999999999999996
    assert epsilon_text("infinity") == "∞"


def test_a_long_cell_of_a_table_goes_on_in_further_lines_and_loses_no_word() -> None:
    reason = " ".join(f"word{n}" for n in range(60))
    lines = table(["what", "value"], [["short", "1"], ["why", reason], ["last", "2"]]).splitlines()
    assert max(map(len, lines)) <= 4 + 2 + 2 + 80
    assert " ".join(" ".join(lines[3:-1]).split()) == f"why {reason}"
    assert lines[-1].startswith("last") and lines[-1].endswith("2")
