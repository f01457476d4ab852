"""``sweep.json``: what a sweep is, written before its first run begins."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reticent.core.errors import RunError
from reticent.core.run import write_atomic
from reticent.privacy.report.tuning import sweep_digest

from .points import Base, Grid, Point, points_of

MANIFEST = "sweep.json"
VERSION = 1
_FOLDER = re.compile(r"[A-Za-z0-9+_-][A-Za-z0-9.+_-]{0,199}")


@dataclass(frozen=True)
class Manifest:
    """A sweep: its base plan, its grid, its seeds and so its points.

    Attributes:
        base: The plan that is varied.
        grid: Values of each key.
        seeds: How many seeds were asked for; 1 where the grid names them.
        points: The points, in order.
    """

    base: Base
    grid: Grid
    seeds: int
    points: tuple[Point, ...]

    @property
    def seeds_each(self) -> int:
        """How many seeds each setting has, those of a grid of seeds counted."""
        return len(self.points) // len({point.settings for point in self.points})

    @property
    def digest(self) -> str:
        """SHA-256 of the digests of the points' plans, sorted: which runs they are."""
        return sweep_digest([point.plan.digest for point in self.points])


def manifest_of(base: Base, grid: Mapping[str, Sequence[str]], seeds: int) -> Manifest:
    """Return the manifest of a sweep.

    Raises:
        PlanError: As :func:`.points_of` does.
    """
    kept = {key: tuple(values) for key, values in grid.items()}
    return Manifest(base, kept, seeds, tuple(points_of(base, kept, seeds)))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``sweep.json``, whole or not at all.

    Raises:
        RunError: If the folder cannot be written.
    """
    data = {
        "schema": VERSION,
        "sweep": manifest.digest,
        "plan": manifest.base.text,
        "overrides": manifest.base.overrides,
        "grid": manifest.grid,
        "seeds": manifest.seeds,
        "points": [
            {
                "folder": point.folder,
                "settings": dict(point.settings),
                "seed": point.seed,
                "plan": point.plan.digest,
            }
            for point in manifest.points
        ],
    }
    try:
        write_atomic(folder / MANIFEST, json.dumps(data, indent=2).encode() + b"\n")
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror}") from error


def read_manifest(folder: Path) -> Manifest:
    """Read ``sweep.json`` and make its points again.

    Raises:
        RunError: If there is no sweep here, the file is damaged, or its points now are others.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise RunError(f"{folder}: not a sweep (no {MANIFEST})")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        grid, seeds = _typed(data)
        base = Base(str(data["plan"]), tuple(data["overrides"]), str(path))
        known = [str(row["plan"]) for row in data["points"]]
        folders = [_folder(row["folder"]) for row in data["points"]]
        _require_count(grid, seeds, len(known))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RunError(f"{path}: damaged: {type(error).__name__}: {error}") from error
    manifest = manifest_of(base, grid, seeds)
    if [point.plan.digest for point in manifest.points] != known:
        raise RunError(
            f"{path}: its plans have other digests than this version of reticent gives them: it "
            "was altered, or begun by another version; start a new sweep"
        )
    return placed(manifest, dict(zip(known, folders, strict=True)))


def placed(manifest: Manifest, folders: Mapping[str, str]) -> Manifest:
    """Return the manifest with the run directories that its points have, by digest of the plan.

    A name is made of spelling and order of the grid, which may change while the plan does not.
    """
    points = (replace(p, kept=folders.get(p.plan.digest)) for p in manifest.points)
    return replace(manifest, points=tuple(points))


def _folder(name: Any) -> str:
    """Return a point's folder, if it is a name that a sweep gives: it leads nowhere else."""
    if not isinstance(name, str) or not _FOLDER.fullmatch(name):
        raise ValueError(f"folder={name!r:.80}: must be a name beside {MANIFEST}")
    return name


def _typed(data: dict[str, Any]) -> tuple[Grid, int]:
    if data["schema"] != VERSION:
        raise ValueError(f"schema={data['schema']!r}: must be {VERSION}")
    if type(data["seeds"]) is not int or data["seeds"] < 1:
        raise ValueError(f"seeds={data['seeds']!r}: must be a whole number >= 1")
    if not all(map(_is_list_of_texts, (data["overrides"], *data["grid"].values()))):
        raise ValueError("overrides and each key of grid: must be lists of texts")
    return {key: tuple(values) for key, values in data["grid"].items()}, data["seeds"]


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _require_count(grid: Grid, seeds: int, known: int) -> None:
    """Refuse a file that does not list its points, before a point is made: each costs time."""
    count = math.prod([seeds, *map(len, grid.values())])
    if count != known:
        raise ValueError(f"lists {known} points: grid and seeds make {count}")


def require_grown(folder: Path, before: Manifest, now: Manifest) -> None:
    """Accept a sweep that has every point that it had before, and maybe more.

    More seeds, more values of a key, or another key whose values include what was run: finished
    runs are kept in their folders, whatever the order and spelling of the grid. Leaving a point
    out would leave a run out of what choosing among them costs.

    Raises:
        RunError: Naming the difference, if a point of before is not among those of now.
    """
    kept = {point.plan.digest for point in now.points}
    lost = [point for point in before.points if point.plan.digest not in kept]
    if lost:
        raise RunError(
            f"{folder}: holds another sweep: {'; '.join(_differences(before, now))}; "
            f"{len(lost)} of its {len(before.points)} points would be left out ({lost[0].label}"
            f"{', …' if len(lost) > 1 else ''}). A sweep may grow (more --seeds, more values), "
            "not change: choose another --run"
        )


def _differences(before: Manifest, now: Manifest) -> list[str]:
    found = [
        f"--grid {key} ({_values(before.grid.get(key))} before, {_values(now.grid.get(key))} now)"
        for key in {**before.grid, **now.grid}
        if before.grid.get(key) != now.grid.get(key)
    ]
    if before.seeds != now.seeds:
        found.append(f"--seeds ({before.seeds} before, {now.seeds} now)")
    if (before.base.text, before.base.overrides) != (now.base.text, now.base.overrides):
        found.append("the plan or its --set overrides")
    return found or ["what its keys mean"]


def _values(values: Sequence[str] | None) -> str:
    return "absent" if values is None else ",".join(values)
