"""How long a round waits for its nodes: before it is asked, and before it is asked again."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from flwr.serverapp import Grid

from reticent.core.errors import NetworkError
from reticent.core.plan import Federation, Plan

from .nodes import Nodes

_LOOK_SECONDS = 1.0


def wait_for_nodes(
    grid: Grid, plan: Plan, known: Nodes, able: Callable[[Sequence[int]], int] = len
) -> Sequence[int]:
    """Return the connected nodes, sorted: a full cohort of able ones, or a quorum at least.

    A quorum that is no full cohort is enough after the timeout, and at once where all of the plan's
    clients are connected: turns leave fewer in some rounds, and nobody else would come.

    Args:
        grid: The grid.
        plan: The plan.
        known: Who the nodes are.
        able: Returns how many of connected nodes may be asked in this round.

    Raises:
        NetworkError: If fewer than the quorum are connected after ``federation.timeout`` seconds.
    """
    federation = plan.federation
    deadline = time.monotonic() + federation.timeout
    while True:
        nodes = _connected(grid, known)
        missing, count = known.seen(nodes), able(nodes)
        everybody = len(nodes) >= plan.task.clients
        if count >= (federation.quorum if everybody else federation.clients_per_round):
            return nodes
        if time.monotonic() > deadline:
            if len(nodes) >= federation.quorum:
                return nodes
            raise NetworkError(
                f"{len(nodes)} clients are connected after {federation.timeout:g} s, "
                f"{federation.quorum} are needed{missing}"
            )
        time.sleep(_LOOK_SECONDS)


def wait_for_return(
    grid: Grid,
    federation: Federation,
    known: Nodes,
    cohort: Sequence[int],
    accepted: Collection[int],
) -> None:
    """Before a round is asked again, wait until enough of its devices can answer.

    A device that is not connected answers at once, with an error of Flower's: without this a
    device that restarts would use up every retry within a second.
    """
    deadline = time.monotonic() + federation.timeout
    while time.monotonic() < deadline:
        nodes = _connected(grid, known)
        able = nodes if isinstance(nodes, range) else set(nodes)
        there = sum(node in accepted or node in able for node in cohort)
        if there >= federation.quorum:
            return
        known.seen(nodes)
        time.sleep(_LOOK_SECONDS)


def _connected(grid: Grid, known: Nodes) -> Sequence[int]:
    """Return the connected nodes that may be asked, sorted."""
    nodes = grid.get_node_ids()
    # A simulation's, however many, take no memory, and are all welcome.
    return nodes if isinstance(nodes, range) else known.welcome(sorted(nodes))
