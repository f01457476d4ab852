"""The Flower ServerApp: prepare, run the rounds, finish."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from reticent.core.errors import DataError, LedgerError, RunError
from reticent.core.run import Run
from reticent.core.tasks import load_task
from reticent.privacy.accounting import epsilon
from reticent.privacy.randomness import Randomness, SystemRandomness
from reticent.privacy.schedule import Schedule, participations, schedule_for

from .countersign import Countersigner
from .evaluation import test_accuracy
from .finish import finish
from .fleet import Fleet
from .job import Job
from .journal import Journal
from .optimizer import ServerState
from .preparation import Prepared, prepare, start_accuracies
from .rounds import RoundPlan, Tally
from .strategy import PrivateAveraging


@dataclass(frozen=True)
class Settings:
    """What a run needs besides its plan.

    Attributes:
        run: The run directory; its plan has been written.
        identity: Identity of the run on the devices' ledgers; the first start's is kept.
        say: Takes a line for a person.
        progress: Takes each committed round's metrics.
        anchor: Returns the ledger head to record with a round, or None when ledgers are elsewhere.
        holds_anchor: Whether the ledger still holds a recorded head.
        close: Called when the run ends, whatever its end.
        ended: Is told before that how it ended: with an error, or None.
        randomness: Where the server's own noise comes from; the operating system, unless a
            simulation asks for a seeded source.
        countersigner: Judges and countersigns the ledgers of real devices; None in a simulation.
        fleet: Who the nodes are and how their replies are gathered.
        prepared: What earlier runs of this process made from public data, to be used again.
    """

    run: Run
    identity: str
    say: Callable[[str], None]
    progress: Callable[[dict[str, Any]], None]
    anchor: Callable[[], str | None] = lambda: None
    holds_anchor: Callable[[str], bool] = lambda _: True
    close: Callable[[], None] = lambda: None
    ended: Callable[[BaseException | None], None] = lambda error: None
    randomness: Randomness = field(default_factory=SystemRandomness)
    countersigner: Countersigner | None = None
    fleet: Fleet = field(default_factory=Fleet)
    prepared: Prepared | None = None


def build_server_app(settings_of: Callable[[Context], Settings]) -> ServerApp:
    """Return a ServerApp that runs the plan of the run directory it is given."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        settings = settings_of(context)
        try:
            run_federation(settings, grid)
            settings.ended(None)
        except BaseException as error:
            settings.ended(error)
            raise
        finally:
            settings.close()

    return app


def run_federation(settings: Settings, grid: Grid) -> None:
    """Run or resume a federation to its end: artifact and summary included.

    Raises:
        ReticentError: Whatever went wrong; committed rounds are kept.
    """
    run, plan = settings.run, settings.run.plan()
    task = load_task(plan.task, plan.seed)
    schedule = schedule_for(plan)
    journal = Journal(run)
    try:
        _check_anchor(settings, journal)
        journal.rewrite_metrics()
        start = prepare(plan, task, journal, settings.say, settings.prepared)
        state = journal.latest() or ServerState.begin(start.weights, _first_clip(schedule))
        if state.round:
            settings.say(f"resuming after round {state.round}")
        job = Job(run, plan, task, schedule, start, journal)
        constants = _round_plan(settings, job)
        clerk = _Clerk(settings, job)
        taken_part = {int(node): rounds for node, rounds in journal.asked().items()}
        strategy = PrivateAveraging(
            plan,
            constants,
            state,
            clerk.commit,
            taken_part,
            settings.countersigner,
            settings.fleet,
        )
        strategy.start(grid)
        finish(job, strategy.state, settings.say)
    finally:
        journal.close()


def _check_anchor(settings: Settings, journal: Journal) -> None:
    recorded = journal.anchor()
    if recorded is not None and not settings.holds_anchor(recorded):
        raise LedgerError(
            f"{settings.run.ledger}: the ledger does not hold the head that the journal recorded: "
            "it was rolled back, truncated or replaced, and no more may be charged to it"
        )


