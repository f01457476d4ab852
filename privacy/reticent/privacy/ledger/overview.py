"""What one device spent and may still spend, gathered for its owner."""

from __future__ import annotations

from ..accounting import epsilon
from ..events import PoissonGaussian
from .afford import History, merged
from .records import Budget, Overview
from .store import Store
from .windows import View


def overview(store: Store, device: str, budget: Budget) -> Overview:
    """Return the overview of ``device``; see :meth:`.Ledger.overview`."""
    timed = budget.window is not None
    now = store.observed(needed=timed).at
    view = View.of(store, [device], budget, now)
    spent = epsilon(merged(view.counted(device)), budget.delta)
    charges, runs, first, last = store.db.execute(
        "SELECT count(*), count(DISTINCT run), min(coalesce(at, 0)), max(coalesce(at, 0))"
        " FROM entries WHERE device = ? AND kind = 'charge'",
        (device,),
    ).fetchone()
    (releases,) = store.db.execute(
        "SELECT count(*) FROM entries WHERE device = ? AND kind = 'release'", (device,)
    ).fetchone()
    unit, relation = _neighbour(view.lifetime(device))
    return Overview(
        device=device,
        budget=budget,
        unit=unit,
        relation=relation,
        lifetime=epsilon(merged(view.lifetime(device)), budget.delta),
        spent=spent,
        remaining=max(0.0, budget.epsilon - spent) if spent < budget.epsilon else 0.0,
        charges=charges,
        releases=releases,
        refusals=store.marks.refusals(device)[0],
        runs=runs,
        first=first,
        last=last,
        now=now if timed else None,
        renews=view.renews(device),
        head=store.end().head,
    )


def _neighbour(lifetime: History) -> tuple[str, str] | tuple[None, None]:
    # A ledger counts in those of its first charge with noise, and refuses others.
    kinds = {(e.unit, e.relation) for e in merged(lifetime) if isinstance(e, PoissonGaussian)}
    return next(iter(kinds), (None, None))
