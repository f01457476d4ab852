"""Everything that left a device, the server or the run: one row a kind, with its mechanism.

``depends`` says honestly what a value is a function of. What is not listed here did not leave: the
client's gate serialises nothing but released and declared public values and fixed refusal codes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from reticent.core.protocol import Refusal

from ..release import PUBLIC_KINDS
from .drawn import drawn_in_secret

_NO_REPLY = "the client gave no reply"
_IN_VAIN = tuple(
    f"{_NO_REPLY} ({why})"
    for why in ("it missed the deadline", "enough others were faster", "its model was too old")
)
"""Reasons of a simulated fleet for devices that train, and send an update, all the same."""
_ORDERS = "on what the server had sent, not on the device's data"
_REFUSAL_DEPENDS = {
    Refusal.FAILED: "on anything that made the client fail; that it depends on no example is not "
    "proved",
    Refusal.BAD_ORDER: _ORDERS,
    Refusal.WRONG_PLAN: _ORDERS,
    Refusal.CONSTANTS_MISSING: _ORDERS,
    Refusal.BAD_BROADCAST: _ORDERS,
    Refusal.NO_DATA: "on whether the device holds any data for the task at all; not noised",
    Refusal.BUDGET: "on which rounds the device took part in before, never on its examples",
    Refusal.LEDGER: "on the state of the device's storage, not on its examples",
    Refusal.NOT_RELEASED: "on the device's software: it had tried to send something else",
    Refusal.MODEL_MISSING: _ORDERS,
    Refusal.ROLLED_BACK: "on the state of the device's ledger, not on its examples",
    Refusal.POLICY: "on what the device's owner allows, never on its examples",
    Refusal.NOT_NOW: "on the hour, and on the device's power, network, heat and load: on how it is "
    "used, not on its examples",
    Refusal.UNSIGNED: _ORDERS,
    Refusal.UNTRUSTED: _ORDERS,
    Refusal.OLD_MODEL: "on which models the server delivered before",
    Refusal.DAMAGED: _ORDERS,
    Refusal.SELF_TEST: "on the delivered model and on the device's software, not on its data",
    Refusal.NOT_STORED: "on the state of the device's storage, not on its examples",
}
_NOTHING = "not on any private example"


def releases(
    promise: dict[str, Any],
    run: dict[str, Any],
    traffic: dict[str, Any],
    rounds: list[dict[str, Any]],
    artifact_bytes: int | None,
) -> list[dict[str, Any]]:
    """Return ``{"value", "leaves", "count", "bytes", "mechanism", "depends"}`` rows.

    ``count`` and ``bytes`` (of the whole run) are None where they were not recorded, or follow from
    a secret draw of clients. Of updates that nobody used the count is the most that there can be.
    """
    dropped: Counter[str] = Counter()
    secret = drawn_in_secret(promise)
    for row in () if secret else rounds:
        dropped.update(row["dropped"])
    return [
        *_updates(promise, traffic, dropped, 0 if secret else _unread(rounds)),
        *([_not_told()] if secret else _refusals(dropped)),
        *_public_values(run),
        _row("Metrics (losses, accuracies, gradient norms, counts of examples)", "a device", 0, 0)
        | {"mechanism": "none: they are never sent", "depends": "nothing left"},
        *_from_server(promise, traffic),
        *_published(promise, rounds, artifact_bytes),
    ]


def _unread(rounds: list[dict[str, Any]]) -> int:
    """Return how many orders have neither an update that was used nor a reason why none was.

    A round that is closed, because it has enough replies or its time is over, reads no more.
    """
    return sum(row["asked"] - row["replies"] - sum(row["dropped"].values()) for row in rounds)


def _row(value: str, leaves: str, count: int | None, size: int | None) -> dict[str, Any]:
    return {"value": value, "leaves": leaves, "count": count, "bytes": size}


def _updates(
    promise: dict[str, Any], traffic: dict[str, Any], dropped: Counter[str], unread: int
) -> list[dict[str, Any]]:
    mechanism = update_mechanism(promise)
    covered = promise["trust"] != "off" and promise["unit"] == "example"
    depends = "on private examples, through the mechanism" if covered else "on private examples"
    rows = [
        _row("Encoded update", "a device", traffic["replies"], traffic["total_up"])
        | {"mechanism": mechanism, "depends": depends}
    ]
    if promise.get("clip_quantile") is not None:
        rows.append(
            _row(
                "Bit: whether the update was within the bound", "a device", traffic["replies"], None
            )
            | {"mechanism": "not noised for the server, which adds noise to the count of a round"}
            | {"depends": depends}
        )
    fixed = {refusal.text for refusal in Refusal}
    unused = sum(n for why, n in dropped.items() if why not in fixed and _NO_REPLY not in why)
    if unused:
        rows.append(
            _row("Reply that the server did not use", "a device", unused, None)
            | {"mechanism": f"{mechanism}; a rejected update was charged all the same"}
            | {"depends": depends}
        )
    vain = sum(dropped[why] for why in _IN_VAIN)
    if vain:
        rows.append(
            _row("Update that came too late or was not needed", "a device", vain, None)
            | {"mechanism": f"{mechanism}; who had begun to train was charged all the same"}
            | {"depends": depends}
        )
    if unread > 0:
        rows.append(
            _row("Update that was not read, and may have left", "a device", unread, None)
            | {"mechanism": f"{mechanism}; charged where it was made"}
            | {"depends": depends}
        )
    return rows


def update_mechanism(promise: dict[str, Any]) -> str:
    """Return what protects a single update on its way to the server."""
    if promise["trust"] == "off":
        return "none: ε = ∞"
    if promise["unit"] == "client":
        return (
            "bounded, not noised: the server bounds it again and adds the noise to the sum, so "
            "against the server ε = ∞"
        )
    share = promise["share_multiplier"]
    if promise["trust"] == "local":
        return f"DP-SGD with the full noise, σ = {share:.4g}, then the codec"
    return (
        f"DP-SGD with a share of the noise, σ/√{promise['shares']} = {share:.4g}, then the codec; "
        "the promise holds for the sum of a round"
    )


def _refusals(dropped: Counter[str]) -> Iterable[dict[str, Any]]:
    rows = [
        _row(f"Refusal {int(refusal)}: {refusal.text}", "a device", dropped[refusal.text], None)
        | {"mechanism": "a fixed code and text, not noised"}
        | {"depends": _REFUSAL_DEPENDS[refusal]}
        for refusal in Refusal
        if dropped[refusal.text]
    ]
    silent = sum(n for why, n in dropped.items() if _NO_REPLY in why and why not in _IN_VAIN)
    if silent:
        rows.append(
            _row("No reply", "a device", silent, 0)
            | {"mechanism": "none: absence is seen"}
            | {"depends": "on the network and the device; not noised"}
        )
    if not rows:
        rows.append(
            _row("Refusals and error codes", "a device", 0, 0)
            | {"mechanism": "fixed codes and texts", "depends": "nothing left"}
        )
    return rows


def _not_told() -> dict[str, Any]:
    """Return one row for all that is no update: which kinds there were depends on who was drawn."""
    return _row("Refusals, error codes and replies that were not used", "a device", None, None) | {
        "mechanism": "fixed codes and texts, not noised; an update that was not used is bounded",
        "depends": "on the state of the devices that were drawn, and an update on private examples",
    }


def _public_values(run: dict[str, Any]) -> list[dict[str, Any]]:
    count = 0 if run["simulated"] else None
    how = "none needed: public by declaration"
    if run["simulated"]:
        how = "not sent in a simulation"
    return [
        _row(f"Public value: {kind}", "a device", count, count) | {"mechanism": how, "depends": why}
        for kind, why in PUBLIC_KINDS.items()
    ]


def _from_server(promise: dict[str, Any], traffic: dict[str, Any]) -> list[dict[str, Any]]:
    private = promise["trust"] != "off"
    models = "post-processing of the noised sums" if private else "none: ε = ∞"
    through = "on private examples, through the mechanism" if private else "on private examples"
    return [
        _row("Broadcast model", "the server", traffic["asked"], traffic["total_down"])
        | {"mechanism": models, "depends": through},
        _row("Order of a round", "the server", traffic["asked"], None)
        | {"mechanism": "constants of the plan", "depends": _order_depends(promise)},
        _row("Public constants (mask, soft labels)", "the server", None, traffic["total_constants"])
        | {"mechanism": "made from public examples", "depends": _NOTHING},
    ]


def _order_depends(promise: dict[str, Any]) -> str:
    if promise.get("clip_quantile") is not None:
        return "on earlier noised counts: the bound of the round, through the mechanism"
    return _NOTHING


def _of_report(promise: dict[str, Any]) -> dict[str, str]:
    if drawn_in_secret(promise):
        return {
            "mechanism": "nothing in it follows from the secret draws but through the models; the "
            "ledger's head is keyed",
            "depends": "on the plan, and on private examples through the mechanism",
        }
    return {
        "mechanism": "none: spending, counts and ledger heads are exact",
        "depends": "on who took part and how often, never on an example",
    }


def _published(
    promise: dict[str, Any], rounds: list[dict[str, Any]], artifact_bytes: int | None
) -> list[dict[str, Any]]:
    private = promise["trust"] != "off"
    through = "on private examples, through the mechanism" if private else "on private examples"
    final = "post-processing of the last models; calibrated on public examples"
    tested = sum(row["accuracy"] is not None for row in rounds)
    rows = [
        _row("Deployed model", "the run", 1, artifact_bytes)
        | {"mechanism": final if private else "none: ε = ∞", "depends": through},
        _row("Test accuracy", "the run", tested, None)
        | {
            "mechanism": "post-processing of the models; the test set is not noised",
            "depends": f"{through}, and on the test set, which belongs to no client",
        },
        _row("This report", "the run", 1, None) | _of_report(promise),
    ]
    if promise.get("clip_quantile") is not None:
        rows.append(
            _row("Bound of each round, and noised counts", "the run", len(rounds), None)
            | {"mechanism": "Gaussian noise on counts, charged in each round; post-processing"}
            | {"depends": through}
        )
    return rows
