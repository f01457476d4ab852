"""The plan's section about the devices of a simulated fleet, and the classes that are built in.

The figures of the built-in classes are orders of magnitude for a first estimate, not measurements:
see docs/fleet.md for where they come from. Whoever has measured a device states its figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from .section import Count, NotNegative, Positive, Section, Share


@dataclass(frozen=True)
class Figures:
    """What is known of the devices of one class.

    Attributes:
        slowdown: Time of start-up over that on the reference machine (``startup``), and of a
            training step (``step_seconds``) unless that was measured.
        memory: Bytes that training may use.
        down: Median rate of downloads, Mbit/s.
        up: Median rate of uploads, Mbit/s.
        latency: Seconds before the first byte of a transfer.
        dropout: Probability that a device that was asked is lost before it has answered.
        compute_watts: Power while training, beyond that of the idle device.
        radio_watts: Power while transferring, beyond that of the idle device.
    """

    slowdown: float
    memory: float
    down: float
    up: float
    latency: float
    dropout: float
    compute_watts: float
    radio_watts: float


BUILT_IN = {
    "pi4": Figures(7.0, 3.0e9, 50.0, 15.0, 0.05, 0.02, 3.5, 0.8),
    "pi5": Figures(3.0, 6.0e9, 50.0, 15.0, 0.05, 0.02, 5.0, 0.8),
    "jetson-nano": Figures(8.0, 2.5e9, 50.0, 15.0, 0.05, 0.02, 4.0, 1.0),
    "phone": Figures(3.0, 1.5e9, 30.0, 8.0, 0.1, 0.06, 2.5, 1.2),
    "gateway": Figures(12.0, 0.7e9, 10.0, 5.0, 0.2, 0.05, 2.0, 1.5),
}


class DeviceClass(Section):
    """One class of devices. Figures that are not given are those of the built-in class ``kind``.

    Attributes:
        kind: A built-in class, or a name of your own, whose every figure is then given.
        share: Its share of the fleet, relative to the other classes' shares.
        steps_per_second: Measured training steps a second. Steps then take as long whatever
            ``slowdown`` is, which start-up still takes.
        slowdown: As all that follow, see :class:`Figures`.
    """

    kind: Annotated[str, Field(min_length=1)] = "phone"
    share: Positive = 1.0
    steps_per_second: Positive | None = None
    slowdown: Positive | None = None
    memory: Positive | None = None
    down: Positive | None = None
    up: Positive | None = None
    latency: NotNegative | None = None
    dropout: Share | None = None
    compute_watts: NotNegative | None = None
    radio_watts: NotNegative | None = None

    @model_validator(mode="after")
    def _every_figure_is_known(self) -> Self:
        missing = [n for n in _FIGURES if getattr(self, n) is None]
        if self.kind not in BUILT_IN and missing:
            start_up = self.steps_per_second is not None and "slowdown" in missing
            why = " (slowdown is of start-up, however fast steps are)" if start_up else ""
            raise ValueError(
                f'kind="{self.kind}": is not one of {", ".join(BUILT_IN)}, so every figure must '
                f"be given; missing: {', '.join(missing)}{why}"
            )
        return self

    @property
    def figures(self) -> Figures:
        """Every figure, those of the built-in class where none is given."""
        given = {n: v for n in _FIGURES if (v := getattr(self, n)) is not None}
        known = BUILT_IN.get(self.kind)
        return Figures(**((vars(known) if known else {}) | given))

    def step_slowdown(self, step_seconds: float) -> float:
        """Return a step's time over ``step_seconds``, that on the reference machine."""
        if self.steps_per_second is None:
            return self.figures.slowdown
        return 1 / self.steps_per_second / step_seconds


_FIGURES = tuple(Figures.__dataclass_fields__)


