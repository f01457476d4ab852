"""What one device is asked to do, and what comes of it; nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from flwr.app import RecordDict

from reticent.core.protocol import Order
from reticent.privacy.release import Released

from .environment import Environment


@dataclass(frozen=True)
class Request:
    """What one device is asked to do.

    Attributes:
        order: The order.
        constants: The run's public constants.
        payload: A whole model, or with ``marks`` a change of the one in ``state``.
        environment: The device.
        marks: See :mod:`.downlink`; ``b""`` with a whole model.
        state: Flower's state of this client; simulated devices may share one.
        control: The server's encoded control variate; ``b""`` where the plan has none.
    """

    order: Order
    constants: bytes
    payload: bytes
    environment: Environment
    marks: bytes = b""
    state: RecordDict = field(default_factory=RecordDict)
    control: bytes = b""

    @property
    def shared(self) -> tuple[Order, bytes, bytes, bytes, int, bytes]:
        """Everything that decides what is trained, save for the device and its data."""
        state = id(self.state)
        return self.order, self.constants, self.payload, self.marks, state, self.control

    @property
    def path(self) -> tuple[str, int, int]:
        """Names the device's streams."""
        return self.order.run, self.environment.client, self.order.round


Outcome = Released[bytes] | Exception
"""What a device releases, or why it does not; of exceptions only :class:`Refused` has a code."""
