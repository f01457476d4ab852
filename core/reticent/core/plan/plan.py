"""A whole plan: its sections, what must fit together, and its digest."""

from __future__ import annotations

import hashlib
import json
import math
from fractions import Fraction
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ..fleet import Fleet
from ..population import check_population
from ..section import Section
from .engine import Engine
from .federation import Federation, Local, Robust
from .privacy import DEFAULT_EPSILON, Privacy
from .student import Student
from .task import TaskSection
from .teacher import Teacher
from .updates import Updates


class Plan(Section):
    """A whole plan. Frozen; build one with :func:`parse_plan` or :func:`load_plan`."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    task: TaskSection = TaskSection()
    teacher: Teacher = Teacher()
    student: Student = Student()
    privacy: Privacy | Literal["off"] = Privacy(epsilon=DEFAULT_EPSILON)
    federation: Federation = Federation()
    updates: Updates = Updates()
    engine: Engine = Engine()
    fleet: Fleet | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        f, p = self.federation, self.privacy
        if f.clients_per_round > self.task.clients:
            raise ValueError(
                f"federation.clients_per_round={f.clients_per_round}: must be at most "
                f"task.clients={self.task.clients}"
            )
        if self.updates.delta and self.task.clients >= 2 * f.clients_per_round:
            raise ValueError(
                f"updates.delta={list(self.updates.delta)}: must be absent when "
                f"federation.clients_per_round={f.clients_per_round} is at most half of "
                f"task.clients={self.task.clients}: hardly any client would hold the last model, "
                "and whole models in float32 cost more than updates.broadcast"
            )
        if f.quorum > f.clients_per_round:
            raise ValueError(
                f"federation.min_replies={f.min_replies}: must be at most "
                f"federation.clients_per_round={f.clients_per_round}"
            )
        self._teachers_fit()
        self._trained_fits()
        if self.updates.error_feedback and p != "off" and p.unit == "client":
            raise ValueError(
                'updates.error_feedback=true: must be false when privacy.unit is "client", because '
                "what is left out of an update without noise would count in a later round, whose "
                "noise is not meant for it"
            )
        shares = p != "off" and p.trust == "aggregator" and p.unit == "example"
        if shares and f.steps_per_round != 1:
            raise ValueError(
                f"federation.steps_per_round={f.steps_per_round}: must be 1 when privacy.trust is "
                '"aggregator", because a noise share protects only a gradient sum taken at the '
                'broadcast model; use privacy.trust="local" for several local steps'
            )
        if shares:
            _only_the_broadcast_model(f.local)
        check_population(self)
        self._closes_late_enough()
        if p != "off" and p.trust == "aggregator":
            _only_the_sum(f.robust, p)
        return self

    @property
    def asked_per_round(self) -> int:
        """Clients that a round asks: more than are used where the fleet is over-selected."""
        factor = 1.0 if self.fleet is None else self.fleet.over_selection
        # By its decimal text: 100 * 1.1 is more than 110 in floats.
        return math.ceil(self.federation.clients_per_round * Fraction(str(factor)))

    @property
    def first_come(self) -> bool:
        """Whether the updates of a round are those that come first, as no virtual clock decides."""
        return self.federation.enough is not None and self.fleet is None

    def _closes_late_enough(self) -> None:
        f, p = self.federation, self.privacy
        if f.enough is None:
            return
        if not f.quorum <= f.enough <= f.clients_per_round:
            raise ValueError(
                f"federation.enough={f.enough}: must be from the fewest replies of a round, "
                f"{f.quorum}, to federation.clients_per_round={f.clients_per_round}"
            )
        if p != "off" and p.unit == "client":
            raise ValueError(
                f'federation.enough={f.enough}: must be absent when privacy.unit is "client", '
                "because the sum is divided by clients_per_round whoever replied"
            )
        if f.sampling == "poisson":
            raise ValueError(
                f'federation.enough={f.enough}: must be absent when federation.sampling is "poisson'
                '", because the sum is divided by clients_per_round whoever replied'
            )
        if f.buffered is not None:
            raise ValueError(
                f"federation.enough={f.enough}: must be absent with federation.buffered, which "
                "waits for nobody: a buffer is full with clients_per_round updates"
            )

    def _teachers_fit(self) -> None:
        task, teacher, distill = self.task, self.teacher, self.student.distill
        if task.public_labels is not None and task.public_labels > task.public_examples:
            raise ValueError(
                f"task.public_labels={task.public_labels}: must be at most "
                f"task.public_examples={task.public_examples}"
            )
        if distill.mode == "online" and task.public_labels is not None:
            raise ValueError(
                f"task.public_labels={task.public_labels}: must be left out when "
                'student.distill.mode is "online", because a teacher that learns together with the '
                "student labels nothing before it"
            )
        single = distill.mode == "online" or {"feature", "relation"} & set(distill.terms)
        rewinds = (
            self.student.prune.kind != "none" and self.student.prune.schedule == "weight-rewind"
        )
        if rewinds and (distill.mode == "online" or "feature" in distill.terms):
            raise ValueError(
                'student.prune.schedule="weight-rewind": must be another schedule when '
                'student.distill.mode is "online" or student.distill.kind compares hidden layers, '
                "because the beginning of that training cannot be repeated without the rest"
            )
        if teacher.count > 1 and single:
            raise ValueError(
                f"teacher.count={teacher.count}: must be 1 when student.distill.mode is "
                f'"online" or student.distill.kind (here "{distill.kind}") compares hidden '
                "layers; several teachers give one answer, but no one layer"
            )

    def _trained_fits(self) -> None:
        trained, p = self.teacher.trained, self.privacy
        if trained is None:
            return
        if p == "off":
            raise ValueError(
                'teacher.trained: must be absent when privacy is "off", because nothing is '
                "promised then that it could count towards"
            )
        for key, given, other in (
            ("unit", trained.unit, p.unit),
            ("relation", trained.relation, p.relation),
        ):
            if given != other:
                raise ValueError(
                    f'teacher.trained.{key}="{given}": must be privacy.{key}, which is "{other}", '
                    "because an epsilon over different ones has no meaning"
                )

    def canonical(self) -> str:
        """Return the plan as canonical JSON: sorted keys, no spaces, every default written out."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """SHA-256 of the plan as hex. ``engine`` is left out: it cannot change any result.

        But for a device other than the CPU, whose results have other bits: with the same digest,
        and so the same noise and the same charge, two of them would tell what they differ by.

        So is what later versions added, where it has its default: a plan keeps its digest, on
        which a simulation's noise depends.
        """
        data = _without_later(self.model_dump(mode="json", exclude={"engine"}))
        if self.engine.device != "cpu":
            data["engine"] = {"device": self.engine.device}
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def private(self) -> Privacy | None:
        """The privacy section, or None when privacy is off."""
        return None if self.privacy == "off" else self.privacy


def _only_the_broadcast_model(local: Local) -> None:
    """Refuse what a device keeps between rounds where its updates hold a noise share only.

    Raises:
        ValueError: Naming the key and the reason.
    """
    if local.scaffold:
        raise ValueError(
            "federation.local.scaffold=true: must be false when privacy.trust is "
            '"aggregator" and privacy.unit is "example": a control variate is an update with a '
            "noise share, and cohorts that differ would add different sums of the same shares to "
            'the models; use privacy.trust="local" or privacy.unit="client"'
        )
    if local.personal:
        raise ValueError(
            f"federation.local.personal={list(local.personal)}: must be empty when privacy.trust "
            'is "aggregator" and privacy.unit is "example": a noise share protects only a gradient '
            "sum taken at the broadcast model, and a personal layer is not broadcast; use "
            'privacy.trust="local" or privacy.unit="client"'
        )


_LATER: dict[str, Any] = {
    "fleet": None,
    "federation.sampling": "passes",
    "federation.enough": None,
    "federation.limit": None,
    "federation.window": 1,
    "federation.buffered": None,
    "federation.local": Local().model_dump(mode="json"),
    "federation.robust": Robust().model_dump(mode="json"),
    "federation.server.second_momentum": 0.99,
    "federation.server.adaptivity": 1e-8,
    "privacy.secret_cohort": False,
    "teacher.trained": None,
    "teacher.device": "cpu",
}
"""Keys that came later, and what a plan without them means: their defaults, for good."""


def _without_later(data: dict[str, Any]) -> dict[str, Any]:
    """Take from a dumped plan the keys that came later and have their defaults."""
    for path, default in _LATER.items():
        *sections, key = path.split(".")
        section: Any = data
        for name in sections:
            section = section[name]
        if isinstance(section, dict) and section[key] == default:
            del section[key]
    return data


def _only_the_sum(robust: Robust, privacy: Privacy) -> None:
    """Refuse what looks at single updates where the noise is meant for their sum.

    Raises:
        ValueError: Naming the key and the reason.
    """
    if robust.kind == "mean":
        return
    why = (
        "a single update holds a noise share only, and what is chosen among updates is no function "
        'of their sum; use privacy.trust="local"'
        if privacy.unit == "example"
        else "the noise is calibrated to how far one client moves a mean of bounded updates, and "
        "it moves a median or a choice among updates further"
    )
    raise ValueError(
        f'federation.robust.kind="{robust.kind}": must be "mean" when privacy.trust is '
        f'"aggregator" and privacy.unit is "{privacy.unit}": {why}'
    )
