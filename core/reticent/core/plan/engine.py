"""Where the clients of a simulation run."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from ..section import Section


def _workers(value: object) -> object:
    if value != "auto" and (type(value) is not int or value < 1):
        raise PydanticCustomError("workers", 'must be "auto", or an integer of at least 1')
    return value


Workers = Annotated[int | Literal["auto"], PlainValidator(_workers)]


class Engine(Section):
    """Where the clients of a simulation run; no choice but the device changes a result.

    Attributes:
        kind: ``inprocess``: processes of this machine. ``ray``: actors of ours on Ray.
            ``flower-ray``: Flower's own engine.
        workers: How many processes or actors, of one thread each; ``auto`` is one a core,
            of this machine once a measurement says that they pay.
        address: The Ray cluster to connect to; by default that of the environment
            (``RAY_ADDRESS``, as ``ray job submit`` sets it), else one is started on this machine.
        device: Where gradients are computed: ``cpu``, or in this process on a graphics processor
            by ``cuda``, which rounds otherwise.
        prefetch: Whether a worker loads clients' examples in a second thread, those of the next
            clients while it trains others.
    """

    kind: Literal["inprocess", "ray", "flower-ray"] = "inprocess"
    workers: Workers = "auto"
    address: str | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    prefetch: bool = True

    @model_validator(mode="after")
    def _address_is_of_ray(self) -> Self:
        if self.address is not None and self.kind != "ray":
            raise ValueError(
                f'engine.address="{self.address}": must be absent unless engine.kind is "ray"; '
                f'it is "{self.kind}"'
            )
        return self

    @model_validator(mode="after")
    def _device_has_one_process(self) -> Self:
        if self.device == "cpu":
            return self
        if self.kind != "inprocess":
            raise ValueError(
                f'engine.device="{self.device}": must be "cpu" unless engine.kind is "inprocess"; '
                f'it is "{self.kind}"'
            )
        if self.workers not in ("auto", 1):
            raise ValueError(
                f'engine.device="{self.device}": must be "cpu" with engine.workers={self.workers}, '
                'because one process has the device; use engine.workers="auto" or 1'
            )
        return self
