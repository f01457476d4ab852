"""Driving a real run: a SuperLink, a ServerApp, and what to do when either of them dies."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from reticent.core.bundle import sign_plan
from reticent.core.errors import NetworkError, ProvisionError, ReticentError, RunError
from reticent.core.plan import Plan
from reticent.core.run import Run, create_run, open_run, without_none, write_atomic
from reticent.core.signing import PRIVATE_KEY, read_private_key

from .attempt import FAILED, FINISHED, Attempt, error_of, read_attempt
from .certificates import utc_now
from .enrolment import synchronize
from .flower import START_SECONDS, Flower, SuperLink, SuperLinkError, answers, superlink, wait_for
from .home import Home
from .status import ended_early, warnings

_POLL_SECONDS = 0.5
_MOST_DEATHS = 5
_ORPHAN_SECONDS = 10.0  # Flower's own processes look every 0.2 s whether they are orphans
SERVER_APP = "reticent.server.deployment:app"
CLIENT_APP = "reticent.client.deployment:app"


@dataclass
class Operation:
    """One call of ``reticent server run``.

    Attributes:
        home: The server.
        run: The run directory.
        plan: Its plan.
        say: Takes a line for a person.
        progress: Takes the metrics of each round that is committed from now on.
        client_app: What runs on the devices; another one only in tests.
        before: The summary of a run that ended early and is taken up again.
    """

    home: Home
    run: Run
    plan: Plan
    say: Callable[[str], None]
    progress: Callable[[dict[str, Any]], None]
    client_app: str = CLIENT_APP
    before: bytes = b""
    _shown: int = 0
    _waited_for: str = ""
    _flower_run: str = ""
    _flower: Flower = field(init=False)
    _reached: bool = False
    _deaths: int = 0
    _shown_at_death: int = 0

    def __post_init__(self) -> None:
        self._flower = Flower(self.home)
        self._shown_at_death = self._shown

    def serve(self) -> None:
        """Serve the run to its end.

        A ServerApp or a SuperLink that dies is started again, and the run goes on at the next
        round, up to :data:`_MOST_DEATHS` times in a row without a committed round. On leaving, the
        ServerApp and a SuperLink that was started here are stopped; committed rounds are kept.

        Raises:
            ReticentError: Why it did not come to its end.
        """
        while True:
            theirs = False
            try:
                with superlink(self.home, self.home.log) as link:
                    theirs = link is None
                    self.say(
                        f"SuperLink {'found running' if theirs else 'started'}: {self.home.address}"
                    )
                    synchronize(self.home, self._flower, utc_now(), self.say)
                    self._reached = True
                    while link is None or not link.ended():
                        why = self._attempt(link)
                        if not why:
                            return
                        self._pause(why)
                        if link is None and not answers(self.home):
                            break
            except SuperLinkError as error:
                # It may have been killed in the middle; one that never worked is not tried again.
                if not self._reached:
                    raise
                self._pause(str(error).splitlines()[0])  # what follows is its log
            if theirs:
                wait_for(self.home)

    def _pause(self, why: str) -> None:
        """Wait before another attempt.

        Raises:
            NetworkError: If there were enough of them.
        """
        self._deaths = 1 if self._shown > self._shown_at_death else self._deaths + 1
        self._shown_at_death = self._shown
        if self._deaths >= _MOST_DEATHS:
            raise NetworkError(
                f"{why}, {self._deaths} times in a row without a committed round; see "
                f"{self.home.log}"
            )
        self.say(f"{why}; going on after round {self._shown}")
        time.sleep(min(2**self._deaths, 30))

    def _attempt(self, link: SuperLink | None) -> str:
        """Let a ServerApp serve the run to its end; return what died before, if anything did.

        Raises:
            ReticentError: What the ServerApp failed with.
        """
        token = self._found()
        if token is None and _summary(self.run) not in (b"", self.before):
            self._show(None)
            if early := ended_early(self.run):
                raise NetworkError(early)
            self.say("the run has ended by itself meanwhile")
            return ""
        token = token or self._submitted()
        try:
            return self._watch(token, link)
        except BaseException:
            self._abandon(token)
            raise

    def _found(self) -> str | None:
        """Return the token of a ServerApp that an earlier call started and that still runs."""
        attempt = read_attempt(self.run)
        if attempt is None or not attempt.alive():
            return None
        self.say("found its ServerApp running")
        return attempt.token

    def _submitted(self) -> str:
        if self._flower_run:
            self._flower.stop(self._flower_run)
        token = secrets.token_hex(8)
        where = {"run-dir": str(self.run.folder), "state-dir": str(self.home.folder)}
        self._flower_run = self._flower.submit(self._write_app(), {**where, "attempt": token})
        return token

    def _abandon(self, token: str) -> None:
        """Leave no ServerApp behind that still asks devices."""
        attempt = read_attempt(self.run)
        if attempt is not None and attempt.token == token:
            if not attempt.alive():
                return
            with suppress(ProcessLookupError, PermissionError):
                os.kill(attempt.pid, signal.SIGTERM)
        if self._flower_run and answers(self.home):
            self._flower.stop(self._flower_run)

    def _watch(self, token: str, link: SuperLink | None) -> str:
        deadline = time.monotonic() + START_SECONDS
        orphaned = 0.0
        while True:
            attempt = read_attempt(self.run)
            mine = attempt if attempt is not None and attempt.token == token else None
            self._show(mine)
            orphaned = orphaned + _POLL_SECONDS if mine and mine.orphaned() else 0.0
            if mine is not None and orphaned > _ORPHAN_SECONDS:
                self.say("the ServerApp did not end with its SuperLink: it is killed")
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(mine.pid, signal.SIGKILL)
            lost = link is not None and link.ended()
            if mine is None and (lost or time.monotonic() > deadline):
                return "the SuperLink died" if lost else "the ServerApp did not begin"
            if mine is not None and mine.state == FINISHED:
                return ""
            if mine is not None and mine.state == FAILED:
                return _failure(mine)
            if mine is not None and not mine.alive():
                return "the SuperLink died" if lost else "the ServerApp died"
            time.sleep(_POLL_SECONDS)

    def _show(self, attempt: Attempt | None) -> None:
        for metrics in committed(self.run)[self._shown :]:
            self.progress(metrics)
            self._shown += 1
        waited = "" if attempt is None else attempt.missing
        if waited != self._waited_for:
            self._waited_for = waited
            if waited and attempt is not None:
                self.say(f"{attempt.online} nodes connected; not connected: {waited}")

    def _write_app(self) -> Path:
        """Write the Flower app, which is a ``pyproject.toml`` only, and return its folder."""
        folder = self.home.folder / "app"
        folder.mkdir(mode=0o700, exist_ok=True)
        settings = {"run-dir": "", "state-dir": "", "attempt": ""}
        write_app(folder, self.plan, self.home, settings, SERVER_APP, self.client_app)
        return folder


def prepare_operation(
    home: Home,
    plan: Plan,
    folder: Path,
    resume: bool,
    say: Callable[[str], None],
    progress: Callable[[dict[str, Any]], None],
    client_app: str = CLIENT_APP,
) -> Operation:
    """Make or open the run directory, and check what would make the run fail later.

    Raises:
        RunError: If the run directory cannot be used.
        ProvisionError: If the server's certificate has expired.
    """
    now = utc_now()
    if home.certificate_ends("server.crt") <= now:
        raise ProvisionError(
            "the server's certificate has expired: renew it with `reticent server rotate`"
        )
    for warning in warnings(home, now):
        say(f"warning: {warning}")
    run = open_run(folder, plan) if resume else create_run(folder, plan)
    if early := ended_early(run):
        say(f"{early}; it is taken up again")
    elif run.summary.is_file():
        raise RunError(f"{folder}: the run has finished: there is nothing to continue")
    write_atomic(home.last_run, str(folder.absolute()).encode())
    known = Run(folder.absolute())
    before, shown = _summary(known), len(committed(known))
    return Operation(home, known, plan, say, progress, client_app, before, shown)


def _summary(run: Run) -> bytes:
    return run.summary.read_bytes() if run.summary.is_file() else b""


def committed(run: Run) -> list[dict[str, Any]]:
    """Return the metrics of committed rounds while another process may be adding one."""
    try:
        return run.read_metrics()
    except RunError:
        return []  # a line that is being written; the next look finds it whole


def _failure(attempt: Attempt) -> str:
    """Return why the ServerApp died, if trying again may help.

    Raises:
        ReticentError: If it knew what was wrong.
    """
    error = error_of(attempt)
    if error.exit_code != ReticentError.exit_code:
        raise error
    return f"the ServerApp failed ({error})"  # a SuperLink that went away looks like this


def write_app(
    folder: Path,
    plan: Plan,
    home: Home,
    settings: Mapping[str, str | int | float],
    server_app: str,
    client_app: str = CLIENT_APP,
) -> None:
    """Write a Flower app with a signed plan and ``settings`` in its run configuration."""
    signer = read_private_key(home.keys / "plans" / PRIVATE_KEY)
    config = {
        "plan": tomli_w.dumps(without_none(plan.model_dump(mode="json"))),
        "plan-signature": sign_plan(signer, plan.digest),
        **settings,
    }
    app = {
        "publisher": "reticent",
        "components": {"serverapp": server_app, "clientapp": client_app},
        "config": config,
    }
    project = {
        "name": "reticent-run",
        "version": "0.1.0",
        "description": "A run of reticent",
        "license": "Apache-2.0",
        "dependencies": ["reticent"],
    }
    text = tomli_w.dumps(
        {"project": project, "tool": {"flwr": {"app": app}}}, multiline_strings=True
    )
    write_atomic(folder / "pyproject.toml", text.encode())
