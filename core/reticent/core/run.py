"""The run directory: the one place where a run keeps what it made."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from .decoding import parse_json
from .durable import sync_folder
from .errors import PlanError, RunError
from .plan import Plan, load_plan


@dataclass(frozen=True)
class Run:
    """Paths of a run directory.

    ``plan.toml`` (resolved), ``plan.sha256``, ``metrics.jsonl`` (one line a committed round),
    ``summary.json`` (written when the run ends), ``journal.db``, ``checkpoints/``, ``ledger/``,
    ``keys/``, ``artifact/``, ``report.{html,json,md,sig}``, ``audit.json`` (if it was audited),
    ``tuning.json`` (if it is one of a sweep), ``failure.json`` (why it stopped, until it goes on),
    ``attempt.json`` (if a server runs it).
    """

    folder: Path

    @property
    def plan_file(self) -> Path:
        """The resolved plan."""
        return self.folder / "plan.toml"

    @property
    def metrics(self) -> Path:
        """One JSON line a committed round."""
        return self.folder / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """Figures of a finished run."""
        return self.folder / "summary.json"

    @property
    def journal(self) -> Path:
        """The server's journal (SQLite)."""
        return self.folder / "journal.db"

    @property
    def checkpoints(self) -> Path:
        """Folder of safetensors files."""
        return self.folder / "checkpoints"

    @property
    def ledger(self) -> Path:
        """Folder of the simulated devices' ledger."""
        return self.folder / "ledger"

    @property
    def keys(self) -> Path:
        """Folder of the signing key."""
        return self.folder / "keys"

    @property
    def artifact(self) -> Path:
        """Folder of the deployable artifact."""
        return self.folder / "artifact"

    @property
    def attempt(self) -> Path:
        """What a server's process tells of itself; a simulation has none."""
        return self.folder / "attempt.json"

    @property
    def resume_command(self) -> str:
        """The command that continues the run."""
        command = "server run" if self.attempt.is_file() else "simulate"
        return f"reticent {command} --run {self.folder} --resume"

    def plan(self) -> Plan:
        """Return the run's plan, checked against its recorded digest.

        Raises:
            RunError: If there is no run here, or its plan was altered.
        """
        if not self.plan_file.is_file():
            raise RunError(f"{self.folder}: not a run directory (no plan.toml)")
        try:
            plan = load_plan(self.plan_file)
        except PlanError as error:
            raise RunError(f"{self.folder}: the run's plan was altered: {error}") from error
        recorded = _read_text(self.folder / "plan.sha256").strip()
        if recorded != plan.digest:
            raise RunError(
                f"{self.plan_file}: was altered (digest {plan.digest[:12]}, recorded "
                f"{recorded[:12]}): restore it or start a new run"
            )
        return plan

    def read_summary(self) -> dict[str, Any]:
        """Return ``summary.json``.

        Raises:
            RunError: If the run has not finished, or the file is damaged.
        """
        if not self.summary.is_file():
            raise RunError(
                f"{self.folder}: the run has not finished; continue it with `{self.resume_command}`"
            )
        return _parse(self.summary, _read_text(self.summary))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return one dictionary a committed round.

        Raises:
            RunError: If the file is damaged.
        """
        if not self.metrics.is_file():
            return []
        return [_parse(self.metrics, line) for line in _read_text(self.metrics).splitlines()]


def create_run(folder: Path, plan: Plan) -> Run:
    """Make a run directory for ``plan``.

    Raises:
        RunError: If the folder is in use or cannot be written.
    """
    if folder.exists() and not (folder.is_dir() and _is_free(folder)):
        raise RunError(
            f"{folder}: already exists and is not empty: choose another --run, or continue it "
            "with --resume"
        )
    run = Run(folder)
    try:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        text = tomli_w.dumps(without_none(plan.model_dump(mode="json")))
        write_atomic(run.plan_file, text.encode())
        write_atomic(folder / "plan.sha256", (plan.digest + "\n").encode())
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror}") from error
    return run


def _is_free(folder: Path) -> bool:
    """Return whether a folder is empty, or holds only what a run leaves that was stopped at once.

    ``checkpoints`` comes first and ``plan.sha256`` last, so that nobody's own plan is taken for it.
    """
    names = {path.name for path in folder.iterdir()}
    begun = {"checkpoints", "plan.toml", ".plan.toml.tmp", ".plan.sha256.tmp"}
    checkpoints = folder / "checkpoints"
    mine = checkpoints.is_dir() and not any(checkpoints.iterdir()) and names <= begun
    return not names or mine


def open_run(folder: Path, plan: Plan | None = None) -> Run:
    """Open an existing run; with ``plan`` given, it must be the run's own.

    Raises:
        RunError: If there is no run here, or the plan is another one.
    """
    run = Run(folder)
    own = run.plan()
    if plan is not None and plan.digest != own.digest:
        raise RunError(
            f"{folder}: was started with another plan; it differs at "
            f"{', '.join(_differences(own.model_dump(), plan.model_dump()))}"
        )
    return run


@contextmanager
def locked(run: Run) -> Iterator[None]:
    """Hold the run for this process.

    Raises:
        RunError: If another process is using it, or its lock cannot be written.
    """
    try:
        handle = (run.folder / ".lock").open("w")
    except OSError as error:
        raise RunError(f"{run.folder}/.lock: cannot be written: {error.strerror}") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"{run.folder}: is in use by another process") from error
        yield


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that after a crash either the old or the new content is there.

    Raises:
        OSError: If it cannot be written; nothing is left of the attempt.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):  # on a full disk it would take what is freed next
            temporary.unlink()
        raise
    sync_folder(path.parent)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from error


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        data = parse_json(text)
    except ValueError as error:
        raise RunError(f"{path}: damaged: {error}") from error
    if not isinstance(data, dict):
        raise RunError(f"{path}: damaged: must hold a JSON object")
    return data


def without_none(data: dict[str, Any]) -> dict[str, Any]:
    """Return nested dictionaries without their None values, which TOML cannot hold."""
    return {k: _whole(v) for k, v in data.items() if v is not None}


def _whole(value: Any) -> Any:
    if isinstance(value, list):
        return [_whole(v) for v in value]
    return without_none(value) if isinstance(value, dict) else value


def _differences(a: Any, b: Any, path: str = "") -> list[str]:
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [] if a == b else [f"{path} ({a} before, {b} now)"]
    keys = [k for k in {**a, **b} if path != "engine" or k == "device"]  # as the digest has it
    return [d for k in keys for d in _differences(a.get(k), b.get(k), f"{path}.{k}".strip("."))]
