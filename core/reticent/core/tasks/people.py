"""Splitting a pool of examples that belong to people: whole people are public, or clients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..plan import TaskSection
from ..seeds import numpy_generator
from .partition import Deal, Indices


@dataclass(frozen=True)
class People:
    """What is publicly known of the people whose examples make up a training pool.

    Attributes:
        noun: What they are called in messages: ``people``, ``roles``.
        count: How many there are, those of the test part left out.
        examples: Nominal number of examples of one of them: a public constant, not anybody's count.
        fewest: Every one of them has at least this many examples.
    """

    noun: str
    count: int
    examples: int
    fewest: int

    def public(self, section: TaskSection) -> int:
        """Return how many are public: as many as surely have ``public_examples`` together."""
        return -(-section.public_examples // self.fewest)

    def check(self, section: TaskSection) -> None:
        """Refuse a section that they cannot serve, before any data are read.

        Raises:
            DataError: Naming the key, what was given and what is allowed.
        """
        if self.public(section) >= self.count:
            raise DataError(
                f"task.public_examples={section.public_examples}: must be at most "
                f"{(self.count - 1) * self.fewest}, so that some of the {self.count} training "
                f"{self.noun} stay private ({self.fewest} examples of each public one are counted)"
            )
        most = (self.count - self.public(section)) * self.fewest
        if section.partition.examples_per_client is None and section.clients > most:
            raise DataError(
                f"client {most} would have no data: task.clients={section.clients} must be at most "
                f"{most}, or set task.partition.kind to iid, dirichlet or shards and "
                "task.partition.examples_per_client, so that clients may overlap"
            )

    def nominal_examples(self, section: TaskSection) -> int:
        """Return how many examples a client has by the plan alone: a public constant."""
        private = (self.count - self.public(section)) * self.examples
        return section.partition.examples_per_client or max(1, private // section.clients)


@dataclass(frozen=True, eq=False)
class PeopleSplit:
    """Positions of the public examples and of every client's examples in a pool of people.

    Guarantees: nobody is both public and private: the first :meth:`People.public` people, in an
    order that the seed decides, are public, all others private. The public examples are drawn from
    the public people's uniformly; a larger number of the same people holds those of a smaller one.
    What is left of the public people is not used. Every client has at least one example.

    Clients, with ``partition.kind = "natural"``: as many clients as private people: a client is a
    person. Fewer: a client is a group of whole people, of sizes that differ by at most one. More:
    every person has as many clients as possible equally, which hold consecutive parts of that
    person's examples, in the order of the pool and equal in size to within one example. Clients
    are disjoint and together hold all private examples. With any other kind the private examples
    are dealt as :class:`Deal` says, whoever they belong to.

    Attributes:
        labels: Labels of the pool, shape ``(total,)``.
        owners: Whose each example is, any integers, shape ``(total,)``.
        people: What is publicly known of them.
        section: The plan's task section.
        seed: The plan's seed.

    Raises:
        DataError: If the pool has other people than ``people`` says.
    """

    labels: NDArray[np.integer]
    owners: NDArray[np.integer]
    people: People
    section: TaskSection
    seed: int

    def __post_init__(self) -> None:
        """Check that the pool is as publicly known."""
        counts = np.unique(self.owners, return_counts=True)[1]
        if len(counts) != self.people.count or counts.min() < self.people.fewest:
            raise DataError(
                f"task {self.section.name}: the data are of {len(counts)} {self.people.noun} with "
                f"at least {counts.min()} examples each: must be {self.people.count}, "
                f"{self.people.fewest} each"
            )

    @cached_property
    def _order(self) -> NDArray[np.integer]:
        rng = numpy_generator(self.seed, "task", "people")
        return rng.permutation(np.unique(self.owners))

    @cached_property
    def public(self) -> Indices:
        """Positions of the public examples, int64 ``(public_examples,)``."""
        chosen = self._order[: self.people.public(self.section)]
        theirs = np.flatnonzero(np.isin(self.owners, chosen))
        order = numpy_generator(self.seed, "task", "public").permutation(len(theirs))
        return theirs[order[: self.section.public_examples]]

    @cached_property
    def private_people(self) -> NDArray[np.integer]:
        """The people that are private, in the order in which they become clients."""
        return self._order[self.people.public(self.section) :]

    @cached_property
    def _parts(self) -> tuple[Indices, ...]:
        people, clients = self.private_people, self.section.clients
        held = [np.flatnonzero(self.owners == person) for person in people]
        if clients <= len(people):
            groups = np.array_split(np.arange(len(people)), clients)
            return tuple(np.concatenate([held[i] for i in group]) for group in groups)
        shares = [len(part) for part in np.array_split(np.arange(clients), len(people))]
        pairs = zip(held, shares, strict=True)
        return tuple(part for own, n in pairs for part in np.array_split(own, n))

    @cached_property
    def _pool(self) -> Indices:
        return np.flatnonzero(np.isin(self.owners, self.private_people))

    @cached_property
    def _deal(self) -> Deal:
        section = self.section
        return Deal(self.labels[self._pool], section.clients, section.partition, self.seed)

    def client(self, index: int) -> Indices:
        """Return the positions in the pool of the examples of client ``index``.

        Raises:
            DataError: If there is no such client.
        """
        if not 0 <= index < self.section.clients:
            raise DataError(f"client {index}: must be 0 to {self.section.clients - 1}")
        if self.section.partition.kind == "natural":
            return self._parts[index]
        return self._pool[self._deal.indices(index)]
