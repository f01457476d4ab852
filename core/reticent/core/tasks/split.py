"""Splitting a training pool into a public part and private clients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..plan import TaskSection
from ..seeds import numpy_generator
from .partition import Deal, Indices, check_partition


def check_section(total: int, classes: int, section: TaskSection) -> None:
    """Refuse a section that a pool of ``total`` examples cannot serve, before any data are read.

    Raises:
        DataError: Naming the key, what was given and what is allowed.
    """
    if section.public_examples >= total:
        raise DataError(
            f"task.public_examples={section.public_examples}: must be at most {total - 1}, so "
            f"that some of the {total} training examples stay private"
        )
    private = total - section.public_examples
    check_partition(private, classes, section.clients, section.partition)


def nominal_examples(total: int, section: TaskSection) -> int:
    """Return how many examples a client has by the plan alone: a public constant."""
    private = total - section.public_examples
    return section.partition.examples_per_client or max(1, private // section.clients)


def balanced_order(labels: NDArray[np.integer], seed: int) -> Indices:
    """Return a random order of which every prefix holds labels in numbers as equal as possible.

    Prefixes of any length differ by at most one example between labels that have not run out.
    """
    order = numpy_generator(seed, "task", "public").permutation(len(labels))
    shuffled = labels[order]
    rank = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        where = np.flatnonzero(shuffled == label)
        rank[where] = np.arange(len(where))
    return order[np.argsort(rank, kind="stable")]


@dataclass(frozen=True, eq=False)
class Split:
    """Positions of the public examples and of every client's examples in one training pool.

    Guarantees: public and private positions are disjoint and together are the pool; the public
    part is balanced over labels and depends on the seed; see :class:`Deal` for the clients.

    Attributes:
        labels: Labels of the pool, shape ``(total,)``.
        section: The plan's task section.
        seed: The plan's seed.
    """

    labels: NDArray[np.integer]
    section: TaskSection
    seed: int

    @cached_property
    def _order(self) -> Indices:
        return balanced_order(self.labels, self.seed)

    @cached_property
    def public(self) -> Indices:
        """Positions of the public examples, int64 ``(public_examples,)``."""
        return self._order[: self.section.public_examples]

    @cached_property
    def private(self) -> Indices:
        """Positions of all private examples, ascending."""
        return np.sort(self._order[self.section.public_examples :])

    @cached_property
    def deal(self) -> Deal:
        """How the private examples are dealt; positions are within ``private``."""
        labels = self.labels[self.private]
        return Deal(labels, self.section.clients, self.section.partition, self.seed)

    def client(self, index: int) -> Indices:
        """Return the positions in the pool of the examples of client ``index``.

        Raises:
            DataError: If there is no such client.
        """
        return self.private[self.deal.indices(index)]
