"""Folding replies into a sum: check, decode, bound, add. The same here and in a worker process.

The strategy folds real replies one by one. The workers of a simulation fold those of their own
share, and the strategy merges the partial sums; sums do not depend on the order of what is added,
so both end in the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
from flwr.app import Message

from reticent.compression.codec import Codec
from reticent.core.errors import PayloadError
from reticent.core.norms import l2_norm
from reticent.core.update import Layout, Vector
from reticent.privacy.client_level import clipped, split_bit

from .reasons import reason_of
from .records import payload_of
from .rounds import Reading, Tally

Judge = Callable[[int, Message], None]


def largest_payload(layout: Layout) -> int:
    """Return more bytes than any codec makes of an update, with the bit of an adaptive bound."""
    return 64 + 8 * layout.size


@dataclass(frozen=True)
class Rules:
    """What decides, in one round, whether and how a reply counts; all of it is public.

    Attributes:
        round: The round that replies must belong to.
        layout: Layout of the update.
        bound: Largest L2 norm of an update that is accepted; may be infinite.
        clip: What updates are bounded to before they are added (unit ``client``); None for not.
        bit: Whether a payload starts with the bit of an adaptive bound.
        weight: What every update is multiplied by before it is added, in (0, 1].
        keep: Whether the updates are kept beside their sum.
    """

    round: int
    layout: Layout
    bound: float
    clip: float | None = None
    bit: bool = False
    weight: float = 1.0
    keep: bool = False


@dataclass(frozen=True)
class Kept:
    """What devices keep of earlier rounds; public, and in a simulation the same for all.

    Attributes:
        constants: The run's encoded constants.
        model: The model that devices trained on last, where the plan sends changes; else None.
    """

    constants: bytes
    model: Vector | None = None


@runtime_checkable
class FoldingGrid(Protocol):
    """A grid that can fold replies where they are made, and give their partial sums."""

    def fold(self, messages: Iterable[Message], rules: Rules, kept: Kept) -> Iterator[Tally]:
        """Yield what arrived, in parts: each reply in one of them, each node's in the same.

        Args:
            messages: One for each client, in the order of the cohort.
            rules: What a :class:`Folder` applies to each reply.
            kept: What clients hold that are not sent it again.
        """
        ...


class Folder:
    """Checks, decodes and bounds the replies of one round."""

    def __init__(self, codec: Codec, rules: Rules) -> None:
        """Apply ``rules`` to updates that ``codec`` encoded."""
        self._codec, self._rules = codec, rules

    def take(self, reply: Message, tally: Tally, judge: Judge = lambda node, reply: None) -> None:
        """Add one reply to ``tally``; what is broken is counted there by reason.

        A late reply, or a second one of an accepted node, is passed over. ``judge`` may raise
        :class:`PayloadError` with a reason for which an update that is good must not be used.
        """
        node = reply.metadata.src_node_id
        if reply.metadata.group_id != str(self._rules.round) or node in tally.accepted:
            return
        try:
            reading = self.read(reply)
            judge(node, reply)
        except PayloadError as error:
            tally.drop(node, str(error))
            return
        tally.add(node, reading)

    def read(self, reply: Message) -> Reading:
        """Return the decoded update, bounded where the rules say so, its encoded size and its bit.

        Raises:
            PayloadError: With a reason that is counted, not the client's words.
        """
        if reply.has_error():
            raise PayloadError(reason_of(reply.error.code))
        if "update" not in reply.content or not set(reply.content) <= {"update", "statement"}:
            raise PayloadError("the reply is not one encoded update")
        reading, weight = self._decoded(payload_of(reply.content, "update")), self._rules.weight
        if self._rules.clip is not None:
            # Devices bound their updates themselves; a codec's error, or a device that does not, is
            # bounded here, so that the promise to one client does not rest on another.
            reading = replace(reading, vector=clipped(reading.vector, self._rules.clip))
        return reading if weight == 1 else replace(reading, vector=weight * reading.vector)

    def _decoded(self, payload: bytes) -> Reading:
        rules, size, inside = self._rules, len(payload), False
        if size > largest_payload(rules.layout):
            raise PayloadError("the payload is larger than any update of this plan")
        if rules.bit:
            inside, payload = split_bit(payload)
        try:
            vector = self._codec.decode(payload, rules.layout.blocks)
        except PayloadError as error:
            raise PayloadError("the payload cannot be decoded") from error
        if not np.isfinite(vector).all():
            raise PayloadError("the update holds non-finite values")
        if l2_norm(vector) > rules.bound:
            raise PayloadError("the update is larger than the plan's bound")
        return Reading(vector, size, inside)