class Availability(Section):
    """When devices may be asked, in seconds since the run began (virtual time).

    Attributes:
        kind: ``always``; ``diurnal``: in each ``slot`` a device is there with a probability that
            follows its local hour; ``file``: as the intervals in ``path`` say.
        low: That probability at its lowest.
        high: And at ``peak``.
        peak: The local hour of the highest probability.
        zones: Time zones, an hour apart, that devices are spread over evenly; 1: all share one.
        slot: Seconds for which a device stays there, or away.
        path: A file of intervals, for ``file``.
        period: Repeats the file's intervals after so many seconds, at least a minute: a server that
            waits looks at each; absent: they happen once.
    """

    kind: Literal["always", "diurnal", "file"] = "always"
    low: Annotated[float, Field(ge=0, le=1)] = 0.05
    high: Annotated[float, Field(gt=0, le=1)] = 0.2
    peak: Annotated[float, Field(ge=0, lt=24)] = 2.0
    zones: Annotated[int, Field(ge=1, le=24)] = 24
    slot: Annotated[float, Field(ge=1, le=86400)] = 1800.0
    path: str | None = None
    period: Annotated[float, Field(ge=60)] | None = None

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        if (self.path is None) == (self.kind == "file"):
            raise ValueError(
                f'kind="{self.kind}" with path={self.path!r}: a path must be given when kind is '
                '"file", and only then'
            )
        if self.period is not None and self.kind != "file":
            raise ValueError(f'period={self.period:g}: must be absent unless kind is "file"')
        if self.low > self.high:
            raise ValueError(f"low={self.low:g}: must be at most high={self.high:g}")
        return self


class Fleet(Section):
    """The devices that a simulated federation would run on, and their virtual clock.

    Attributes:
        classes: The classes of devices; empty: every built-in class, in equal shares.
        step_seconds: Seconds of one local step on the reference machine, which ``slowdown`` is
            relative to; ``reticent plan explain`` measures this machine's.
        startup: Seconds on the reference machine before training begins: Flower starts a process
            for each message, which imports everything anew. Slower devices take longer in
            proportion.
        spread: Standard deviation of the logarithm of a device's speed, and of its network's.
        jitter: The same for each round anew.
        runtime_memory: Bytes that the software needs beside the student.
        over_selection: So many times as many clients are asked as replies are used.
    """

    classes: tuple[DeviceClass, ...] = ()
    step_seconds: Annotated[float, Field(gt=0, le=3600)] = 0.002
    startup: Annotated[float, Field(ge=0, le=86400)] = 3.0
    spread: Annotated[float, Field(ge=0, le=3)] = 0.3
    jitter: Annotated[float, Field(ge=0, le=3)] = 0.1
    runtime_memory: NotNegative = 600e6
    over_selection: Annotated[float, Field(ge=1, le=10)] = 1.0
    availability: Availability = Availability()

    @model_validator(mode="after")
    def _kinds_are_named_once(self) -> Self:
        kinds = [c.kind for c in self.classes]
        twice = sorted({k for k in kinds if kinds.count(k) > 1})
        if twice:
            raise ValueError(f"classes: kind {', '.join(twice)} is given twice")
        return self

    @property
    def groups(self) -> tuple[DeviceClass, ...]:
        """The classes, the built-in ones when none is given."""
        return self.classes or tuple(DeviceClass(kind=kind) for kind in BUILT_IN)


class Buffered(Section):
    """Semi-asynchronous aggregation (FedBuff; Nguyen et al. 2022).

    Attributes:
        concurrency: Clients that train at a time; absent: ``clients_per_round``, which is also how
            many updates fill the buffer.
        max_staleness: An update is not used if the model moved on more often since it was given.
        weight: ``uniform``, or ``inverse-sqrt``: an update that is t steps stale counts
            1 / sqrt(1 + t) times.
    """

    concurrency: Count | None = None
    max_staleness: Annotated[int, Field(ge=0, le=100)] = 10
    weight: Literal["uniform", "inverse-sqrt"] = "uniform"
