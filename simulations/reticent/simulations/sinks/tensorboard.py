"""TensorBoard, through torch: an event file in a folder of the run's name and plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from reticent.core.plan import Plan

from .sink import EVERY_ROUND, date_of, parameters_of


class TensorBoard:
    """Scalars of rounds; the plan as a text."""

    def __init__(self, folder: Path, plan: Plan, name: str) -> None:
        """Open the folder of the run in ``folder`` and find where it ends.

        Its name ends with the plan's digest: the rounds of another run whose folder has the same
        name would otherwise be taken for rounds of this one.
        """
        short = plan.digest[:8]
        self._folder = folder / (name if name.endswith(short) else f"{name}-{short}")
        self._plan = plan
        self._last = self._kept()
        self._writer: Any = import_module("torch.utils.tensorboard").SummaryWriter(
            str(self._folder)
        )
        if self._last == 0:
            self._writer.add_text("plan", _table(parameters_of(plan)))

    def _kept(self) -> int:
        if not self._folder.is_dir():
            return 0
        module = import_module("tensorboard.backend.event_processing.event_accumulator")
        events = module.EventAccumulator(str(self._folder), size_guidance={"scalars": 0})
        events.Reload()
        known = [key for key in EVERY_ROUND if key in events.Tags()["scalars"]]
        return max((event.step for key in known for event in events.Scalars(key)), default=0)

    def last(self) -> int:
        """Return the last round that is kept there."""
        return self._last

    def log(self, number: int, values: Mapping[str, float]) -> None:
        """Keep the figures of a round, on disk before the next."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, number, walltime=date_of(self._plan, number))
        self._writer.flush()
        self._last = number

    def end(self, values: Mapping[str, float]) -> None:
        """Keep the figures of the finished run as a text: they belong to no round."""
        text = _table({k: json.dumps(v) for k, v in values.items()})
        self._writer.add_text("summary", text, walltime=date_of(self._plan, self._last))

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()


def _table(rows: Mapping[str, str]) -> str:
    lines = (f"| {key} | {value} |".replace("\n", " ") for key, value in rows.items())
    return "\n".join(["| key | value |", "|---|---|", *lines])
