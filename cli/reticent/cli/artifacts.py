"""``reticent export``, ``bench`` and ``predict``: the deployable artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from reticent.core.errors import ArtifactError
from reticent.core.plan import Backend
from reticent.core.run import Run

from .output import emit, human_bytes, table

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
@click.option(
    "--backend", type=click.Choice(["qnnpack", "x86"]), help="Int8 engine; default: the plan's."
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder; default: RUN/artifact.")
@json_option
def export(run: Path, backend: Backend | None, out: Path | None, as_json: bool) -> None:
    """Convert the final model of RUN to int8 again and write the signed artifact."""
    from reticent.server.export import export_run

    summary = export_run(Run(run), out, backend)
    backend = backend or Run(run).plan().student.quantize.backend
    folder = out or Run(run).artifact
    if as_json:
        emit({"artifact": str(folder), "backend": backend, **summary})
        return
    agreement = summary["agreement"]
    click.echo(f"wrote {folder}")
    click.echo(
        f"int8 on {backend}: {human_bytes(summary['bytes']['int8'])}, accuracy "
        f"{summary['accuracy']['int8']:.1%}, agrees with the fake-quantized student on "
        f"{agreement['fake_quantized']:.1%} of the public examples"
    )


@click.command()
@click.argument("target", type=click.Path(path_type=Path), metavar="RUN|ARTIFACT")
@click.option("--repeats", type=click.IntRange(10, 100_000), default=500, show_default=True)
@key_option
@json_option
def bench(target: Path, repeats: int, key: Path | None, as_json: bool) -> None:
    """Measure size, single-thread latency and accuracy; for a RUN, beside fp32 and the teacher."""
    from reticent.server.export import bench_artifact, bench_run

    if (target / "plan.toml").is_file():
        rows = bench_run(Run(target), repeats)
    else:
        rows = bench_artifact(target, public_key_of(target, key), repeats)
    if as_json:
        emit(rows)
        return
    click.echo(table(["model", "bytes", "median", "p95", "accuracy"], [_row(r) for r in rows]))


def _row(row: dict[str, Any]) -> list[str]:
    accuracy = row["accuracy"]
    return [
        row["model"],
        f"{row['bytes']:,}",
        f"{row['median_us']:.0f} µs",
        f"{row['p95_us']:.0f} µs",
        "" if accuracy is None else f"{accuracy:.2%}",
    ]


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path), metavar="ARTIFACT")
@click.argument("inputs", type=click.Path(path_type=Path), metavar="INPUT")
@key_option
@json_option
def predict(artifact: Path, inputs: Path, key: Path | None, as_json: bool) -> None:
    """Verify ARTIFACT, load it and label the examples in INPUT.

    INPUT is a .npy file, a safetensors file with an array "inputs", or an IDX file (.gz or not).
    float32 arrays are taken as they are; uint8 images are scaled as the artifact's manifest says.
    """
    import torch

    from reticent.compression.artifact import load_artifact
    from reticent.core.signing import read_public_key

    from .inputs import read_inputs

    torch.set_num_threads(1)
    model = load_artifact(artifact, read_public_key(public_key_of(artifact, key)))
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
