"""What a sink is, and which figures it is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any, Protocol

from reticent.core.errors import DependencyError
from reticent.core.plan import Plan
from reticent.privacy.report.collect import size_rule
from reticent.privacy.schedule import draws_in_secret


class Sink(Protocol):
    """Somewhere that figures of one run are kept, each round at most once."""

    def last(self) -> int:
        """Return the last round that is kept there; 0 when none is."""
        ...

    def log(self, number: int, values: Mapping[str, float]) -> None:
        """Keep the figures of a round."""
        ...

    def end(self, values: Mapping[str, float]) -> None:
        """Keep the figures of the finished run, and say that it is finished."""
        ...

    def close(self) -> None:
        """Flush and let go; a run that has not ended can be continued later."""
        ...


def require(kind: str) -> None:
    """Check that what a kind of sink needs is installed.

    Raises:
        DependencyError: With the command that installs it.
    """
    if find_spec(kind) is None:
        raise DependencyError(f"--{kind} needs the extra: pip install 'reticent[{kind}]'")


EVERY_ROUND = ("bytes_down", "epsilon")
"""Of every round that is kept one of these is: bytes, or epsilon where these are left out."""


def values_of(metrics: Mapping[str, Any], plan: Plan) -> dict[str, float]:
    """Return what may be kept of a committed round: released and public figures only.

    Accuracy on the public test set, epsilon, encoded bytes and the number of replies. How long a
    round took is left out, as a reply takes longer when a client's batches are larger; the figures'
    own dates (:func:`date_of`) still tell when it ended. Under aggregator
    trust the size of updates is rounded up to two figures, as in the report. Where it is secret who
    is drawn, bytes and replies are left out: they tell how many were.
    """
    shown = size_rule("off" if plan.private is None else plan.private.trust)
    values = {"accuracy": metrics["accuracy"], "epsilon": metrics["epsilon"]}
    if not draws_in_secret(plan):
        values |= {
            "bytes_up": shown(metrics["bytes_up"]),
            "bytes_down": metrics["bytes_down"] + metrics["bytes_constants"],
            "replies": metrics["replies"],
        }
    return {key: float(value) for key, value in values.items() if value is not None}


def date_of(plan: Plan, number: int) -> float | None:
    """Return the date, in seconds, to keep with the figures of a round; None for that of now.

    A round takes longer when more clients are drawn. Where that is secret, it has no date but its
    number.
    """
    return float(number) if draws_in_secret(plan) else None


def final_values(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a finished run: accuracies, sizes and finite epsilons."""
    found = {f"final_accuracy_{k}": v for k, v in summary["accuracy"].items()}
    found |= {f"final_bytes_{k}": v for k, v in summary["bytes"].items()}
    found |= {f"final_{k}": summary["privacy"][k] for k in ("epsilon", "server_epsilon")}
    return {
        key: float(value)
        for key, value in found.items()
        if isinstance(value, int | float) and value == value  # NaN was not measured
    }


def parameters_of(plan: Plan) -> dict[str, str]:
    """Return every key of the plan with its value as text."""
    return dict(_leaves(plan.model_dump(mode="json")))


def _leaves(data: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", str(value)
