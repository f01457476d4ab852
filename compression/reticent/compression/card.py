"""The model card: what a person should know of an artifact before it is used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .backends.base import Deployed
from .manifest import TaskInfo


def model_card(
    deployed: Deployed, task: TaskInfo, plan_digest: str, account: Mapping[str, Mapping[str, Any]]
) -> str:
    """Return Markdown for people: what the model is for, its promise and its figures.

    ``account`` has the tables ``privacy``, ``metrics`` and ``sizes``.
    """
    off = account["privacy"]["epsilon"] == "infinity"
    promise = (
        "Trained **without** differential privacy: ε = infinity. It may reveal its training data."
        if off
        else "Trained federatedly with differential privacy; the statement is below."
    )
    shape = " x ".join(map(str, task.input_shape))
    lines = [
        f"# Model card: {task.name}",
        "",
        f"A classifier with {task.classes} classes for inputs of shape {shape}, float32. The "
        f"weights of its layers are integers, and it computes with 8-bit ones. "
        f"`{deployed.backend.model_file}` runs on {deployed.backend.runs_on}; weights of fewer "
        "bits or of low entropy are packed in the file.",
        "",
        f"Preprocessing: {task.preprocessing}",
        "",
        promise,
    ]
    for title in ("privacy", "metrics", "sizes"):
        lines += ["", f"## {title.capitalize()}", "", "| | |", "|---|---|"]
        lines += [f"| {_cell(key)} | {_cell(value)} |" for key, value in account[title].items()]
    return "\n".join([*lines, "", "## Origin", "", f"Plan (SHA-256): `{plan_digest}`", ""])


def _cell(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")
