"""``reticent simulate``."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reticent.core.errors import PlanError, ReticentError, RunError
from reticent.core.plan import Plan, load_plan, parse_plan
from reticent.core.run import Run, open_run

from .dashboard import Dashboard, progress_for
from .output import Progress, epsilon_text, human_bytes, human_energy, human_time, table

if TYPE_CHECKING:
    from reticent.simulations.sinks import Feed

overrides_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the plan."
)


def read_plan(path: Path | None, overrides: tuple[str, ...]) -> Plan:
    """Return the plan from a file, or the embedded default, with overrides applied."""
    if path is None:
        return parse_plan("", overrides, where="default plan")
    return load_plan(path, overrides)


@click.command()
@click.argument("plan_file", required=False, type=click.Path(path_type=Path), metavar="[PLAN]")
@overrides_option
@click.option("--run", "folder", type=click.Path(path_type=Path), help="The run directory.")
@click.option("--resume", is_flag=True, help="Continue the run in --run after its last round.")
@click.option(
    "--tensorboard",
    type=click.Path(path_type=Path),
    help="Also write rounds to a TensorBoard folder.",
)
@click.option("--mlflow", metavar="URI", help="Also log rounds to an MLflow store.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def simulate(
    plan_file: Path | None,
    overrides: tuple[str, ...],
    folder: Path | None,
    resume: bool,
    tensorboard: Path | None,
    mlflow: str | None,
    as_json: bool,
) -> None:
    """Run a whole federation on this machine: plan in, artifact and privacy report out.

    Without PLAN the embedded default runs: Fashion-MNIST, 100 clients, epsilon 8.
    """
    from reticent.server.rounds import BudgetsSpent
    from reticent.simulations.sinks import Feed

    plan = plan_of(plan_file, overrides, folder, resume)
    run = Run(folder or Path("runs") / f"{plan.task.name.replace(':', '-')}-{plan.digest[:8]}")
    show = progress_for(plan, as_json, committed_rounds(run) if resume else ())
    feed = Feed(run, plan, show.say, tensorboard, mlflow)
    began = time.monotonic()
    show.say(f"plan {plan.digest[:12]}: {_headline(plan)}")
    show.say(f"run directory {run.folder}")
    try:
        with interruptible(show.clear, lambda: _interrupted(plan, run)):
            _run(plan, run, resume, show, feed)
    except BudgetsSpent:
        show.clear()
        _report_the_end(run)
        raise
    finally:
        show.clear()
        feed.close()
    reports = _write_reports(run)
    if as_json:
        click.echo(json.dumps({"run": str(run.folder), "reports": reports, **run.read_summary()}))
        return
    click.echo(_closing(run, time.monotonic() - began))


def _run(plan: Plan, run: Run, resume: bool, show: Progress | Dashboard, feed: Feed) -> None:
    """Run the federation; why it failed is kept in its folder, for ``reticent runs``.

    A folder that held a run, or anything else, before a run was to begin there is left as it is.
    """
    from reticent.simulations.runs import record_failure
    from reticent.simulations.simulate import simulate as run_simulation

    def committed(metrics: dict[str, Any]) -> None:
        feed.round(metrics)
        show.round(metrics)

    begins = resume or not _is_run_of(run, plan)
    try:
        run_simulation(plan, run.folder, resume=resume, say=show.say, progress=committed)
    except RunError:
        raise  # it is about a folder that is another run's, or that cannot be written
    except ReticentError as error:
        if begins and _is_run_of(run, plan):
            record_failure(run, " ".join(str(error).split()))
        raise
    feed.end(run.read_summary())


@contextmanager
def interruptible(clear: Callable[[], None], words: Callable[[], str]) -> Iterator[None]:
    """Let SIGTERM unwind a command as Ctrl-C does; say ``words`` and end with 143 or 130."""
    # Ray sets a handler when it is started, to the same effect.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != signal.SIGTERM:
            raise
        clear()
        click.echo(words(), err=True)
        raise SystemExit(143 if isinstance(end, SystemExit) else 130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupted(plan: Plan, run: Run) -> str:
    if not _is_run_of(run, plan):
        return "interrupted before the run began; the same command begins it"
    return (
        "interrupted: the open round was rolled back, committed rounds are kept; continue with "
        f"`reticent simulate --run {run.folder} --resume`"
    )


def _is_run_of(run: Run, plan: Plan) -> bool:
    """Return whether the folder holds a run of this plan; a plan file alone is no run."""
    try:
        return run.plan().digest == plan.digest
    except RunError:
        return False


def committed_rounds(run: Run) -> list[dict[str, Any]]:
    """Return the rounds that a run to be continued has; none if what is shown of one is damaged.

    The run itself has them from its journal, and writes that file again.
    """
    try:
        found = run.read_metrics()
    except RunError:
        return []
    return found if all(map(_can_be_shown, found)) else []


def _can_be_shown(metrics: Any) -> bool:
    if not isinstance(metrics, dict):
        return False
    virtual, dropped = metrics.get("virtual", {"time": 0.0}), metrics.get("dropped")
    if not (isinstance(virtual, dict) and isinstance(dropped, dict)):
        return False
    values = [metrics.get(key) for key in _NUMBERS] + [virtual.get("time"), *dropped.values()]
    values += [metrics[key] for key in ("accuracy", "epsilon") if metrics.get(key) is not None]
    return all(isinstance(value, int | float) for value in values)


def plan_of(
    plan_file: Path | None, overrides: tuple[str, ...], folder: Path | None, resume: bool
) -> Plan:
    """Return the plan of a command; a run that goes on has its own where no file is given.

    Raises:
        PlanError: If it is malformed, or a run is to go on and none is named.
        RunError: If ``folder`` is no run that can go on.
    """
    if not resume:
        return read_plan(plan_file, overrides)
    if folder is None:
        raise PlanError("--resume: needs --run, the directory of the run to continue")
    own = open_run(folder).plan()
    if plan_file is None and not overrides:
        return own
    if plan_file is None:
        from reticent.core.run import Run as RunFolder

        return load_plan(RunFolder(folder).plan_file, overrides)
    return read_plan(plan_file, overrides)


def _headline(plan: Plan) -> str:
    federation, privacy = plan.federation, plan.private
    if privacy is None:
        promise = "privacy off (ε = ∞)"
    else:
        given = (
            f"noise multiplier {privacy.noise_multiplier:g}"
            if privacy.epsilon is None
            else f"ε {privacy.epsilon:g} at δ {privacy.delta:g}"
        )
        whom = f"one {privacy.unit}, {_RELATIONS[privacy.relation]}"
        promise = f"{given} ({whom}), {privacy.trust} trust"
    return (
        f"{plan.task.name}, {plan.task.clients:,} clients, {federation.rounds} rounds of "
        f"{federation.clients_per_round:,}, {promise}"
    )


def _report_the_end(run: Run) -> None:
    """Write the report of a training that budgets ended, if it had a round."""
    if run.summary.is_file():
        report = run.folder / "report.html"
        _write_reports(run)
        click.echo(f"budgets ended the training; the report of its rounds is {report}", err=True)


def _write_reports(run: Run) -> list[str]:
    from reticent.privacy.report import write_reports

    return [str(path) for path in write_reports(run)]


def _closing(run: Run, seconds: float) -> str:
    summary: dict[str, Any] = run.read_summary()
    rows = [
        _model_row("teacher", "teacher", summary),
        ["public-only student", f"{summary['accuracy']['public_only']:.1%}", "", ""],
        _model_row("federated student, fp32", "fp32", summary),
    ]
    if "no_artifact" not in summary:
        rows.append(_model_row("federated student, int8", "int8", summary))
    lines = [
        "",
        table(["model", "accuracy", "size", "latency"], rows),
        "",
        _spent(summary["privacy"]),
    ]
    lines += _reshaped(summary["parameters"]) + _on_fleet(summary.get("fleet"))
    lines.append(f"report    {run.folder / 'report.html'}")
    lines.append(f"artifact  {'none' if 'no_artifact' in summary else run.artifact}")
    lines.append(f"model     {summary['model']}")
    lines.append(f"finished in {seconds:.0f} s")
    return "\n".join(lines)


def _model_row(name: str, key: str, summary: dict[str, Any]) -> list[str]:
    return [
        name,
        f"{summary['accuracy'][key]:.1%}",
        human_bytes(summary["bytes"][key]),
        f"{summary['latency_us'][key]:.0f} µs",
    ]


def _reshaped(parameters: dict[str, int]) -> list[str]:
    """Say how many parameters a student that was reshaped or frozen has."""
    deployed, before = (parameters.get(key) for key in ("deployed", "before"))
    if deployed == before and deployed in (None, parameters["total"]):
        return []
    sent = f"{parameters['kept']:,} trained and sent"
    return [f"student   {deployed:,} parameters deployed, {before:,} before; {sent}"]


def _on_fleet(fleet: dict[str, Any] | None) -> list[str]:
    """Say what the run would have taken on its fleet."""
    if fleet is None:
        return []
    reached = [
        f"{level} after {human_time(t)}" for level, t in fleet["seconds_to_accuracy"].items()
    ]
    lost = sum(fleet["dropped"].values())
    return [
        f"fleet     {human_time(fleet['seconds'])}, {human_energy(fleet['energy'])} (a proxy), "
        f"{human_bytes(fleet['bytes_up'])} up, {human_bytes(fleet['bytes_down'])} down; "
        f"{lost:,} asked in vain, {fleet['charged_unused']:,} of them charged",
        *([f"reached   {', '.join(reached[-4:])}"] if reached else []),
    ]


_NUMBERS = ("round", "replies", "seconds", "bytes_up", "bytes_down", "bytes_constants")
_RELATIONS = {"add-or-remove-one": "add or remove", "replace-one": "replace"}


def _spent(privacy: dict[str, Any]) -> str:
    if privacy["trust"] == "off":
        return "privacy   off: ε = ∞, nothing is promised"
    readers, server = (epsilon_text(privacy[key]) for key in ("epsilon", "server_epsilon"))
    return (
        f"privacy   against readers of the models ε {readers}, against the server ε {server} "
        f"(δ {privacy['delta']:g}, one {privacy['unit']}, {_RELATIONS[privacy['relation']]})"
    )
