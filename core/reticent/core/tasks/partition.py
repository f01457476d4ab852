"""Dealing a pool of labelled examples to clients, evenly or with skewed labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..plan import Partition
from ..seeds import numpy_generator

Indices = NDArray[np.int64]

# Outside these bounds a Dirichlet draw is one label or uniform to within floating point, and
# NumPy's sampler can overflow or underflow to NaN.
_ALPHA = (1e-6, 1e6)


def check_partition(pool: int, classes: int, clients: int, partition: Partition) -> None:
    """Refuse a partition that would leave some client without data.

    Raises:
        DataError: Naming the first client without data, the pool, and what to change; or if the
            partition is by people, which a pool does not know.
    """
    if partition.kind == "natural":
        raise DataError(
            'task.partition.kind="natural": this task\'s examples belong to nobody; use iid, '
            "dirichlet or shards, or a task of people (har, text)"
        )
    if pool < 1:
        raise DataError(f"client 0 of {clients} would have no data: the pool has no examples")
    own = partition.examples_per_client is not None
    per_client = partition.labels_per_client if partition.kind == "shards" else 1
    if own and per_client > classes:
        raise DataError(
            f"task.partition.labels_per_client={per_client}: must be at most {classes}, the "
            "number of labels"
        )
    if not own and clients * per_client > pool:
        first = pool // per_client
        cause = f" and labels_per_client={per_client}" if per_client > 1 else ""
        raise DataError(
            f"client {first} would have no data: a pool of {pool} examples cannot be split into "
            f"disjoint parts for task.clients={clients}{cause}: use at most {first} clients, or "
            "set task.partition.examples_per_client so that clients draw from the pool and may "
            "overlap"
        )


@dataclass(frozen=True, eq=False)
class Deal:
    """Which examples of a pool each client holds.

    Guarantees: every client has at least one example; the answer depends only on the fields and
    the client, never on the order of calls. Without ``examples_per_client`` the parts are disjoint,
    cover the pool, and their sizes differ by at most one example (``iid``, ``dirichlet``) or by at
    most ``labels_per_client`` (``shards``). With it, every client holds exactly that many, no
    example twice unless the pool (for ``shards``, one of the client's labels) is too small; nothing
    is stored per client, so that a million clients cost nothing until one is asked for.

    - ``iid``: uniformly.
    - ``dirichlet``: label proportions from a symmetric Dirichlet(alpha) over the labels in the
      pool. A label that has run out is left out and the proportions are renormalised (Hsu, Qi and
      Brown 2019, appendix A), so no client is empty; clients choose in random order.
    - ``shards``: disjoint: the pool sorted by label is cut into ``clients * labels_per_client``
      shards, and each client gets ``labels_per_client`` of them at random (McMahan et al. 2017,
      section 3), so a shard over a border holds two labels or more. With ``examples_per_client``:
      exactly ``labels_per_client`` labels at random, in equal numbers.

    Attributes:
        labels: Labels of the pool, shape ``(pool,)``, any integer type.
        clients: Number of clients.
        partition: The plan's section.
        seed: The plan's seed.

    Raises:
        DataError: If some client would have no data.
    """

    labels: NDArray[np.integer]
    clients: int
    partition: Partition
    seed: int

    def __post_init__(self) -> None:
        """Check that the pool is enough."""
        if self.labels.ndim != 1:
            raise DataError(f"labels have shape {self.labels.shape}: must have one dimension")
        check_partition(len(self.labels), len(self.by_label), self.clients, self.partition)

    @cached_property
    def by_label(self) -> tuple[Indices, ...]:
        """Ascending positions of each label that occurs in the pool."""
        order = np.argsort(self.labels, kind="stable").astype(np.int64)
        borders = np.flatnonzero(np.diff(self.labels[order])) + 1
        return tuple(np.split(order, borders)) if len(order) else ()

    def indices(self, client: int) -> Indices:
        """Return the positions in the pool that ``client`` (0-based) holds, int64 ``(n,)``.

        Raises:
            DataError: If there is no such client.
        """
        if not 0 <= client < self.clients:
            raise DataError(f"client {client}: must be 0 to {self.clients - 1}")
        if self.partition.examples_per_client is None:
            return self._parts[client]
        rng = numpy_generator(self.seed, "partition", "client", int(client))
        return self._draw(rng, self.partition.examples_per_client)

    @cached_property
    def _parts(self) -> tuple[Indices, ...]:
        rng = numpy_generator(self.seed, "partition", "deal")
        kind = self.partition.kind
        if kind == "shards":
            return _disjoint_shards(
                rng, self.by_label, self.clients, self.partition.labels_per_client
            )
        if kind == "dirichlet":
            return _disjoint_dirichlet(rng, self.by_label, self.clients, self.partition.alpha)
        return tuple(np.array_split(rng.permutation(len(self.labels)), self.clients))

    def _draw(self, rng: np.random.Generator, count: int) -> Indices:
        if self.partition.kind == "iid":
            return take(rng, np.arange(len(self.labels)), count)
        if self.partition.kind == "shards":
            per_client = self.partition.labels_per_client
            chosen = rng.choice(len(self.by_label), per_client, replace=False)
            counts = _even(count, per_client)
        else:
            room = np.array([len(part) for part in self.by_label]) * -(-count // len(self.labels))
            weights = _proportions(rng, self.partition.alpha, len(room))
            chosen, counts = range(len(room)), label_counts(rng, weights, count, room)
        pairs = zip(chosen, counts, strict=True)
        return np.concatenate([take(rng, self.by_label[c], int(n)) for c, n in pairs])


def take(rng: np.random.Generator, pool: Indices, count: int) -> Indices:
    """Draw ``count`` of ``pool``; nothing is drawn twice before everything was drawn once."""
    repeats, rest = divmod(count, len(pool))
    return np.concatenate([np.tile(pool, repeats), rng.choice(pool, rest, replace=False)])


def label_counts(
    rng: np.random.Generator, weights: NDArray[np.float64], count: int, room: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Draw how many of ``count`` examples have each label: multinomial, at most ``room`` each.

    What does not fit is drawn again among the labels with room left, by renormalised weights.
    ``count`` must be at most ``room.sum()``.
    """
    counts = np.zeros(len(room), dtype=np.int64)
    while (left := count - int(counts.sum())) > 0:
        free = room - counts
        odds = weights * (free > 0)
        if not odds.sum() > 0:  # every label with room has a weight that underflowed to zero
            odds = free.astype(np.float64)
        counts += np.minimum(rng.multinomial(left, odds / odds.sum()), free)
    return counts


def _proportions(rng: np.random.Generator, alpha: float, labels: int) -> NDArray[np.float64]:
    return rng.dirichlet(np.full(labels, float(np.clip(alpha, *_ALPHA))))


def _even(total: int, parts: int) -> Indices:
    return np.array([total // parts + (i < total % parts) for i in range(parts)], dtype=np.int64)


def _disjoint_dirichlet(
    rng: np.random.Generator, by_label: Sequence[Indices], clients: int, alpha: float
) -> tuple[Indices, ...]:
    stacks = [rng.permutation(part) for part in by_label]
    room = np.array([len(stack) for stack in stacks], dtype=np.int64)
    sizes = _even(int(room.sum()), clients)
    parts: list[Indices] = [np.empty(0, dtype=np.int64)] * clients
    for client in rng.permutation(clients):
        counts = label_counts(rng, _proportions(rng, alpha, len(room)), int(sizes[client]), room)
        pieces = zip(stacks, room - counts, room, strict=True)
        parts[client] = np.concatenate([stack[low:high] for stack, low, high in pieces])
        room = room - counts
    return tuple(parts)


def _disjoint_shards(
    rng: np.random.Generator, by_label: Sequence[Indices], clients: int, per_client: int
) -> tuple[Indices, ...]:
    ordered = np.concatenate([rng.permutation(part) for part in by_label])
    shards = np.array_split(ordered, clients * per_client)
    hands = rng.permutation(len(shards)).reshape(clients, per_client)
    return tuple(np.concatenate([shards[s] for s in hand]) for hand in hands)