def _first_clip(schedule: Schedule | None) -> float | None:
    return schedule.clip if schedule is not None and schedule.unit == "client" else None


def _round_plan(settings: Settings, job: Job) -> RoundPlan:
    known = job.journal.fact("run")
    if known is None:
        job.journal.record("run", settings.identity)
    _record_randomness(settings, job)
    denominator = job.plan.federation.sampling_rate * job.task.nominal_examples
    if denominator <= 0:
        raise DataError(f"task {job.task.name}: nominal_examples must be at least 1")
    start = job.start
    return RoundPlan(
        known or settings.identity,
        job.schedule,
        denominator,
        start.layout,
        start.constants,
        start.constants_digest,
        settings.randomness,
    )


def _record_randomness(settings: Settings, job: Job) -> None:
    """Record where the server's noise comes from, for the report; a run has one source.

    Raises:
        RunError: If the run was begun with another source.
    """
    if job.schedule is None or job.schedule.unit != "client":
        return  # the server draws no noise
    given, known = settings.randomness.description, job.journal.fact("randomness")
    if known is None:
        job.journal.record("randomness", given)
    elif known != given:
        raise RunError(
            f"{settings.run.folder}: was begun with noise that is {known}, now it is {given}: one "
            "run must have one source"
        )


class _Clerk:
    """Turns an applied round into a committed one, with its metrics."""

    def __init__(self, settings: Settings, job: Job) -> None:
        self._settings, self._job = settings, job
        self._test = job.task.test()
        if job.journal.fact("accuracy") is None:
            for name, value in start_accuracies(job.start, job.task).items():
                job.journal.record(f"accuracy:{name}", repr(value))
            job.journal.record("accuracy", "known")

    def commit(self, state: ServerState, tally: Tally, seconds: float) -> None:
        federation = self._job.plan.federation
        tested = state.round % federation.eval_every == 0 or state.round == federation.rounds
        known = self._settings.fleet.identity
        clients, asked = (
            [str(n) for n in sorted({known(node) for node in nodes})]
            for nodes in (tally.accepted, tally.nodes)
        )
        metrics: dict[str, Any] = {
            "round": state.round,
            "replies": tally.sum.count,
            "asked": tally.asked,
            "dropped": dict(tally.dropped),
            "bytes_up": tally.bytes_up,
            "bytes_down": tally.bytes_down,
            "bytes_constants": tally.first_bytes_down,
            "seconds": round(seconds, 4),
            "accuracy": self._accuracy(state) if tested else None,
            "epsilon": self._epsilon(state.round, asked) if tested else None,
        }
        if tally.noised is not None:
            # Noised, so that they may be shown; the counts behind them may not.
            metrics |= {"clip": tally.noised.clip, "within_clip": tally.noised.fraction}
        self._job.journal.commit(state, metrics, clients, self._settings.anchor(), asked)
        self._settings.progress(metrics)

    def _accuracy(self, state: ServerState) -> float:
        start = self._job.start
        return test_accuracy(self._job.plan, start.student, start.layout, state.average, self._test)

    def _epsilon(self, rounds: int, asked: list[str]) -> float | None:
        """Return epsilon of a client that took part whenever it could; None when privacy is off.

        Where few nodes are connected they are asked sooner again than the plan's passes say, so
        the journal's counts are looked at too, with those ``asked`` in the round that is being
        committed.
        """
        plan, s = self._job.plan, self._job.schedule
        if s is None:
            return None
        federation = plan.federation.model_copy(update={"rounds": rounds})
        planned = participations(plan.model_copy(update={"federation": federation}))
        counted = Counter(self._job.journal.asked())
        counted.update(asked)
        so_far = max(planned, *counted.values())
        return epsilon([s.over(s.round_event(), so_far)], s.delta)
