"""MLflow: one MLflow run for one run directory, whose id is kept there."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

from reticent.core.plan import Plan
from reticent.core.run import Run, write_atomic

from .sink import EVERY_ROUND, date_of, parameters_of

EXPERIMENT = "reticent"
IDS = "mlflow.json"
_BATCH = 100  # parameters in one request: the most that servers take
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""A run waits while its server does not answer; by MLflow's own defaults, for many minutes."""
_SECRET = re.compile(r"(?<=://)[^:/?#@]*(:[^@]*)?@|[?#].*", re.DOTALL)
"""User and password of a URI (some stores allow any sign in it but @), and all after its path."""


class MLflow:
    """Parameters of the plan, metrics of rounds, and the state of the run."""

    def __init__(self, uri: str, plan: Plan, run: Run) -> None:
        """Go on with the MLflow run of ``run`` at ``uri``, or begin one."""
        # Nobody but the given server is told anything.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("DO_NOT_TRACK", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        # A store in a folder is what was asked for; MLflow 3.13 and later want to hear it again.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        self._entities: Any = import_module("mlflow.entities")
        self._client: Any = import_module("mlflow").MlflowClient(tracking_uri=uri)
        self._ended, self._plan = False, plan
        self._id = self._continued(run, uri) or self._begun(plan, run, uri)
        histories = (self._client.get_metric_history(self._id, key) for key in EVERY_ROUND)
        self._last = max((kept.step for history in histories for kept in history), default=0)

    def _continued(self, run: Run, uri: str) -> str | None:
        ids = _ids(run)
        known = ids.get(_key(uri)) or ids.get(uri)
        if known is None:
            return None
        if uri != _key(uri) and uri in ids:  # as it was written once, with what is secret in it
            del ids[uri]
            _keep(run, {**ids, _key(uri): known})
        self._client.update_run(known, status="RUNNING")
        return known

    def _begun(self, plan: Plan, run: Run, uri: str) -> str:
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        number = experiment.experiment_id if experiment else None
        number = number or self._client.create_experiment(EXPERIMENT)
        tags = {"reticent.plan": plan.digest}
        made: str = self._client.create_run(
            number, start_time=_date(plan, 1), run_name=run.folder.name, tags=tags
        ).info.run_id
        params = [self._entities.Param(k, v[:500]) for k, v in parameters_of(plan).items()]
        for first in range(0, len(params), _BATCH):
            self._client.log_batch(made, params=params[first : first + _BATCH])
        _keep(run, {**_ids(run), _key(uri): made})
        return made

    def last(self) -> int:
        """Return the last round that is kept there."""
        return self._last

    def log(self, number: int, values: Mapping[str, float]) -> None:
        """Keep the figures of a round."""
        self._send(values, number)
        self._last = number

    def end(self, values: Mapping[str, float]) -> None:
        """Keep the figures of the finished run and say that it is finished."""
        self._send(values, self._last)
        self._client.set_terminated(self._id, "FINISHED", _date(self._plan, self._last))
        self._ended = True

    def close(self) -> None:
        """Say that the run was stopped, unless it is finished."""
        if not self._ended:
            self._client.set_terminated(self._id, "KILLED", _date(self._plan, self._last))

    def _send(self, values: Mapping[str, float], step: int) -> None:
        date = _date(self._plan, step)
        metrics = [self._entities.Metric(k, v, date, step) for k, v in values.items()]
        self._client.log_batch(self._id, metrics=metrics)


def _date(plan: Plan, step: int) -> int:
    """Return the date of a round's figures, in milliseconds."""
    date = date_of(plan, step)
    return int(1000 * (time.time() if date is None else date))


def _key(uri: str) -> str:
    """Return what a store is known by in the run's folder: its URI without user and password.

    Its query and fragment, where a password may be too, are left out as well.
    """
    return _SECRET.sub("", uri) if "://" in uri else uri


def _keep(run: Run, ids: Mapping[str, str]) -> None:
    write_atomic(run.folder / IDS, json.dumps(ids).encode() + b"\n")


def _ids(run: Run) -> dict[str, str]:
    with suppress(OSError, ValueError):
        data = json.loads((run.folder / IDS).read_text(encoding="utf-8"))
        return {str(k): str(v) for k, v in data.items()} if isinstance(data, dict) else {}
    return {}
