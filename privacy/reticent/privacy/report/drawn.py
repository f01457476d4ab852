"""What a report leaves out, because it would tell the outcome of a secret draw of clients.

Where the sampling of clients is counted, one client changes the size of a cohort by one. Replies,
clients asked, bytes and refusals follow from that size exactly, so a report that has them could not
be shown to readers of the models, to whom the promise is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OF_ROUND = ("replies", "asked", "bytes_up", "bytes_down", "bytes_constants")
LEFT_OUT = (
    "Numbers of clients, replies and refusals, bytes and times are left out: they follow from the "
    "secret draws of clients"
)


def drawn_in_secret(promise: Mapping[str, Any]) -> bool:
    """Return whether the promise of a report counts the sampling of clients."""
    return (
        promise["trust"] != "off" and promise["unit"] == "client" and promise["sampling_rate"] < 1
    )


def without_draws(data: dict[str, Any]) -> dict[str, Any]:
    """Return a report's data with None where a figure follows from a secret draw, if there is one.

    Everybody spends the same, drawn or not, so what was spent stays.
    """
    if not drawn_in_secret(data["promise"]):
        return data
    spent, hidden = data["spent"], dict.fromkeys(("clients", "refusals", "rounds_with_refusals"))
    ledger = spent["ledger"] and {**spent["ledger"], "sequence": None}  # as many as were charged
    never = dict.fromkeys((*OF_ROUND, "dropped"))
    return {
        **data,
        "spent": {**spent, **hidden, "ledger": ledger},
        "rounds": [row | never for row in data["rounds"]],
        "traffic": dict.fromkeys(data["traffic"]) | {"fp32": data["traffic"]["fp32"]},
    }
