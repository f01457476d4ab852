"""Who is asked in a round: shuffled passes, a fixed number at random, or a coin for each client.

Guarantees. ``passes``: within a pass of ``nodes // size`` rounds nobody is asked twice; on a fleet,
where devices may be away, nobody who was asked as often as passes have begun while one is there who
was not. ``fixed``: a uniform set of ``size`` of the clients that may be asked. ``poisson``: each
client that may be asked joins by its own coin of rate
:func:`reticent.privacy.schedule.cohort_rate`, whoever else does. With ``limit`` and ``window`` a
client may be asked in exactly ``limit`` of any ``window`` consecutive rounds, which ones its
identity alone decides, so nothing need be remembered; in a simulation, whose clients are numbered,
turns are dealt so that as many as can be have theirs in each round. Nobody is asked in more than
``most`` rounds in all.

A cohort depends on the round, the connected nodes, how often each was asked and the randomness. No
list of all clients is made: memory and time are those of the cohort, except for the permutation of
a pass (8 bytes a client, made once a pass).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from reticent.core.errors import NetworkError
from reticent.core.plan import Plan
from reticent.core.seeds import derive_key, numpy_generator
from reticent.core.uniforms import mixed, permuted
from reticent.privacy.randomness import Randomness
from reticent.privacy.schedule import cohort_rate, participations

from .fleet import Fleet

LONGEST_WAIT = 14 * 86_400.0
"""Seconds of virtual time that a run waits for devices that are away."""

_FEW, _MANY = 256, 1 << 14

Nodes = NDArray[np.int64]
Admits = Callable[[Nodes], NDArray[np.bool_]]


@dataclass
class Sampler:
    """Draws cohorts of one run.

    Attributes:
        plan: The plan.
        randomness: Where the coins of ``poisson`` come from: they may have to stay secret, so they
            are not the plan's public seed's, unless a simulation says so.
        run: Identity of the run.
        identity: Returns the id of the device that a real node is: its turn is the device's, which
            may come back as another node.
    """

    plan: Plan
    randomness: Randomness
    run: str
    identity: Callable[[int], int] = int
    _pass: tuple[tuple[int, int], Nodes] = field(
        default=((-1, -1), np.zeros(0, dtype=np.int64)), init=False
    )

    def cohort(
        self,
        number: int,
        nodes: Sequence[int],
        asked: Mapping[int, int],
        admits: Admits | None = None,
    ) -> list[int]:
        """Return the nodes to ask in round ``number``, ascending; fewer if there are too few.

        Args:
            number: The round, from 1.
            nodes: Ids of all connected nodes, ascending; a ``range`` is never written out.
            asked: In how many rounds each node was asked before.
            admits: Which of some nodes are available, on a fleet.
        """
        sampling, most = self.plan.federation.sampling, participations(self.plan)
        size = self.plan.asked_per_round
        if sampling == "poisson":
            generator = self._coins(number)
            count = int(generator.binomial(len(nodes), cohort_rate(self.plan)))
            order = generator.choice(len(nodes), count, replace=False)
            # Limits before the coin or after it: the same set, each client by its own coin.
            return sorted(self._free(number, [order], nodes, asked, most, admits))
        if sampling == "fixed":
            chunks = self._at_random(number, len(nodes))
            return sorted(islice(self._free(number, chunks, nodes, asked, most, admits), size))
        return sorted(self._of_pass(number, nodes, asked, most, admits))

    def able(self, number: int, nodes: Sequence[int], asked: Mapping[int, int]) -> list[int]:
        """Return those of real ``nodes`` that may be asked in round ``number``, were all drawn."""
        everyone = [np.arange(len(nodes))]
        return list(self._free(number, everyone, nodes, asked, participations(self.plan), None))

    def stream(self, nodes: Sequence[int], size: int) -> Iterator[int]:
        """Yield the cohorts of ``size`` of all rounds one after another, as ``passes`` deals them.

        A pass repeats nobody; what does not fill a cohort is left out of it.
        """
        per_pass = max(1, len(nodes) // size)
        number = 0
        while True:
            order = self._permutation(number // per_pass, len(nodes))
            first = number % per_pass * size
            for i in order[first : first + size].tolist():
                yield nodes[i]
            number += 1

    def _free(
        self,
        number: int,
        chunks: Iterator[Nodes] | list[Nodes],
        nodes: Sequence[int],
        asked: Mapping[int, int],
        most: int,
        admits: Admits | None,
    ) -> Iterator[int]:
        for positions in chunks:
            some = _at(nodes, positions[self._in_turn(number, nodes, positions)])
            if admits is not None:
                some = some[admits(some)]
            found = (node % 2**64 for node in some.tolist())
            yield from (node for node in found if asked.get(node, 0) < most)

    def _in_turn(self, number: int, nodes: Sequence[int], positions: Nodes) -> NDArray[np.bool_]:
        limit, window = self.plan.federation.limit, self.plan.federation.window
        if limit is None:
            return np.ones(len(positions), dtype=bool)
        key = derive_key(self.plan.seed, "limit")
        if isinstance(nodes, range):
            turns = permuted(key, positions, len(nodes)) % window
        else:
            devices = [self.identity(nodes[i]) for i in positions.tolist()]
            turns = mixed(key, _signed(devices)) % np.uint64(window)
        return (turns.astype(np.int64) + number) % window < limit

    def _permutation(self, index: int, count: int) -> Nodes:
        if self._pass[0] != (index, count):
            order = numpy_generator(self.plan.seed, "cohort", index).permutation(count)
            self._pass = ((index, count), order)
        return self._pass[1]

    def _in_passes(self, number: int, count: int, size: int) -> Iterator[Nodes]:
        per_pass = max(1, count // size)
        order = self._permutation((number - 1) // per_pass, count)
        first = (number - 1) % per_pass * size
        yield from _pieces(order[first:], 2 * size)
        yield from _pieces(order[:first], 2 * size)

    def _of_pass(
        self,
        number: int,
        nodes: Sequence[int],
        asked: Mapping[int, int],
        most: int,
        admits: Admits | None,
    ) -> list[int]:
        """Return a cohort of a pass.

        Where devices are away a round goes on in the order beyond its own part, so that whoever was
        asked ahead of its turn has to be passed over. To refuse it would end runs in which too few
        others are ever there at once: only those who are missing in a cohort are asked once more.
        """
        size, bounds = self.plan.asked_per_round, {most}
        if admits is not None:
            bounds |= {min(most, (number - 1) // max(1, len(nodes) // size) + 1)}
        chosen = dict[int, None]()
        for bound in sorted(bounds):
            chunks = self._in_passes(number, len(nodes), size)
            free = self._free(number, chunks, nodes, asked, bound, admits)
            others = (node for node in free if node not in chosen)
            chosen.update(dict.fromkeys(islice(others, size - len(chosen))))
        return list(chosen)

    def _at_random(self, number: int, count: int) -> Iterator[Nodes]:
        """Yield every position once, in a random order, a few at a time."""
        generator = numpy_generator(self.plan.seed, "cohort", "fixed", number)
        federation, away = self.plan.federation, self.plan.fleet is not None
        turns = -(-federation.window // (federation.limit or federation.window))
        few = min(count, (64 if away else 4) * self.plan.asked_per_round * turns)
        drawn = generator.choice(count, few, replace=False)
        yield from _pieces(drawn, 2 * self.plan.asked_per_round)
        if few < count:  # hardly anyone is available: all others, in a random order
            rest = np.delete(np.arange(count), drawn)
            yield from _pieces(generator.permutation(rest), _MANY)

    def _coins(self, number: int) -> np.random.Generator:
        stream = self.randomness.stream("server", "cohort", self.run, number)
        key = int.from_bytes(stream.bytes(16), "big")
        return np.random.Generator(np.random.Philox(key=key))


def cohort_in_time(
    sampler: Sampler,
    number: int,
    nodes: Sequence[int],
    asked: Mapping[int, int],
    fleet: Fleet | None,
    now: float,
) -> tuple[list[int], float]:
    """Return who is asked in round ``number``, and when: on a fleet, once enough are available.

    As a real server does (:func:`.waiting.wait_for_nodes`), a round on a fleet waits until as many
    devices are there as it asks, for ``federation.timeout`` virtual seconds at most, and then takes
    a quorum; for a quorum it waits two weeks.

    A Poisson cohort may be empty. The clock moves on for it while nobody of the whole population
    is available, which no coin decides: to wait for a cohort that is not empty would make its
    members likelier than their coins.

    Raises:
        NetworkError: If too few may be asked, on a fleet also after two weeks of virtual time.
    """
    federation, last = sampler.plan.federation, now + LONGEST_WAIT
    poisson = federation.sampling == "poisson"
    latest = now if poisson else min(now + federation.timeout, last)
    crowd = 1 if poisson else sampler.plan.asked_per_round
    while True:
        at = now
        admits = None if fleet is None else lambda some, at=at: fleet.available(some, at)
        chosen = sampler.cohort(number, nodes, asked, admits)
        if len(chosen) >= federation.quorum:
            # Whoever was chosen is there: the population is looked at where those are too few.
            patient = (poisson or now < latest) and len(chosen) < crowd
            if fleet is None or not patient or _are_there(fleet, nodes, now, crowd):
                return chosen, now
        later = math.inf if fleet is None else fleet.next_change(now)
        now = min(later, latest) if now < latest else later
        if now > last:
            raise _nobody_comes(sampler.plan, number, len(chosen))


def asked_first(plan: Plan, number: int, cohort: Sequence[int]) -> list[int]:
    """Return a cohort in the order it is asked in.

    Where a round closes before all have answered and replies come in that order, or at once by a
    virtual clock, nobody must be left out more often than others.
    """
    if plan.federation.enough is None and plan.asked_per_round == plan.federation.clients_per_round:
        return list(cohort)
    order = numpy_generator(plan.seed, "first", number).permutation(len(cohort))
    return [cohort[i] for i in order]


def _are_there(fleet: Fleet, nodes: Sequence[int], time: float, crowd: int) -> bool:
    """Return whether so many of `nodes` are available; a few are looked up before the others."""
    first, size, found = 0, _FEW, 0
    while first < len(nodes) and found < crowd:
        last = min(first + size, len(nodes))
        found += int(fleet.available(_at(nodes, np.arange(first, last)), time).sum())
        first, size = last, _MANY
    return found >= crowd


def _nobody_comes(plan: Plan, number: int, chosen: int) -> NetworkError:
    federation = plan.federation
    if federation.quorum == 0:
        return NetworkError(
            f"round {number}: none of {plan.task.clients} clients is available on the fleet, now "
            f"or within {LONGEST_WAIT / 86_400:g} days of virtual time (fleet.availability)"
        )
    also = "" if plan.fleet is None else ", and are available on the fleet"
    if federation.limit is not None:
        turn = f"federation.limit={federation.limit} in any window={federation.window} rounds"
        also = f", have their turn in it ({turn}){also}"
    return NetworkError(
        f"round {number}: {chosen} connected clients have been asked in fewer than "
        f"the {participations(plan)} rounds that the plan's privacy target allows "
        f"each{also}; {federation.quorum} are needed"
    )


def _at(nodes: Sequence[int], positions: Nodes) -> Nodes:
    if isinstance(nodes, range):
        return nodes.start + nodes.step * positions
    return _signed([nodes[i] for i in positions.tolist()])


def _signed(ids: Sequence[int]) -> Nodes:
    # Ids of real nodes have 64 bits and no sign; _free takes the sign away again.
    return np.array(ids, dtype=np.uint64).view(np.int64)


def _pieces(order: Nodes, size: int) -> Iterator[Nodes]:
    for first in range(0, len(order), size):
        yield order[first : first + size]
