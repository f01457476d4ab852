"""The Flower ServerApp: prepare, run the rounds, finish."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from reticent.core.errors import DataError, LedgerError, PlanError, RunError
from reticent.core.personal import split_of
from reticent.core.plan import Plan
from reticent.core.run import Run
from reticent.core.tasks import load_task
from reticent.privacy.accounting import epsilon
from reticent.privacy.randomness import Randomness, SystemRandomness
from reticent.privacy.schedule import Schedule, participations, schedule_for

from .buffered import BufferedAveraging, kept_models
from .countersign import Countersigner
from .evaluation import test_accuracy
from .finish import finish
from .fleet import Fleet
from .job import Job
from .journal import Journal
from .nodes import Nodes
from .optimizer import ServerState
from .preparation import Prepared, prepare, start_accuracies
from .rounds import BudgetsSpent, RoundPlan, Tally, figures
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
        nodes: Who the nodes are and how their replies are gathered.
        prepared: What earlier runs of this process made from public data, to be used again.
        fleet: Makes the simulated fleet of a plan that has one from the run's public constants.
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
    nodes: Nodes = field(default_factory=Nodes)
    prepared: Prepared | None = None
    fleet: Callable[[bytes], Fleet] | None = None


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
        BudgetsSpent: If devices' budgets ended the training; artifact and summary of the rounds
            before are written.
        ReticentError: Whatever else went wrong; committed rounds are kept.
    """
    run, plan = settings.run, settings.run.plan()
    task = load_task(plan.task, plan.seed)
    schedule = schedule_for(plan)
    _require_fleet(settings, plan)
    buffered = plan.federation.buffered
    journal = Journal(run, kept_models(buffered))
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
        kind = PrivateAveraging if buffered is None else BufferedAveraging
        strategy = kind(
            plan,
            constants,
            state,
            clerk.commit,
            taken_part,
            settings.countersigner,
            clerk.open,
            _fleet(settings, job),
            _virtual_time(journal),
            settings.nodes,
        )
        if isinstance(strategy, BufferedAveraging):
            strategy.follow(lambda n: journal.after(n).weights if n else start.weights)
        try:
            strategy.start(grid)
        except BudgetsSpent as end:
            # What was spent must be accounted for, and what it bought is the model so far.
            if strategy.state.round:
                finish(job, strategy.state, settings.say, figures(end.round, end.tally))
            raise
        finish(job, strategy.state, settings.say)
    finally:
        journal.close()


def _require_fleet(settings: Settings, plan: Plan) -> None:
    """Refuse a plan that describes a simulated fleet, or a secret cohort, to real devices.

    Raises:
        PlanError: Naming the key.
    """
    if settings.countersigner is None:
        return
    if plan.fleet is not None:
        raise PlanError("fleet: describes simulated devices; leave it out for real ones")
    if plan.private is not None and plan.private.secret_cohort:
        raise PlanError(
            "privacy.secret_cohort=true: must be false for real devices: which of them are "
            "connected is not a secret coin of the server's, and the network sees who takes part"
        )


def _fleet(settings: Settings, job: Job) -> Fleet | None:
    """Return the run's fleet, if its plan has one.

    Raises:
        RunError: If the run was begun with another: a trace that has changed, or other sizes.
    """
    if settings.fleet is None:
        return None
    fleet, known = settings.fleet(job.start.constants), job.journal.fact("fleet")
    if known is None:
        job.journal.record("fleet", fleet.identity)
    elif known != fleet.identity:
        raise RunError(
            f"{settings.run.folder}: was begun on another fleet ({known} before, {fleet.identity} "
            "now): the file of availability or the size of messages has changed; begin a new run"
        )
    return fleet


def _virtual_time(journal: Journal) -> float:
    metrics = journal.metrics()
    return float(metrics[-1]["virtual"]["time"]) if metrics and "virtual" in metrics[-1] else 0.0


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
    start, local = job.start, job.plan.federation.local
    split = split_of(start.layout, local.personal)
    return RoundPlan(
        known or settings.identity,
        job.schedule,
        denominator,
        split.travels,
        start.constants,
        start.constants_digest,
        settings.randomness,
        split if local.personal else None,
        local.terms,
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
                job.journal.revise(f"accuracy:{name}", repr(value))
            job.journal.record("accuracy", "known")

    def open(self, cohort: list[int]) -> list[int]:
        """Record who is about to be asked; return every device that was in this round."""
        devices = {self._settings.nodes.identity(node) for node in cohort}
        return sorted(int(device) for device in self._job.journal.open([str(d) for d in devices]))

    def commit(self, state: ServerState, tally: Tally, seconds: float) -> None:
        federation = self._job.plan.federation
        tested = state.round % federation.eval_every == 0 or state.round == federation.rounds
        known = self._settings.nodes.identity
        clients, asked = (
            [str(n) for n in sorted(devices)]
            for devices in ({known(node) for node in tally.accepted}, tally.devices)
        )
        metrics: dict[str, Any] = {
            **figures(state.round, tally),
            "seconds": round(seconds, 4),
            "accuracy": self._accuracy(state) if tested else None,
            "epsilon": self._epsilon(state.round),  # of every round: nobody reads an old one for it
        }
        if tally.noised is not None:
            # Noised, so that they may be shown; the counts behind them may not.
            metrics |= {"clip": tally.noised.clip, "within_clip": tally.noised.fraction}
        if tally.virtual is not None:
            metrics["virtual"] = tally.virtual.figures()
        self._job.journal.commit(state, metrics, clients, self._settings.anchor(), asked)
        # Of a run that budgets had ended, and that goes on: it is of fewer rounds than there are.
        self._settings.run.summary.unlink(missing_ok=True)
        self._settings.progress(metrics)

    def _accuracy(self, state: ServerState) -> float:
        start = self._job.start
        return test_accuracy(self._job.plan, start.student, start.layout, state.average, self._test)

    def _epsilon(self, rounds: int) -> float | None:
        """Return epsilon of a client that took part whenever it could; None when privacy is off.

        Where few nodes are connected they are asked sooner again than the plan's passes say, so
        the journal's counts are looked at too, the round that is being committed among them.
        """
        plan, s = self._job.plan, self._job.schedule
        if s is None:
            return None
        planned = participations(plan, rounds)
        so_far = max(planned, self._job.journal.most_charged())
        return epsilon([s.over(s.round_event(), so_far)], s.delta)
