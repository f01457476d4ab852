"""``reticent server start``, ``run`` and ``status``."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import click

from .output import Progress, emit, epsilon_text, human_bytes, table
from .servers import device_table, directory_option, server, superlink_nodes
from .simulations import committed_rounds, overrides_option, plan_of


@server.command()
@directory_option
def start(folder: Path) -> None:
    """Run the SuperLink in the foreground, as the systemd unit does.

    Devices that were enrolled or revoked meanwhile are registered or refused first. Ends with
    status 0 after SIGTERM.
    """
    from reticent.core.errors import NetworkError
    from reticent.server.certificates import utc_now
    from reticent.server.enrolment import synchronize
    from reticent.server.flower import Flower, answers, superlink
    from reticent.server.home import open_home
    from reticent.server.status import warnings

    home = open_home(folder)
    _stop_when_told(0)  # that is how a service ends, and systemd counts any other status as failed
    for warning in warnings(home, utc_now()):
        click.echo(f"warning: {warning}", err=True)
    if answers(home):
        raise NetworkError(f"port {home.port}: this server's SuperLink runs already")
    with superlink(home) as link:
        synchronize(home, Flower(home), utc_now(), click.echo)
        click.echo(f"SuperLink ready at {home.address}")
        status = link.wait() if link else 0
    raise NetworkError(f"the SuperLink ended with status {status}")


@server.command()
@click.argument("plan_file", required=False, type=click.Path(path_type=Path), metavar="[PLAN]")
@directory_option
@overrides_option
@click.option("--run", "where", type=click.Path(path_type=Path), help="The run directory.")
@click.option("--resume", is_flag=True, help="Continue the run in --run after its last round.")
@click.option("--deliver", is_flag=True, help="Bring the model to the devices at the end.")
@click.option("--metrics-port", type=click.IntRange(1, 65535), help="Serve /metrics on 127.0.0.1.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def run(
    plan_file: Path | None,
    folder: Path,
    overrides: tuple[str, ...],
    where: Path | None,
    resume: bool,
    deliver: bool,
    metrics_port: int | None,
    as_json: bool,
) -> None:
    """Run PLAN with the enrolled devices: rounds, artifact and figures end in --run.

    A ServerApp or SuperLink that dies is started again, and the run goes on at the next round. The
    exit status is 0 only if the run came to its end.
    """
    from reticent.core.run import Run
    from reticent.server.exposition import exposed
    from reticent.server.home import open_home
    from reticent.server.operate import prepare_operation
    from reticent.simulations.explain import check_student

    plan = plan_of(plan_file, overrides, where, resume)
    home = open_home(folder)
    check_student(plan)
    name = f"{plan.task.name.replace(':', '-')}-{plan.digest[:8]}"
    target = (where or home.folder / "runs" / name).absolute()
    show = Progress(
        plan.federation.rounds, as_json, committed_rounds(Run(target)) if resume else ()
    )
    show.say(f"plan {plan.digest[:12]}, run directory {target}")
    _stop_when_told(143)
    try:
        operation = prepare_operation(home, plan, target, resume, show.say, show.round)
        with exposed(operation.run, metrics_port):
            operation.serve()
    except KeyboardInterrupt:
        show.clear()
        again = f"reticent server run --dir {home.folder} --run {target} --resume"
        click.echo(f"interrupted: committed rounds are kept; continue with `{again}`", err=True)
        raise SystemExit(130) from None
    finally:
        show.clear()
    summary = operation.run.read_summary()
    if as_json:
        click.echo(json.dumps({"run": str(target), **summary}))
    else:
        _close(target, summary)
    if deliver:
        from .deliveries import deliver_run

        deliver_run(home, target, as_json=as_json)


def _close(target: Path, summary: dict[str, Any]) -> None:
    accuracy, privacy = summary["accuracy"], summary["privacy"]
    best = accuracy.get("int8", accuracy["fp32"])
    click.echo(f"accuracy  {best:.1%}, public data alone {accuracy['public_only']:.1%}")
    if privacy["trust"] != "off":
        click.echo(f"privacy   ε {epsilon_text(privacy['epsilon'])} at δ {privacy['delta']:g}")
    click.echo(f"artifact  {'none' if 'no_artifact' in summary else target / 'artifact'}")
    click.echo(f"report    `reticent report {target}` writes it")


@server.command()
@directory_option
@click.option("--run", "where", type=click.Path(path_type=Path), help="A run; else the last one.")
@click.option("--json", "as_json", is_flag=True, help="JSON for machines.")
def status(folder: Path, where: Path | None, as_json: bool) -> None:
    """Show devices, certificates and the run: round, replies, bytes, why replies were not used.

    What is damaged is named at the end, with status 11; all else is shown.
    """
    from reticent.core.errors import ProvisionError
    from reticent.core.run import Run
    from reticent.server.certificates import utc_now
    from reticent.server.home import open_home
    from reticent.server.offers import last_delivery
    from reticent.server.status import last_run_status, run_status, server_status

    home = open_home(folder)
    nodes, damage = superlink_nodes(home)
    shown = server_status(home, nodes, utc_now())
    model = last_delivery(home)
    progress = run_status(Run(where)) if where else last_run_status(home)
    if as_json:
        emit({"server": shown, "run": progress, "model": model})
    else:
        _show_status(shown, progress, model)
    problems = [c["problem"] for c in shown["certificates"] if "problem" in c]
    if damage is not None and str(damage) not in problems:
        problems.append(str(damage))
    if problems:
        raise ProvisionError("\n".join(problems))


def _show_status(
    shown: dict[str, Any], progress: dict[str, Any] | None, model: dict[str, Any] | None
) -> None:
    click.echo(f"server {shown['address']}, SuperLink {shown['superlink']}")
    click.echo(", ".join(map(_until, shown["certificates"])))
    for warning in shown["warnings"]:
        click.echo(f"warning: {warning}")
    click.echo("\n" + device_table(shown["devices"]))
    if progress is not None:
        click.echo("\n" + table(["run", progress["folder"]], _rows(progress)))
    if model is not None:
        rows = [[name, _way(way)] for name, way in sorted(model["devices"].items())]
        click.echo("\n" + table([f"model {model['version']}", "came how far"], rows))


def _until(certificate: dict[str, Any]) -> str:
    if "problem" in certificate:
        return f"{certificate['file']} cannot be used"
    return f"{certificate['file']} until {certificate['expires'][:10]}"


def _rows(run: dict[str, Any]) -> list[list[str]]:
    if "problem" in run:
        return [["problem", run["problem"]]]
    rows = [
        ["state", run["state"]],
        ["round", f"{run['round']} of {run['rounds']}"],
        ["replies used", f"{run['replies']} of {run['asked']} orders"],
        ["sent up, down", f"{human_bytes(run['bytes_up'])}, {human_bytes(run['bytes_down'])}"],
    ]
    rows += [[f"not used: {why}", str(count)] for why, count in sorted(run["dropped"].items())]
    if run["epsilon"] is not None:
        rows.append(["ε so far", epsilon_text(run["epsilon"])])
    if run["accuracy"] is not None:
        rows.append(["accuracy", f"{run['accuracy']:.1%}"])
    if run["state"] == "running" and run["missing"]:
        rows.append(["not connected", run["missing"]])
    if run["reason"]:
        rows.append(["why", run["reason"]])
    return rows


def _way(parcel: dict[str, Any]) -> str:
    from reticent.server.offers import Parcel

    return Parcel(**parcel).words


def _stop_when_told(status: int) -> None:
    """Let SIGTERM unwind as Ctrl-C does, so that what was started is stopped; end with a status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(status))
