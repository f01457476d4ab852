"""What the server and a client say to each other, apart from the transport."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from .errors import PayloadError

PROTOCOL = 3
MAX_CONSTANTS = 64 * 2**20
MAX_RUN_NAME = 256
MAX_ROUND = 2**31 - 1
BEFORE = "weights "
"""Begins the name under which a ledger charges what was released before any run: never a run's."""


class Refusal(IntEnum):
    """Why a client did not train, or takes no model.

    A fixed code and text; nothing else about a failure leaves.
    """

    FAILED = 1000
    BAD_ORDER = 1001
    WRONG_PLAN = 1002
    CONSTANTS_MISSING = 1003
    BAD_BROADCAST = 1004
    NO_DATA = 1005
    BUDGET = 1006
    LEDGER = 1007
    NOT_RELEASED = 1008
    ROLLED_BACK = 1009
    MODEL_MISSING = 1010
    POLICY = 1011
    NOT_NOW = 1012
    UNSIGNED = 1013
    UNTRUSTED = 1014
    OLD_MODEL = 1015
    DAMAGED = 1016
    SELF_TEST = 1017
    NOT_STORED = 1018

    @property
    def text(self) -> str:
        """The reason, in words that do not depend on the client's data."""
        return _REASONS[self]


_REASONS = {
    Refusal.FAILED: "the client failed",
    Refusal.BAD_ORDER: "the order is malformed",
    Refusal.WRONG_PLAN: "the order belongs to another plan",
    Refusal.CONSTANTS_MISSING: "the client does not hold the run's public constants",
    Refusal.BAD_BROADCAST: "the broadcast model is malformed",
    Refusal.NO_DATA: "the client has no data for this task",
    Refusal.BUDGET: "the privacy budget of the device does not allow the round",
    Refusal.LEDGER: "the ledger of the device cannot be used",
    Refusal.NOT_RELEASED: "the reply held something that was not released",
    Refusal.MODEL_MISSING: "the client does not hold the model that a change is against",
    Refusal.ROLLED_BACK: "the ledger of the device lacks a head that a server countersigned",
    Refusal.POLICY: "the policy of the device's owner does not allow the plan",
    Refusal.NOT_NOW: "the device does not take part at present",
    Refusal.UNSIGNED: "the plan is not signed by a key that the device's owner accepts",
    Refusal.UNTRUSTED: "the offer of a model is not signed by the server's key of artifacts",
    Refusal.OLD_MODEL: "the offered model is not newer than one that was installed",
    Refusal.DAMAGED: "what was received is not the model that was offered",
    Refusal.SELF_TEST: "the offered model does not pass its self-test on the device",
    Refusal.NOT_STORED: "the device could not store the model",
}


@dataclass(frozen=True)
class Order:
    """One round's instruction to one client; every field is a public constant of the run.

    Attributes:
        protocol: Version of this message.
        run: Identity of the run, drawn by the server when the run begins.
        plan: SHA-256 of the plan.
        round: Round number from 1.
        constants: SHA-256 of the encoded :class:`Constants`.
        noise_multiplier: Noise multiplier for the round; 0 exactly when privacy is off.
        denominator: Public number that every step's gradient sum is divided by.
        clip: L2 bound of one example's gradient or of one client's update, whichever the plan's
            unit is; 0 exactly when privacy is off.
    """

    protocol: int
    run: str
    plan: str
    round: int
    constants: str
    noise_multiplier: float
    denominator: float
    clip: float

    def to_config(self) -> dict[str, int | float | str]:
        """Return the order as a flat dictionary of scalars."""
        return asdict(self)

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> Order:
        """Parse and check an order.

        Raises:
            PayloadError: If a field is missing, unknown, of another type or out of range.
        """
        kinds = {
            f.name: {"int": int, "str": str, "float": float}[str(f.type)] for f in fields(Order)
        }
        if set(config) != set(kinds):
            raise PayloadError(f"order has keys {sorted(config)}: must have {sorted(kinds)}")
        for key, kind in kinds.items():
            if type(config[key]) is not kind:
                raise PayloadError(f"order.{key}={config[key]!r}: must be {kind.__name__}")
        order = Order(**config)
        if order.protocol != PROTOCOL:
            raise PayloadError(f"order.protocol={order.protocol}: must be {PROTOCOL}")
        if not 1 <= len(order.run) <= MAX_RUN_NAME:
            raise PayloadError(
                f"order.run has {len(order.run)} characters: must have 1 to {MAX_RUN_NAME}"
            )
        if order.run.startswith(BEFORE):
            raise PayloadError(f"order.run={order.run[:20]!r}: must not begin with {BEFORE!r}")
        if not 1 <= order.round <= MAX_ROUND:
            raise PayloadError(f"order.round={order.round}: must be from 1 to {MAX_ROUND}")
        if not (math.isfinite(order.noise_multiplier) and order.noise_multiplier >= 0):
            raise PayloadError(f"order.noise_multiplier={order.noise_multiplier}: must be >= 0")
        if not (math.isfinite(order.denominator) and order.denominator > 0):
            raise PayloadError(f"order.denominator={order.denominator}: must be > 0")
        if not (math.isfinite(order.clip) and order.clip >= 0):
            raise PayloadError(f"order.clip={order.clip}: must be >= 0")
        return order


