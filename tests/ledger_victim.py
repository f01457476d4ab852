"""A device that lives round after round until it is killed at a chosen point.

``python tests/ledger_victim.py`` reads one JSON object a line and answers each with how the life
ended. Every life is a fork, so that a hundred of them do not import everything a hundred times.

A life: open the ledger; for the round after the last one sent, charge, train (a stand-in that draws
random bytes, as noise would), store the release, send (append to ``outbox`` and synchronise).
``steps`` counts everything that can be told apart from outside SQLite: its statements, batches of
its virtual machine's instructions, and each file-system call of ours, before and after it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reticent.core.errors import LedgerError
from reticent.privacy.events import PoissonGaussian
from reticent.privacy.ledger import Budget, BudgetExceeded, Ledger, ledger

EVENT = PoissonGaussian(0.2, 1.2, 1)
CALLS = ("open", "pwrite", "write", "fsync", "fdatasync", "replace", "close")


class Reaper:
    """Kills this process, without warning, at the given step."""

    def __init__(self, at: int) -> None:
        """Count down from ``at``; 0 or less never ends."""
        self.left = at

    def step(self, *_: object) -> int:
        """Count one step; the result tells SQLite to go on."""
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    def watch(self) -> None:
        """Count SQLite's steps and the calls of :data:`CALLS` in this process."""
        for name in CALLS:
            setattr(os, name, self._counted(getattr(os, name)))
        connect = ledger.connect

        def watched(path: Path) -> Any:
            db = connect(path)
            db.set_trace_callback(self.step)
            db.set_progress_handler(self.step, 25)
            return db

        ledger.connect = watched

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.step()
            result = call(*args, **kwargs)
            self.step()
            return result

        return counted


def live(folder: Path, rounds: int, window: float | None, step: Callable[[], object]) -> None:
    """Play ``rounds`` rounds, starting after the last one in the outbox."""
    budget, outbox = Budget(math.inf, 1e-5, window), folder / "outbox"
    done = sent(outbox)
    start = max(done, default=-1) + 1
    with Ledger.open(folder / "ledger", verify=False) as opened:
        for number in range(start, start + rounds):
            opened.charge("device", "run", number, EVENT, budget)
            step()
            payload = opened.stored_release("device", "run", number)
            if payload is None:
                payload = os.urandom(40)
                step()
                opened.store_release("device", "run", number, payload)
            step()
            send(outbox, number, payload, opened)
            step()


def send(outbox: Path, number: int, payload: bytes, opened: Ledger) -> None:
    """Let ``payload`` leave the device, durably, with the head that an anchor would keep."""
    head = opened.head()
    line = f"{number} {hashlib.sha256(payload).hexdigest()} {head.sequence} {head.mac}\n"
    descriptor = os.open(outbox, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(descriptor, line.encode())
    os.fsync(descriptor)
    os.close(descriptor)


def sent(outbox: Path) -> dict[int, list[list[str]]]:
    """Return what left the device, by round."""
    found: dict[int, list[list[str]]] = {}
    lines = outbox.read_text().splitlines() if outbox.exists() else []
    for line in lines:
        number, *rest = line.split()
        found.setdefault(int(number), []).append(rest)
    return found


def fill(folder: Path, limit: int) -> None:
    """Charge and release under a limit on file sizes, until the first error; say which."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    done = sum(1 for _ in sent(folder / "outbox"))
    with Ledger.open(folder / "ledger", verify=False) as opened:
        for number in range(done, done + 10_000):
            opened.charge("device", "run", number, EVENT, Budget(math.inf, 1e-5))
            opened.store_release("device", "run", number, os.urandom(600))
            send(folder / "outbox", number, b"", opened)


def spend(folder: Path, run: str, budget: float, tries: int) -> list[int]:
    """Charge as often as the budget allows, beside others; return the rounds that were charged."""
    charged = []
    with Ledger.open(folder / "ledger", verify=False) as opened:
        for number in range(tries):
            with contextlib.suppress(BudgetExceeded):
                charge = opened.charge("device", run, number, EVENT, Budget(budget, 1e-5))
                charged += [] if charge.repeated else [number]
    return charged


def _end(order: dict[str, Any]) -> None:
    folder, kind = Path(order["folder"]), order["kind"]
    if kind == "live":
        reaper = Reaper(order["step"])
        reaper.watch()
        live(folder, order["rounds"], order["window"], reaper.step)
    elif kind == "fill":
        fill(folder, order["limit"])
    else:
        charged = spend(folder, order["run"], order["budget"], order["tries"])
        (folder / f"{order['name']}.charged").write_text(json.dumps(charged))


def _fork(order: dict[str, Any]) -> int:
    child = os.fork()
    if child:
        return child
    code = 0
    try:
        _end(order)
    except LedgerError as error:
        Path(order["folder"], "error").write_text(str(error))
        code = 5
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        sys.stderr.flush()
        os._exit(code)
    return 0


def main() -> None:
    """Serve: each line of standard input is a list of lives that run side by side."""
    for line in sys.stdin:
        children = []
        for order in json.loads(line):
            child = _fork(order)
            if order.get("after") is not None:
                time.sleep(order["after"])
                os.kill(child, signal.SIGKILL)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    main()
