"""Semi-asynchronous buffered aggregation: FedBuff (Nguyen et al. 2022) on a fleet's virtual clock.

``concurrency`` devices train at a time, each on the model that was newest when it was asked. When
one ends, another is asked. When ``clients_per_round`` updates have arrived the server applies their
mean (the number of replies is the denominator, whatever the weights) and releases a new model: one
*round* of the plan. An update that is more than ``max_staleness`` releases behind is not used.

Guarantee (unit ``example``, ``local`` trust). Every update is private on its own and charged for
itself; what is done with it is post-processing, weights included.

Guarantee (unit ``example``, ``aggregator`` trust, uniform weights). One release is the sum of the
updates in the buffer. Let a client's update have been computed at model w_v, and let the release
be the r-th, r > v. (1) w_v is a function of the v first releases, which the adversary has seen, so
given all releases before the r-th the update is a clipped gradient sum at a *fixed* model: one
example moves it by at most C. (2) No client is asked again before the release that its update is
part of, or the loss of its update, so it has at most one update in a buffer, and each of its
updates is part of at most one release: its Poisson batch and its noise are fresh given everything
released before.
(3) Who is in the buffer, and on which model they trained, follows from public figures of the fleet
and coins drawn apart from all data. (4) At least ``shares`` clients of the buffer add their shares,
so the sum carries at least the full noise. So the r-th release is, given all earlier ones, the
Poisson-sampled Gaussian mechanism that the synchronous round is, and releases compose adaptively
(Abadi et al. 2016; Rogers et al. 2016): epsilon is that of as many rounds as one client's updates.
Weights below 1 would break (4): an update of weight 1 beside stale ones of weight a < 1 faces noise
of variance (1 + (n - 1) a^2) / n of the full one. The plan refuses them.

Guarantee (unit ``client``). By (2) a client has at most one update in a buffer, bounded to C and
with a weight of at most 1; the server adds the full noise to the sum and divides by the public
``clients_per_round``: one release is the Gaussian mechanism of the synchronous round.

Reproducible and resumable. The whole schedule, who is asked when, on which model, and when it ends,
is a function of the plan alone (:meth:`reticent.server.fleet.Fleet.releases`). Nothing is trained
before its update is due; the models that are still in use are the last checkpoints of the journal.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid

from reticent.core.errors import NetworkError
from reticent.core.plan import Buffered
from reticent.core.update import Vector

from .downlink import Broadcast
from .fleet import Release
from .strategy import PrivateAveraging
from .waiting import wait_for_nodes

ModelAfter = Callable[[int], Vector]


def kept_models(buffered: Buffered | None) -> int:
    """Return how many of the last models must be kept for updates that are still to come."""
    return 0 if buffered is None else buffered.max_staleness + 1


class BufferedAveraging(PrivateAveraging):
    """The same checks, bounds, sums and commits, with rounds that end when the buffer is full."""

    def follow(self, model_after: ModelAfter) -> None:
        """Take models of earlier releases from ``model_after``, by the number of releases."""
        self._model_after = model_after
        self._releases: Iterator[Release] | None = None
        self._models = dict[int, Broadcast]()

    def _run_round(
        self, number: int, grid: Grid, arrays: ArrayRecord, config: ConfigRecord
    ) -> None:
        began = time.monotonic()
        release = self._next_release(number, grid)
        self._tally = self._new_tally()
        self._cohort = list(release.started)
        self._tally.devices = tuple(self._opened(self._cohort))
        self._count(release)
        for given, nodes in _grouped(release.used):
            self._train(number, given, nodes, grid)
        self._remember_holders(number)
        self._tally.bytes_down += sum(release.dropped.values()) * len(self._sent.whole)
        if self._tally.sum.count < self._plan.federation.quorum:
            self._give_up(number)
        self._close(number, began)

    def _next_release(self, number: int, grid: Grid) -> Release:
        """Return the schedule's next release; after a resume, skip those that are committed.

        Raises:
            NetworkError: If the fleet has no device left that may be asked.
        """
        if self._releases is None:
            if self._fleet is None:
                raise NetworkError("buffered aggregation needs the virtual clock of a fleet")
            nodes = wait_for_nodes(grid, self._plan, self._nodes)
            self._releases = islice(self._fleet.releases(nodes), number - 1, None)
        release = next(self._releases, None)
        if release is None:
            raise NetworkError(
                f"round {number}: the buffer cannot be filled: every device that may still be "
                "asked, by the bound on its rounds and by availability within two weeks of virtual "
                "time, has been; committed rounds are kept"
            )
        return release

    def _count(self, release: Release) -> None:
        """Charge who began to train, and count time, energy, bytes and losses."""
        tally, virtual = self._tally, self._tally.virtual
        tally.asked = len(release.started)
        tally.dropped.update(release.dropped)
        charged = self._charged({*release.began, *release.unused})
        if virtual is not None:
            virtual.add(release)
            virtual.unused += len(charged & set(release.unused))
            virtual.stale = max(release.number - 1 - given for _, given in release.used)
        self._time = release.ends

    def _charged(self, begun: Iterable[tuple[int, int]]) -> set[tuple[int, int]]:
        """Charge who began to train, and return those whose budgets allowed it.

        Who began before an earlier release is asked about once more, as a resumed run has to: a
        round that was charged is not charged again.
        """
        found = set[tuple[int, int]]()
        for given, nodes in _grouped(begun):
            if self._fleet is not None:
                multiplier = self._order(given + 1).noise_multiplier
                charged = self._fleet.charge(self._constants.run, given + 1, multiplier, nodes)
                found.update((node, given) for node in charged)
        return found

    def _train(self, number: int, given: int, nodes: list[int], grid: Grid) -> None:
        """Train ``nodes`` on the model that they were given, and fold their updates."""
        buffered = self._plan.federation.buffered
        behind = number - 1 - given
        scaled = buffered is not None and buffered.weight == "inverse-sqrt"
        self._weight = (1 + behind) ** -0.5 if scaled else 1.0
        self._sent = self._broadcast(given)
        order = ConfigRecord({**self._order(given + 1).to_config()})
        self._waiting = set(nodes)
        self._gather(number, self._messages_for(grid, nodes, order, number), grid)

    def _broadcast(self, given: int) -> Broadcast:
        if given not in self._models:
            newest = given == self.state.round
            weights = self.state.weights if newest else self._model_after(given)
            shared = self._constants.shared(weights)
            self._models[given] = self._downlink.broadcast(shared, None, given + 1)
            oldest = self.state.round - kept_models(self._plan.federation.buffered)
            self._models = {k: v for k, v in self._models.items() if k > oldest}
        return self._models[given]


def _grouped(pairs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, list[int]]]:
    """Yield the nodes of each model, oldest model and lowest node first."""
    groups = defaultdict[int, list[int]](list)
    for node, given in pairs:
        groups[given].append(node)
    for given in sorted(groups):
        yield given, sorted(groups[given])
