"""The ServerApp of a real federation, as a Flower app refers to it.

The run configuration holds ``plan``, the plan as TOML text; ``run-dir``, the run directory on the
server; and ``state-dir``, what ``reticent server init`` made: the key and the record with which the
server countersigns devices' ledgers, over all its runs. Without a ``state-dir`` each run keeps its
own, in its directory. A run directory that is already there is resumed; one that is in use is
refused. ``attempt``, which ``reticent server run`` sets, names the process in what it reports
(:mod:`.attempt`).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from flwr.app import Context

from reticent.core.errors import RunError
from reticent.core.plan import parse_plan
from reticent.core.run import Run, create_run, locked, open_run
from reticent.core.signing import PRIVATE_KEY, refer_to_key

from .app import Settings, build_server_app
from .attempt import Teller
from .countersign import Countersigner, create_state, open_state
from .nodes import Nodes, polled
from .registry import Registry, read_registry


def _settings(context: Context) -> Settings:
    plan = parse_plan(str(context.run_config.get("plan", "")), where="run-config plan")
    given = str(context.run_config.get("run-dir", ""))
    if not given:
        raise RunError("run-config run-dir is empty: must be a folder on the server")
    folder = Path(given).expanduser()
    known = (folder / "plan.sha256").is_file()
    run = open_run(folder, plan) if known else create_run(folder, plan)
    if run.ledger.is_dir():
        raise RunError(
            f"{folder}: is a simulation; continue it with `{run.resume_command}`, or give real "
            "devices a run of their own"
        )
    held = ExitStack()
    held.enter_context(locked(run))  # the same app submitted twice must not write one journal
    teller = Teller(run, str(context.run_config.get("attempt", "")))
    try:
        return _serving(context, run, teller, held)
    except BaseException as error:
        teller.failed(error)
        held.close()
        raise


def _serving(context: Context, run: Run, teller: Teller, held: ExitStack) -> Settings:
    state = str(context.run_config.get("state-dir", ""))
    countersigner = _countersigner(run, state)
    held.callback(countersigner.close)
    return Settings(
        run=run,
        identity=secrets.token_hex(8),
        say=_say,
        progress=_show,
        close=held.close,
        ended=lambda error: teller.failed(error) if error else teller.finished(),
        countersigner=countersigner,
        nodes=_nodes(Path(state).expanduser() if state else None, teller),
    )


def _nodes(state: Path | None, teller: Teller) -> Nodes:
    """Return who the nodes are; who is enrolled or revoked meanwhile is so from the next look on.

    Without a record of devices every node may be asked.
    """
    known = [Registry()]

    def welcome(nodes: Sequence[int]) -> Sequence[int]:
        if state is None:
            return nodes
        known[0] = read_registry(state / "devices.json")
        keys = known[0].node_keys()
        return [node for node in nodes if node in keys]

    def seen(nodes: Sequence[int]) -> str:
        missing = missing_devices(known[0], nodes)
        teller.seen(len(nodes), ", ".join(missing))
        return f"; not connected: {', '.join(missing)}" if missing else ""

    def named(nodes: Sequence[int]) -> str:
        names = known[0].by_node()
        return ", ".join(sorted(names[node] for node in nodes if node in names))

    return Nodes(polled, lambda node: known[0].identities().get(node, node), seen, named, welcome)


def missing_devices(registry: Registry, nodes: Sequence[int]) -> list[str]:
    """Return the names of the devices that are welcome and not connected."""
    names = registry.by_node()
    connected = {names.get(node) for node in nodes}
    welcome = (name for name, device in registry.devices.items() if device.revoked is None)
    return sorted(name for name in welcome if name not in connected)


def _countersigner(run: Run, given: str) -> Countersigner:
    if given:
        folder = Path(given).expanduser()
        _use_artifact_key(run, folder / "keys" / "artifacts")
        countersigner, devices = open_state(folder), folder / "devices.json"
        countersigner.node_key = lambda node: read_registry(devices).node_keys().get(node)
        return countersigner
    folder = run.folder / "state"
    if not (folder / "keys" / "signing_key.pem").exists():  # the folder alone tells of a crash
        create_state(folder)
    return open_state(folder)


def _use_artifact_key(run: Run, key: Path) -> None:
    """Let the run sign its artifact with the server's key, which devices know.

    The run directory is handed around, the private key must not be. Not even by a link, which
    programs that copy or pack a directory follow.
    """
    if key.is_dir() and not (run.keys / PRIVATE_KEY).exists():  # of a run of an earlier version
        refer_to_key(run.keys, key)


def _say(line: str) -> None:
    print(line, flush=True)


def _show(metrics: dict[str, Any]) -> None:
    _say(json.dumps(metrics))


app = build_server_app(_settings)
