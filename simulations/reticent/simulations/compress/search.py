"""The search: from the plan that was given, one technique after another, keeping what helps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from reticent.core.errors import PlanError, ReticentError
from reticent.core.plan import Plan
from reticent.core.tasks import load_task
from reticent.server.preparation import Prepared

from .moves import TECHNIQUES, Candidate, changed, name_of
from .public_half import PublicHalf
from .rehearsal import require_rehearsal
from .targets import Target
from .trials import Trial, run_trial

Say = Callable[[str], None]
Measure = Callable[[Candidate], Trial]

_SAME = 0.05  # share by which two measured latencies of one model may differ


@dataclass
class Outcome:
    """What a search found.

    Attributes:
        targets: What was to be reached.
        trials: Everything that was measured, in order; the first is the plan that was given.
        refused: Candidates that cannot be, with the reason.
        best: The trial that nothing after it clearly beats; see :func:`beats`.
    """

    targets: tuple[Target, ...]
    trials: list[Trial] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)

    @property
    def best(self) -> Trial:
        """Return the trial that won: the last that beat the one before it."""
        best = self.trials[0]
        for trial in self.trials[1:]:
            if beats(trial, best, self.targets):
                best = trial
        return best

    @property
    def met(self) -> bool:
        """Whether the best meets every target."""
        return excess(self.best, self.targets) == 0


def excess(trial: Trial, targets: Sequence[Target]) -> float:
    """Return by how much a trial misses the targets: 0, or the sum of log(value / limit)."""
    return sum(max(0.0, math.log(trial.value(t.kind) / t.limit)) for t in targets)


def beats(one: Trial, other: Trial, targets: Sequence[Target]) -> bool:
    """Return whether ``one`` is nearer to the targets, or as near and clearly more accurate.

    Clearly: by more than one standard error of the other's accuracy (:func:`standard_error`).
    Held-out examples are few, and a search that took every small gain would end at the luckiest
    candidate and not at the best. For the same reason being cheaper is not enough, once the targets
    are met: of many cheaper candidates some happen to look as accurate.
    """
    nearer = round(excess(one, targets), 3), round(excess(other, targets), 3)
    if nearer[0] != nearer[1]:
        return nearer[0] < nearer[1]
    return one.accuracy - other.accuracy > standard_error(other)


def standard_error(trial: Trial) -> float:
    """Return the standard error of a trial's accuracy: that of a share of ``judged`` draws."""
    return math.sqrt(trial.accuracy * (1 - trial.accuracy) / trial.judged)


def ties(outcome: Outcome) -> list[Trial]:
    """Return the other trials that meet the targets and whose accuracy the best's does not beat."""
    best = outcome.best
    equal = (t for t in outcome.trials if best.accuracy - t.accuracy <= standard_error(best))
    return [t for t in equal if t is not best and excess(t, outcome.targets) == 0]


def front(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that no other dominates (Pareto), smallest first."""
    kept = [t for t in trials if not any(dominates(other, t) for other in trials)]
    return sorted(kept, key=lambda trial: (trial.size, -trial.accuracy))


def dominates(one: Trial, other: Trial) -> bool:
    """Return whether ``one`` is better in something and worse in nothing.

    Latencies that differ by less than a twentieth, which is what repeating a measurement changes
    them by, count as equal.
    """
    first, second = _figures(one), _figures(other)
    if any(a > b for a, b in zip(first, second, strict=True)):
        return False
    if one.latency > (1 + _SAME) * other.latency:
        return False
    return first != second or one.latency < (1 - _SAME) * other.latency


def _figures(trial: Trial) -> tuple[float, ...]:
    return (trial.size, trial.bytes, -trial.accuracy)


def search(plan: Plan, targets: Sequence[Target], most: int, say: Say) -> Outcome:
    """Search from ``plan`` and measure at most ``most`` candidates.

    Raises:
        ReticentError: If the plan that was given cannot itself be measured.
    """
    require_rehearsal(plan)
    task = PublicHalf(load_task(plan.task, plan.seed), plan.seed, plan.task.public_labels)
    prepared = Prepared()
    return climb(plan, targets, most, say, lambda given: run_trial(given, task, prepared))


def climb(plan: Plan, targets: Sequence[Target], most: int, say: Say, measure: Measure) -> Outcome:
    """Make the best move of each technique in turn, as long as one helps (coordinate descent).

    Raises:
        PlanError: If ``most`` is below 1.
        ReticentError: As ``measure``, for the plan that was given.
    """
    if most < 1:
        raise PlanError(f"--trials {most}: must be at least 1")
    outcome = Outcome(tuple(targets))
    _tell(outcome, measure(Candidate(plan)), say)
    seen = {plan.digest}
    before: Trial | None = None
    while before is not outcome.best:
        before = outcome.best
        for technique in TECHNIQUES:
            for candidate in _candidates(outcome, technique, seen):
                if len(outcome.trials) >= most:
                    return outcome
                try:
                    _tell(outcome, measure(candidate), say)
                except ReticentError as error:
                    _refuse(outcome, candidate.name, error, say)
    return outcome


def _candidates(outcome: Outcome, technique: str, seen: set[str]) -> Iterator[Candidate]:
    base = outcome.best  # all moves of one technique start from the same trial
    for move in TECHNIQUES[technique]:
        moves = {**base.candidate.moves, technique: move.name}
        try:
            candidate = Candidate(changed(base.candidate.plan, move), moves)
        except PlanError as error:
            outcome.refused.append((name_of(moves), str(error)))
            continue
        if candidate.plan.digest not in seen:
            seen.add(candidate.plan.digest)
            yield candidate


def _tell(outcome: Outcome, trial: Trial, say: Say) -> None:
    outcome.trials.append(trial)
    say(
        f"{len(outcome.trials):>3}  {trial.accuracy:6.1%}  {trial.size:>8,} B  "
        f"{trial.latency:>6.0f} µs  {trial.bytes:>7,} B up  {trial.candidate.name}"
    )


def _refuse(outcome: Outcome, name: str, error: ReticentError, say: Say) -> None:
    outcome.refused.append((name, str(error)))
    say(f"     refused  {name}: {error}")
