"""``reticent export``, ``bench`` and ``predict``: the deployable artifact."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reticent.compression.backends import BACKEND_NAMES, BackendName
from reticent.core.errors import ArtifactError
from reticent.core.run import Run

from .numbers import Within
from .output import emit, human_bytes, table

if TYPE_CHECKING:
    from reticent.compression.artifact import Artifact
    from reticent.compression.backends.profiles import Profile

PUBLIC_KEY = "signing_key.pub.pem"


def public_key_of(artifact: Path, given: Path | None) -> Path:
    """Return the key to verify with: the one given, else the one of the run the artifact is in.

    Raises:
        ArtifactError: If neither is there, or there is no artifact.
    """
    if not artifact.is_dir():
        raise ArtifactError(f"{artifact}: no such folder: must be an artifact")
    if given is not None:
        return given
    beside = artifact.resolve().parent / "keys" / PUBLIC_KEY
    if not beside.is_file():
        raise ArtifactError(
            f"{artifact}: no key to verify it with: give --key, the public key of whoever made it"
        )
    return beside


key_option = click.option(
    "--key", type=click.Path(path_type=Path), help="Public key (PEM); default: the run's own."
)
json_option = click.option("--json", "as_json", is_flag=True, help="JSON for machines.")


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--backend", type=click.Choice(BACKEND_NAMES), help="Default: the plan's.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder; default: RUN/artifact, or RUN/artifact-BACKEND for another than the plan's.",
)
@click.option(
    "--min-agreement",
    type=Within(0, 1),
    default=0.99,
    show_default=True,
    help="Refuse a model that predicts otherwise than the fake-quantized student more often.",
)
@json_option
def export(
    run: Path, backend: BackendName | None, out: Path | None, min_agreement: float, as_json: bool
) -> None:
    """Convert the final model of RUN to int8 for BACKEND and write the signed artifact."""
    from reticent.server.export import export_folder, export_run

    backend = backend or Run(run).plan().student.quantize.backend
    folder = out or export_folder(Run(run), backend)
    summary = export_run(Run(run), folder, backend, min_agreement)
    if as_json:
        emit({"artifact": str(folder), "backend": backend, **summary})
        return
    agreement = summary["agreement"]
    click.echo(f"wrote {folder}")
    click.echo(
        f"int8 on {backend}: {human_bytes(summary['bytes']['int8'])}, accuracy "
        f"{summary['accuracy']['int8']:.1%}, agrees with the fake-quantized student on "
        f"{agreement['test']:.1%} of the test examples (logits within "
        f"{agreement['test_largest_logit_difference']:.2g})"
    )


@click.command()
@click.argument("target", type=click.Path(path_type=Path), metavar="RUN|ARTIFACT")
@click.option("--repeats", type=click.IntRange(10, 100_000), default=500, show_default=True)
@click.option(
    "--device-profile",
    "profile",
    metavar="PROFILE",
    help="Measure within a device's memory and cores: pi4, pizero2, gateway, or limits such as "
    "memory=256MB,cpus=1. Emulates memory and cores, not the processor.",
)
@key_option
@json_option
def bench(target: Path, repeats: int, profile: str | None, key: Path | None, as_json: bool) -> None:
    """Measure size, latency, memory and accuracy; for a RUN, beside fp32 and the teacher.

    Each model runs alone in a process of its own, on one thread, in turns with the others.
    """
    from reticent.compression.backends.base import installed
    from reticent.compression.backends.profiles import NO_LIMITS, parse_profile
    from reticent.compression.backends.registry import BACKENDS
    from reticent.server.bench import bench_artifact, bench_run

    limits = NO_LIMITS if profile is None else parse_profile(profile)
    of_run = (target / "plan.toml").is_file()
    if of_run and key is not None:
        raise click.UsageError("--key is of an artifact alone: a RUN has its own")
    if of_run:
        rows = bench_run(Run(target), repeats, limits)
    else:
        rows = bench_artifact(target, public_key_of(target, key), repeats, limits)
    if as_json:
        emit(rows)
        return
    headers = ["model", "runs on", "bytes", "median", "p95", "memory", "process", "accuracy"]
    click.echo(table(headers, [_row(r) for r in rows]))
    for row in rows:
        if row["misfit"]:
            how = "has no form here" if row["bytes"] is None else "does not fit"
            click.echo(f"{row['model']} on {row['backend']} {how}: {row['misfit']}")
    for name in sorted(set(BACKEND_NAMES) - {row["backend"] for row in rows}) if of_run else ():
        if not installed(BACKENDS[name]):
            click.echo(f"{name} is not installed: pip install 'reticent[{name}]'")
    if profile is not None:
        click.echo(_limits(limits))


def _row(row: dict[str, Any]) -> list[str]:
    accuracy = row["accuracy"]
    measured = ["none" if row["bytes"] is None else "does not fit", "", "", ""]
    if not row["misfit"]:
        measured = [
            f"{row['median_us']:.0f} µs",
            f"{row['p95_us']:.0f} µs",
            human_bytes(row["memory_bytes"]),
            human_bytes(row["process_bytes"]),
        ]
    return [
        row["model"],
        row["backend"],
        "" if row["bytes"] is None else f"{row['bytes']:,}",
        *measured,
        "" if accuracy is None else f"{accuracy:.2%}",
    ]


def _limits(profile: Profile) -> str:
    memory = "any amount" if profile.memory_bytes is None else human_bytes(profile.memory_bytes)
    here = len(os.sched_getaffinity(0))
    cores = here if profile.cpus is None else min(profile.cpus, here)
    return (
        f"profile {profile.name}: a process may allocate {memory} and use {cores} of the {here} "
        "cores here; memory and cores are emulated, the processor is not"
    )


@click.command()
@click.argument(
    "paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="[ARTIFACT] INPUT"
)
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path),
    help="A device's folder: use the model that is installed on it instead of ARTIFACT.",
)
@key_option
@json_option
def predict(paths: tuple[Path, ...], folder: Path | None, key: Path | None, as_json: bool) -> None:
    """Verify ARTIFACT, or the model that is installed on a device, and label what is in INPUT.

    INPUT is a .npy file, a safetensors file with an array "inputs", or an IDX file (.gz or not).
    float32 arrays are taken as they are; uint8 images are scaled as the artifact's manifest says.
    """
    import torch

    from .inputs import read_inputs

    if len(paths) != (2 if folder is None else 1) or (folder is not None and key is not None):
        raise click.UsageError("give ARTIFACT and INPUT, or --dir and INPUT (and then no --key)")
    torch.set_num_threads(1)
    model = _artifact(paths[0], key) if folder is None else _installed(folder)
    inputs = paths[-1]
    logits = model.predict(read_inputs(inputs, model.manifest.task))
    shares = torch.softmax(logits, dim=1)
    best = shares.max(dim=1)
    if as_json:
        emit(
            [
                {"label": int(label), "probability": float(share), "logits": row.tolist()}
                for label, share, row in zip(best.indices, best.values, logits, strict=True)
            ]
        )
        return
    for index, (label, share) in enumerate(zip(best.indices, best.values, strict=True)):
        click.echo(f"{index}\t{int(label)}\t{float(share):.3f}")


def _artifact(folder: Path, key: Path | None) -> Artifact:
    from reticent.compression.artifact import load_artifact
    from reticent.core.signing import read_public_key

    return load_artifact(folder, read_public_key(public_key_of(folder, key)))


def _installed(folder: Path) -> Artifact:
    """Return the model that a device uses; say so if it is not the current one."""
    from reticent.client.folder import open_device
    from reticent.client.installed import load_installed

    found = load_installed(open_device(folder))
    if found.problem:
        click.echo(f"warning: {found.problem}; using model {found.version}", err=True)
    return found.artifact
