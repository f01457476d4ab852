"""Running a sweep: each point an ordinary run, what is finished never repeated."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reticent.core.errors import ReticentError, RunError
from reticent.core.run import Run, locked, write_atomic
from reticent.privacy.ledger import Ledger
from reticent.privacy.report import SIGNATURE, write_reports
from reticent.privacy.report.tuning import Candidate, write_tuning
from reticent.server.preparation import Prepared

from ..runs import FAILURE, record_failure
from ..simulate import simulate
from .manifest import MANIFEST, Manifest, placed, read_manifest, require_grown, write_manifest
from .points import Point, checked

FAILURES = "failures.json"
_BEGUN = {
    *("plan.toml", ".plan.toml.tmp", "plan.sha256", ".plan.sha256.tmp", "checkpoints", ".lock"),
    *(FAILURE, f".{FAILURE}.tmp"),
}
"""What a run may hold that has charged nobody yet."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Sweep:
    """A sweep that may begin: its folder, what it is, and what each of its points may spend.

    A run of it was chosen from all ``candidates``, those of other tasks too: tasks may hold the
    same people, as ``fashion`` does some of those of ``fashion-full``, and no name tells.
    """

    folder: Path
    manifest: Manifest
    candidates: tuple[Candidate, ...]

    def run_of(self, point: Point) -> Run:
        """Return the run directory of a point."""
        return Run(self.folder / point.folder)


@dataclass(frozen=True)
class Show:
    """Who is told what: a point begins, a line, a committed round, a point ended."""

    begins: Callable[[int, Point], None] = lambda number, point: None
    say: Say = lambda line: None
    round: Callable[[dict[str, Any]], None] = lambda metrics: None
    ended: Callable[[Point, dict[str, Any] | str, float], None] = lambda point, outcome, took: None


def open_sweep(folder: Path, manifest: Manifest) -> Sweep:
    """Check every point and write ``sweep.json``; a sweep that is there must only grow.

    A point that is there already keeps its folder, and so its run, however it is spelled now.

    Raises:
        RunError: If the folder holds something else, or a sweep with other points, or another
            process is running it; nothing is written then.
        ReticentError: Naming every point that cannot be run; nothing is written then.
    """
    _require_growth(folder, manifest)
    candidates = tuple(checked(manifest.points))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror}") from error
    with locked(Run(folder)):
        # Again: another process may have begun it meanwhile.
        manifest = placed(manifest, _require_growth(folder, manifest))
        write_manifest(folder, manifest)
    return Sweep(folder, manifest, candidates)


