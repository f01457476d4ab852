"""``reticent plan new|check|explain``: write, validate and price a plan before running it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from reticent.core.errors import PlanError

from .output import emit, epsilon_text, human_bytes, human_energy, human_time, table
from .simulations import overrides_option, read_plan


@click.group()
def plan() -> None:
    """Write, validate and price a plan."""


@plan.command()
@click.argument("path", type=click.Path(path_type=Path))
@overrides_option
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
def new(path: Path, overrides: tuple[str, ...], force: bool) -> None:
    """Write the default plan, with overrides applied, to PATH."""
    import tomli_w

    from reticent.core.run import without_none

    resolved = read_plan(None, overrides)
    if path.exists() and not force:
        raise PlanError(f"{path}: already exists: choose another name or give --force")
    text = tomli_w.dumps(without_none(resolved.model_dump(mode="json")))
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PlanError(f"{path}: cannot be written: {error.strerror}") from error
    click.echo(f"wrote {path}; price it with `reticent plan explain {path}`")


@plan.command()
@click.argument("path", type=click.Path(path_type=Path))
@overrides_option
def check(path: Path, overrides: tuple[str, ...]) -> None:
    """Validate PATH: the plan, its task, its codecs and its privacy target."""
    from reticent.simulations.explain import check_plan

    resolved = read_plan(path, overrides)
    check_plan(resolved)
    click.echo(f"{path}: good (plan {resolved.digest[:12]})")


@plan.command()
@click.argument("path", required=False, type=click.Path(path_type=Path), metavar="[PLAN]")
@overrides_option
@click.option("--json", "as_json", is_flag=True, help="JSON for machines.")
def explain(path: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Price a plan: epsilon, bytes, memory and time, before running it."""
    from reticent.simulations.explain import explain_plan

    price = explain_plan(read_plan(path, overrides))
    if as_json:
        emit(price)
        return
    click.echo(table(["what", "value"], _rows(price)))
    if price["no_artifact"]:
        click.echo(f"no int8 artifact: {price['no_artifact']}")
    if price["fleet"] and price["fleet"]["failed"]:
        click.echo(f"would fail on this fleet: {price['fleet']['failed']}")
    if note := _other_step(price):
        click.echo(note)


def _rows(price: dict[str, Any]) -> list[list[str]]:
    privacy, traffic, work = price["privacy"], price["bytes"], price["work"]
    rows = [["plan", price["plan"][:12]], ["student parameters sent", f"{price['parameters']:,}"]]
    if privacy["trust"] == "off":
        rows.append(["privacy", "off: ε = ∞"])
    else:
        rows += [
            ["what one neighbour is", f"one {privacy['unit']}, {privacy['relation']}"],
            ["noise multiplier σ", f"{privacy['noise_multiplier']:.4f}"],
            ["rounds of one client, at most", f"{privacy['participations']}"],
            [
                f"ε against readers of the models (δ {privacy['delta']:g})",
                epsilon_text(privacy["epsilon"]),
            ],
            ["ε against the server", epsilon_text(privacy["server_epsilon"])],
            *_of_weights(privacy),
            ["ε of one round", epsilon_text(privacy["round_epsilon"])],
            ["ε with half the noise", epsilon_text(privacy["half_noise_epsilon"])],
            ["ε without amplification by sampling", epsilon_text(privacy["unamplified_epsilon"])],
            ["rounds of one client that fit its budget", _rounds(privacy["rounds_that_fit"])],
            ["the same with half the noise", _rounds(privacy["half_noise_rounds"])],
        ]
    rows += [
        ["bytes up, one client and round", human_bytes(traffic["up"])],
        ["bytes down, one client and round", human_bytes(traffic["down"])],
        ["the same as fp32", human_bytes(traffic["fp32"])],
        ["whole run, all clients", human_bytes(traffic["total"])],
        ["local step, measured here", f"{work['step_seconds'] * 1000:.1f} ms"],
        ["client steps in the run", f"{work['steps']:,}"],
        ["rounds on this machine, about", f"{work['seconds']:.0f} s"],
        ["memory of this process", human_bytes(work["memory"])],
    ]
    return rows + _on_fleet(price["fleet"])


def _other_step(price: dict[str, Any]) -> str:
    """Return what to say where the fleet's step is far from the one measured here, if it is."""
    here, fleet = price["work"]["step_seconds"], price["fleet"]
    step = fleet and fleet["step_seconds"]
    if not step or here / 2 <= step <= 2 * here:
        return ""
    return (
        f"the fleet is priced with fleet.step_seconds={step:g}, a local step of "
        f"{1000 * step:.3g} ms on its reference machine, not with the {1000 * here:.3g} ms "
        "measured here"
    )


def _of_weights(privacy: dict[str, Any]) -> list[list[str]]:
    """Return what of epsilon is of weights that were trained before, where a plan brings some."""
    if privacy["weights_epsilon"] is None:
        return []
    return [
        ["of it, the weights that the models begin with", epsilon_text(privacy["weights_epsilon"])],
        ["of it, the rounds by themselves", epsilon_text(privacy["rounds_epsilon"])],
    ]


def _on_fleet(fleet: dict[str, Any] | None) -> list[list[str]]:
    """Return what the rounds take on the plan's fleet, as its virtual clock says."""
    if fleet is None:
        return []
    rows = [
        ["rounds on the fleet", f"{fleet['rounds']:,}"],
        ["time on the fleet", human_time(fleet["seconds"])],
        ["energy of the fleet, a proxy", human_energy(fleet["energy"])],
        ["bytes up, those in vain included", human_bytes(fleet["bytes_up"])],
        ["bytes down, the same", human_bytes(fleet["bytes_down"])],
        ["memory needed on a device", human_bytes(fleet["memory"])],
        ["charged in vain", f"{fleet['charged_unused']:,}"],
    ]
    rows += [[f"asked in vain: {why}", f"{n:,}"] for why, n in fleet["dropped"].items()]
    return rows


def _rounds(count: int | None) -> str:
    from reticent.privacy.calibrate import MOST_STEPS

    if count is None:
        return "no budget given"
    return f"{count:,}" + (" or more" if count >= MOST_STEPS else "")
