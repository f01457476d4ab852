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
    """Where the clients of a simulation run; no choice changes a result.

    Attributes:
        kind: ``inprocess``: processes of this machine. ``ray``: actors of ours on Ray.
            ``flower-ray``: Flower's own engine.
        workers: How many processes or actors, of one thread each; ``auto`` is one a core,
            of this machine once a measurement says that they pay.
        address: The Ray cluster to connect to; by default that of the environment
            (``RAY_ADDRESS``, as ``ray job submit`` sets it), else one is started on this machine.
    """

    kind: Literal["inprocess", "ray", "flower-ray"] = "inprocess"
    workers: Workers = "auto"
    address: str | None = None

    @model_validator(mode="after")
    def _address_is_of_ray(self) -> Self:
        if self.address is not None and self.kind != "ray":
            raise ValueError(
                f'engine.address="{self.address}": must be absent unless engine.kind is "ray"; '
                f'it is "{self.kind}"'
            )
        return self
