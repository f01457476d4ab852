"""The ServerApp of a real federation, as a Flower app refers to it.

The run configuration holds ``plan``, the plan as TOML text; ``run-dir``, the run directory on the
server; and ``state-dir``, what ``reticent server init`` made: the key and the record with which the
server countersigns devices' ledgers, over all its runs. Without a ``state-dir`` each run keeps its
own, in its directory. A run directory that is already there is resumed; one that is in use is
refused.
"""

from __future__ import annotations

import json
import secrets
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from flwr.app import Context

from reticent.core.errors import RunError
from reticent.core.plan import parse_plan
from reticent.core.run import Run, create_run, locked, open_run

from .app import Settings, build_server_app
from .countersign import Countersigner, create_state, open_state


def _settings(context: Context) -> Settings:
    plan = parse_plan(str(context.run_config.get("plan", "")), where="run-config plan")
    given = str(context.run_config.get("run-dir", ""))
    if not given:
        raise RunError("run-config run-dir is empty: must be a folder on the server")
    folder = Path(given).expanduser()
    known = (folder / "plan.toml").is_file()
    run = open_run(folder, plan) if known else create_run(folder, plan)
    held = ExitStack()
    held.enter_context(locked(run))  # the same app submitted twice must not write one journal
    countersigner = _countersigner(run, str(context.run_config.get("state-dir", "")))
    held.callback(countersigner.close)
    return Settings(
        run=run,
        identity=secrets.token_hex(8),
        say=_say,
        progress=_show,
        close=held.close,
        countersigner=countersigner,
    )


def _countersigner(run: Run, given: str) -> Countersigner:
    if given:
        return open_state(Path(given).expanduser())
    folder = run.folder / "state"
    if not (folder / "keys" / "signing_key.pem").exists():  # the folder alone tells of a crash
        create_state(folder)
    return open_state(folder)


def _say(line: str) -> None:
    print(line, flush=True)


def _show(metrics: dict[str, Any]) -> None:
    _say(json.dumps(metrics))


app = build_server_app(_settings)
