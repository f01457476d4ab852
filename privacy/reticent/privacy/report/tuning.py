"""What choosing among runs costs: a run of a sweep says so in its own report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from reticent.core.errors import PrivacyError, RunError
from reticent.core.plan import Plan
from reticent.core.run import Run, write_atomic

from ..accounting import epsilon
from ..events import Event, NonPrivate, event_from_json
from ..schedule import Schedule
from ..selection import in_terms_of, selection_epsilon
from .signing import SIGNATURE
from .words import count_text, delta_text, epsilon_text, portable

TUNING = "tuning.json"
LARGEST = 64 << 20
VERSION, WITH_WEIGHTS = 1, 2
"""Of the file; the second where weights came along, whose price an older reader would not see."""


@dataclass(frozen=True)
class Candidate:
    """One run among those to choose from: its plan, and the most that it may do to one client.

    Attributes:
        plan: Digest of its plan.
        readers: Against readers of the models, over all rounds that one client may take part in.
        server: Ditto, against the server.
        earlier: SHA-256 of the weights that its models begin with, and what they cost whoever sees
            them, which ``readers`` and ``server`` leave out; None if they cost nothing.
    """

    plan: str
    readers: Event
    server: Event
    earlier: tuple[str, Event] | None = None

    @property
    def before(self) -> list[Event]:
        """What the weights cost, as events."""
        return [] if self.earlier is None else [self.earlier[1]]


def candidate(plan: Plan, schedule: Schedule | None) -> Candidate:
    """Return the run of ``plan`` as a candidate; without a schedule nothing is promised."""
    if schedule is None:
        return Candidate(plan.digest, NonPrivate(), NonPrivate())
    rounds, trained = schedule.participations, plan.teacher.trained
    return Candidate(
        plan.digest,
        schedule.round_event().times(rounds),
        schedule.server_event().times(rounds),
        trained and schedule.earlier and (trained.weights, schedule.earlier),
    )


def figures(candidates: Sequence[Candidate], own: Plan) -> dict[str, Any]:
    """Return what choosing among ``candidates`` costs, in the terms of one plan's promise.

    All of them are counted, as if the same people took part in each as often as its schedule
    allows: a plan's seed decides who holds which example, and tasks of different names may hold
    the same people, so nothing less can be ruled out. What
    is the best of them, and all of them, is a function of all of them, so its epsilon is at most
    that of their composition; ``selection`` is that of another procedure, which was not run.
    Weights that several of them begin with are one release, and counted once.
    """
    private = own.private
    if private is None:
        unknown = {"unit": None, "relation": None, "delta": None, "selection": "infinity"}
        return {**unknown, "epsilon": "infinity", "server_epsilon": "infinity"}
    terms, delta = (private.unit, private.relation), private.delta
    brought = dict.fromkeys(c.earlier for c in candidates if c.earlier is not None)
    before = in_terms_of([event for _, event in brought], *terms)
    readers = [in_terms_of([c.readers], *terms) for c in candidates]
    server = [in_terms_of([c.server], *terms) for c in candidates]
    alone = [in_terms_of([*c.before, c.readers], *terms) for c in candidates]
    return {
        "unit": private.unit,
        "relation": private.relation,
        "delta": delta,
        "epsilon": portable(_together([before, *readers], delta)),
        "server_epsilon": portable(_together([before, *server], delta)),
        "selection": portable(selection_epsilon(alone, delta, len(candidates))),
    }


def _together(histories: Sequence[Sequence[Event]], delta: float) -> float:
    return epsilon([event for events in histories for event in events], delta, alike=False)


def sweep_digest(plans: Iterable[str]) -> str:
    """Return the SHA-256 of the digests of the plans, sorted: which runs they are."""
    return hashlib.sha256("\n".join(sorted(plans)).encode()).hexdigest()


def write_tuning(run: Run, candidates: Sequence[Candidate]) -> bool:
    """Write ``tuning.json`` of a run among ``candidates``; return whether it said something else.

    Guarantee: a signed report in the folder counts what ``tuning.json`` counts, whatever stops the
    process and whatever cannot be written. The signature of a report of other candidates is removed
    before the file says so; a report without one is to be written again.

    Raises:
        RunError: If it cannot be written.
    """
    rows = [
        {
            "plan": c.plan,
            "readers": json.loads(c.readers.to_json()),
            "server": json.loads(c.server.to_json()),
            **_brought(c),
        }
        for c in candidates
    ]
    version = WITH_WEIGHTS if any(c.earlier for c in candidates) else VERSION
    content = json.dumps({"schema": version, "runs": rows}, indent=1).encode() + b"\n"
    path = run.folder / TUNING
    try:
        if path.is_file() and path.read_bytes() == content:
            return False
        (run.folder / SIGNATURE).unlink(missing_ok=True)
        write_atomic(path, content)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error
    return True


def _brought(c: Candidate) -> dict[str, Any]:
    if c.earlier is None:
        return {}
    weights, event = c.earlier
    return {"earlier": {"weights": weights, "event": json.loads(event.to_json())}}


def read_tuning(run: Run, plan: Plan) -> dict[str, Any] | None:
    """Return the section ``tuning`` of a run's report; None if it is not known to be one of many.

    Raises:
        RunError: If the file is damaged, or the run is not among those that it names.
    """
    path = run.folder / TUNING
    if not path.exists():
        return None
    candidates = _read(run)
    if plan.digest not in {c.plan for c in candidates}:
        raise RunError(
            f"{path}: does not name the run's own plan {plan.digest[:12]}: it belongs to another "
            "run; `reticent sweep --resume` writes it again"
        )
    which = {"sweep": sweep_digest(c.plan for c in candidates), "runs": len(candidates)}
    return {**which, **figures(candidates, plan)}


def _read(run: Run) -> list[Candidate]:
    path = run.folder / TUNING
    try:
        if path.stat().st_size > LARGEST:
            raise RunError(f"{path}: is larger than any sweep's: at most {LARGEST} bytes")
        data = json.loads(path.read_bytes())
        if data["schema"] not in (VERSION, WITH_WEIGHTS) or not data["runs"]:
            raise RunError(
                f"{path}: schema={data['schema']!r}: must be {VERSION} or {WITH_WEIGHTS}, and "
                "name runs"
            )
        return [_candidate(row) for row in data["runs"]]
    except (OSError, ValueError, TypeError, KeyError, RecursionError, PrivacyError) as error:
        raise RunError(f"{path}: damaged: {type(error).__name__}: {error}") from error


def _candidate(row: dict[str, Any]) -> Candidate:
    readers, server = (event_from_json(json.dumps(row[key])) for key in ("readers", "server"))
    if not isinstance(row["plan"], str):
        raise TypeError("plan must be a string")
    if "earlier" not in row:
        return Candidate(row["plan"], readers, server)
    weights, event = row["earlier"]["weights"], event_from_json(json.dumps(row["earlier"]["event"]))
    if not isinstance(weights, str):
        raise TypeError("weights must be a string")
    return Candidate(row["plan"], readers, server, (weights, event))


def tuning_text(tuning: dict[str, Any] | None) -> str:
    """Return the charge for tuning in a sentence or two."""
    if tuning is None:
        return "not counted: how many runs were made to choose settings is unknown to the tool"
    if tuning["runs"] == 1:
        return "nothing more: the run is the only one of its sweep; runs outside it are unknown"
    outside = "Runs outside the sweep are unknown to the tool."
    return " ".join(part for part in (_composed(tuning), _random(tuning), outside) if part)


def tuning_note(tuning: dict[str, Any] | None) -> str:
    """Return what must stand beside the promise of one run among several; else nothing."""
    if tuning is None or tuning["runs"] < 2:
        return ""
    text = tuning_text(tuning)
    return f"{text[0].upper()}{text[1:]}"


def _composed(tuning: dict[str, Any]) -> str:
    at = ""
    if tuning["delta"] is not None:
        at = f" (δ = {delta_text(tuning['delta'])}, one {tuning['unit']}, {tuning['relation']})"
    return (
        f"{count_text(tuning['runs'], 'run')} were planned together (sweep "
        f"{tuning['sweep'][:12]}). Picking one of them by its accuracy is not free: together they "
        f"spend at most ε = {epsilon_text(tuning['epsilon'])} against readers of the models and "
        f"{epsilon_text(tuning['server_epsilon'])} against the server{at}, composed over all runs, "
        "of other tasks too, as if the same people took part in each."
    )


def _random(tuning: dict[str, Any]) -> str:
    if tuning["selection"] == "infinity":
        return ""
    return (
        f"Had the number of runs been drawn at random (geometric, {tuning['runs']:,} on average), "
        "each with settings drawn at random, and only the best been seen, it would have cost ε = "
        f"{epsilon_text(tuning['selection'])} (Papernot and Steinke 2022, theorem 2); this sweep "
        "ran a fixed list, so that number does not hold for it."
    )
