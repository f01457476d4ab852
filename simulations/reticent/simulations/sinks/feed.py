"""Feeds sinks from the committed rounds of a run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reticent.core.plan import Plan
from reticent.core.run import Run

from .sink import Sink, final_values, require, values_of

_LOGIN = re.compile(r"(?<=://)[^/\s]*@")
"""User and password of a URI: what is said of an error may end up in a log."""


class Feed:
    """Gives sinks every committed round, once, in order.

    What a sink already keeps is not repeated, and what it lacks of the rounds that were committed
    before is given first: so a run that was killed and resumed leaves the same curve as one that
    was not. A sink that fails is left out with a word; the run goes on, and the same command
    with ``--resume`` brings that sink up to date, also when the run is finished.
    """

    def __init__(
        self,
        run: Run,
        plan: Plan,
        say: Callable[[str], None],
        tensorboard: Path | None = None,
        mlflow: str | None = None,
    ) -> None:
        """Check that what is asked for is installed; nothing is opened before the first round.

        Raises:
            DependencyError: Naming what is missing and the command that installs it.
        """
        self._run, self._plan, self._say = run, plan, say
        self._openers: dict[str, Callable[[], Sink]] = {}
        self._sinks: dict[str, Sink] | None = None
        if tensorboard is not None:
            require("tensorboard")
            self._openers["tensorboard"] = lambda: _tensorboard(tensorboard, plan, run)
        if mlflow is not None:
            require("mlflow")
            self._openers["mlflow"] = lambda: _mlflow(mlflow, plan, run)

    def round(self, metrics: dict[str, Any]) -> None:
        """Take a committed round."""
        for name, sink in self._opened().items():
            with self._spared(name):
                if metrics["round"] > sink.last():
                    sink.log(metrics["round"], values_of(metrics, self._plan))

    def end(self, summary: dict[str, Any]) -> None:
        """Take the summary of the finished run."""
        for name, sink in self._opened().items():
            with self._spared(name):
                sink.end(final_values(summary))

    def close(self) -> None:
        """Close what was opened."""
        for name, sink in (self._sinks or {}).copy().items():
            with self._spared(name):
                sink.close()
        self._sinks = {}

    def _opened(self) -> dict[str, Sink]:
        if self._sinks is None:
            self._sinks = {}
            for name, make in self._openers.items():
                with self._spared(name):
                    self._sinks[name] = make()
                    self._catch_up(self._sinks[name])
        return self._sinks.copy()

    def _catch_up(self, sink: Sink) -> None:
        for metrics in self._run.read_metrics():
            if metrics["round"] > sink.last():
                sink.log(metrics["round"], values_of(metrics, self._plan))

    @contextmanager
    def _spared(self, name: str) -> Iterator[None]:
        """Leave a sink out that fails: a server of figures must not cost a run."""
        try:
            yield
        except Exception as error:
            words = _LOGIN.sub("", " ".join(str(error).split()))[:300]
            self._say(f"--{name} is left out from here: {type(error).__name__}: {words}")
            if self._sinks is not None:
                self._sinks.pop(name, None)


def _tensorboard(folder: Path, plan: Plan, run: Run) -> Sink:
    from .tensorboard import TensorBoard

    return TensorBoard(folder, plan, run.folder.resolve().name)


def _mlflow(uri: str, plan: Plan, run: Run) -> Sink:
    from .mlflow import MLflow

    return MLflow(uri, plan, run)