@dataclass(frozen=True)
class Constants:
    """Public constants of a run that are broadcast once to each client.

    Attributes:
        kept: Bit-packed mask of the coordinates that are trained and sent; empty for all.
        soft_labels: float32 ``(classes, classes)``: the teacher's mean softened response to public
            examples of each label; shape ``(0, 0)`` when nothing is distilled on the devices.
        structure: Layers of the student as text (:mod:`reticent.compression.structure`); empty when
            they are those of the task's own student.
        held: float32 ``(n,)``: parameters that are not trained, of a student with adapters; empty
            otherwise.
        personal: float32 ``(p,)``: first values of the parameters that stay on the devices, masked
            ones included; empty when all travel.
    """

    kept: bytes
    soft_labels: NDArray[np.float32]
    structure: str = ""
    held: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    personal: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))

    def encode(self) -> bytes:
        """Return the constants as safetensors bytes; empty parts that are rare are left out."""
        kept = np.frombuffer(self.kept, dtype=np.uint8)
        arrays = {"kept": kept, "soft_labels": self.soft_labels}
        if self.structure:
            arrays["structure"] = np.frombuffer(self.structure.encode("ascii"), dtype=np.uint8)
        if self.held.size:
            arrays["held"] = self.held
        if self.personal.size:
            arrays["personal"] = self.personal
        return save(arrays)

    @staticmethod
    def decode(data: bytes) -> Constants:
        """Parse constants.

        Raises:
            PayloadError: If the bytes are not what :meth:`encode` makes.
        """
        if len(data) > MAX_CONSTANTS:
            raise PayloadError(f"constants have {len(data)} bytes: at most {MAX_CONSTANTS}")
        try:
            arrays = load(data)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise PayloadError(f"constants are not safetensors: {error}") from error
        kept, soft = arrays.get("kept"), arrays.get("soft_labels")
        known = {"kept", "soft_labels", "structure", "held", "personal"}
        if kept is None or soft is None or set(arrays) - known:
            raise PayloadError(
                f"constants hold {sorted(arrays)}: must hold kept, soft_labels, and at most "
                "structure, held and personal besides"
            )
        square = soft.ndim == 2 and soft.shape[0] == soft.shape[1]
        if kept.dtype != np.uint8 or kept.ndim != 1 or soft.dtype != np.float32 or not square:
            raise PayloadError("constants have arrays of another type or shape")
        if not np.isfinite(soft).all():
            raise PayloadError("constants.soft_labels holds non-finite values")
        structure = _text(arrays.get("structure"))
        held, personal = (_values(arrays.get(name), name) for name in ("held", "personal"))
        return Constants(kept.tobytes(), soft, structure, held, personal)


def _text(codes: NDArray[np.uint8] | None) -> str:
    """Return the structure's text.

    Raises:
        PayloadError: If it is not ASCII, or present and empty: then it would have two encodings.
    """
    if codes is None:
        return ""
    if codes.dtype != np.uint8 or codes.ndim != 1 or not codes.size or (codes > 127).any():
        raise PayloadError("constants.structure is not ASCII text")
    return codes.tobytes().decode("ascii")


def _values(values: NDArray[np.float32] | None, name: str) -> NDArray[np.float32]:
    """Return the parameters that stand under ``name``.

    Raises:
        PayloadError: If they are not float32 numbers, or present and none.
    """
    if values is None:
        return np.zeros(0, dtype=np.float32)
    if values.dtype != np.float32 or values.ndim != 1 or not values.size:
        raise PayloadError(f"constants.{name} has another type or shape")
    if not np.isfinite(values).all():
        raise PayloadError(f"constants.{name} holds non-finite values")
    return values
