"""The worker's side of a simulation: plays a share of the cohort and returns one partial sum."""

from __future__ import annotations

import torch

from reticent.compression.codec import Codec, build_codec
from reticent.core.plan import plan_from_json
from reticent.core.update import Layout
from reticent.privacy.ledger import Grants
from reticent.server.folding import Folder
from reticent.server.partial import encode_tally
from reticent.server.rounds import Tally

from .devices import Devices
from .packets import Work, messages_in
from .workers import Site


class Player:
    """Plays clients on one thread. What it returns does not depend on what it played before.

    Every reply comes out of the ClientApp and its gate, and is checked, decoded, bounded and added
    by the strategy's own :class:`.Folder`, as if it had crossed to the server.
    """

    def __init__(self, devices: Devices, plan_json: str) -> None:
        """Build the ClientApp; the rest waits for the first work."""
        torch.set_num_threads(1)
        self._folder, self._plan = devices.ledger, plan_from_json(plan_json)
        self._site = Site(devices, plan_json, Grants(devices.ledger))
        self._work: Work | None = None
        self._codecs: dict[Layout, Codec] = {}

    def begin(self, work: bytes) -> None:
        """Take the work of a round, which the shares that follow belong to."""
        self._work = Work.decode(work)
        self._site.keep(self._work.kept)

    def play(self, share: bytes) -> bytes:
        """Train the clients of a share and return the partial sum of their replies."""
        work = self._work
        if work is None:
            raise ValueError("a share came before its work")
        messages, self._site.ledger = messages_in(share, work, self._folder)
        self._site.charge(messages)
        folder = Folder(self._codec(work.rules.layout), work.rules)
        tally = Tally.begin(work.rules.layout.size, work.rules.keep)
        for reply in self._site.answer_many(messages):
            folder.take(reply, tally)
        return encode_tally(tally)

    def _codec(self, layout: Layout) -> Codec:
        if layout not in self._codecs:  # a run has one
            self._codecs = {layout: build_codec(self._plan.updates.codec, layout)}
        return self._codecs[layout]