def _require_growth(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Refuse a sweep that does not grow what is there; return that one's folders, by digest."""
    if (folder / MANIFEST).exists():
        before = read_manifest(folder)
        require_grown(folder, before, manifest)
        return {point.plan.digest: point.folder for point in before.points}
    if folder.exists() and (not folder.is_dir() or any(_others(folder))):
        raise RunError(f"{folder}: already exists and is no sweep: choose another --run")
    return {}


def _others(folder: Path) -> list[Path]:
    """Return what the folder holds beside what a sweep that is just beginning leaves."""
    return [path for path in folder.iterdir() if path.name not in (".lock", f".{MANIFEST}.tmp")]


def run_sweep(sweep: Sweep, show: Show) -> dict[str, str]:
    """Run what is not finished, and return the reason for each point that failed, by folder.

    A point that fails, one that budgets ended among them, is recorded and the others go on; the
    next call tries it again. When the process is stopped, whatever was committed is kept and the
    next call continues after it. Models that points share are trained on public data once. The
    report of every run with a summary says what choosing among *all* points costs:
    before the first run begins, so that an old one does not count too few while a sweep grows, and
    when this returns. A point whose report cannot be written has failed, too.

    Raises:
        RunError: If another process is running the sweep, or the folder cannot be written.
    """
    prepared = Prepared()
    with locked(Run(sweep.folder)):
        if read_manifest(sweep.folder).digest != sweep.manifest.digest:
            raise RunError(f"{sweep.folder}: another process has changed the sweep; run it again")
        failures = _failures(sweep)
        _report_all(sweep)  # what cannot be reported is said at the end
        for number, point in enumerate(sweep.manifest.points, 1):
            run = sweep.run_of(point)
            if finished(run, point):
                continue
            show.begins(number, point)
            failures.pop(point.folder, None)  # it is tried again; the others' reasons still hold
            began = time.monotonic()
            try:
                outcome: dict[str, Any] | str = _run(sweep, point, prepared, show)
            except Exception as error:  # a fault in one point must not cost the others
                outcome = failures[point.folder] = reason_of(error)
                if run.folder.is_dir():
                    record_failure(run, outcome)
            _write_failures(sweep.folder, failures)
            show.ended(point, outcome, time.monotonic() - began)
        failures = {**_report_all(sweep), **failures}
        _write_failures(sweep.folder, failures)
    return failures


def reason_of(error: Exception) -> str:
    """Return why a point failed, in one line."""
    kind = "" if isinstance(error, ReticentError) else f"unexpected {type(error).__name__}: "
    return kind + " ".join(str(error).split())


def finished(run: Run, point: Point) -> bool:
    """Return whether the run of a point held all its rounds: one that budgets ended has failed."""
    summary = _summary(run, point)
    return summary is not None and summary.get("stopped") is None


def _summary(run: Run, point: Point) -> dict[str, Any] | None:
    """Return the summary of a point's run; None if it has none, or it cannot be the point's."""
    if not run.summary.is_file():
        return None
    try:
        summary = run.read_summary()
    except RunError:
        return None
    return summary if summary.get("plan") == point.plan.digest else None


def _run(sweep: Sweep, point: Point, prepared: Prepared, show: Show) -> dict[str, Any]:
    run = sweep.run_of(point)
    if run.folder.is_dir() and not run.journal.is_file():
        _begin_anew(run)
    # A report of rounds before, of a run that budgets had ended, is no report of those that follow.
    (run.folder / SIGNATURE).unlink(missing_ok=True)
    resume = run.folder.is_dir()
    simulate(
        point.plan, run.folder, resume=resume, say=show.say, progress=show.round, prepared=prepared
    )
    _report(run, sweep.candidates)
    return run.read_summary()


def _begin_anew(run: Run) -> None:
    """Make a run without a journal fit to begin: one that was stopped before it charged anybody.

    Its folder is removed, unless it holds a ledger, which a run makes before its journal: with
    nothing in that ledger the run goes on, and keeps it.

    Raises:
        RunError: If the folder holds more than that.
        LedgerError: If the ledger is damaged, or its history is gone.
    """
    files = {path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*")} - _BEGUN
    if not files:
        shutil.rmtree(run.folder)
    elif not all(_of_ledger(name, run) for name in files) or _has_charged(run):
        raise RunError(
            f"{run.folder}: has no {run.journal.name}, and holds more than a run that has just "
            "begun: what it was charged would be forgotten; put the file back, or move the folder"
        )


def _of_ledger(name: str, run: Run) -> bool:
    return name.partition("/")[0] == run.ledger.name


def _has_charged(run: Run) -> bool:
    # Opening it ends what a kill cut short of its making, and refuses a ledger that lost entries.
    with Ledger.open(run.ledger) as ledger:
        return ledger.head().sequence > 0


def _report_all(sweep: Sweep) -> dict[str, str]:
    """Bring the reports up to date, of what budgets ended too; return why some cannot be."""
    broken: dict[str, str] = {}
    for point in sweep.manifest.points:
        if _summary(sweep.run_of(point), point) is not None:
            try:
                _report(sweep.run_of(point), sweep.candidates)
            except Exception as error:  # a damaged run must not cost the others their reports
                broken[point.folder] = reason_of(error)
    return broken


def _report(run: Run, rivals: Sequence[Candidate]) -> None:
    """Write the report of a run that has a summary, unless it says all this already."""
    changed = write_tuning(run, rivals)
    if changed or not (run.folder / SIGNATURE).is_file():
        write_reports(run)


def _failures(sweep: Sweep) -> dict[str, str]:
    """Return why points that are not finished failed before, by folder, as far as it is known."""
    known: Any = None
    with suppress(OSError, ValueError, RecursionError):
        known = json.loads((sweep.folder / FAILURES).read_text(encoding="utf-8"))
    open_points = (p.folder for p in sweep.manifest.points if not finished(sweep.run_of(p), p))
    known = known if isinstance(known, dict) else {}
    return {name: str(known[name]) for name in open_points if name in known}


def failures_text(failures: dict[str, str]) -> str:
    """Return why points failed, by folder, as :data:`FAILURES` has it."""
    return json.dumps(failures, indent=2) + "\n"


def _write_failures(folder: Path, failures: dict[str, str]) -> None:
    path = folder / FAILURES
    try:
        if failures:
            write_atomic(path, failures_text(failures).encode())
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error
