"""One process that imports everything once; all of Flower's programs on a device are its forks.

A ``flower-supernode`` starts a ``flower-superexec``, and that a ``flwr-clientapp`` for every
message: Python processes with much the same modules. Here each is a fork of one process that has
imported them already, so that they share that memory, and a round does not pay for the imports:
those of Flower always, and those of torch if the device's owner lets it stay loaded
(``resources.warm``). A message still has a process of its own.

Flower's programs are started by name, and :mod:`.launcher` puts others under their names, which ask
here (:mod:`.asking`). Whatever goes wrong with that, they start Flower's own program. What is
forked is a console script of Flower's, called as a console script is.

A process with threads must not be forked, so none is ever started here; should a library start one
at its import, nothing is forked.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from reticent.privacy.ledger import Ledger

from .asking import OFFER, SOCKET, TAKEN, YES
from .family import end_with_parent, name_process
from .folder import Device, open_device
from .launcher import EXECUTOR, PROGRAM, SUPERNODE, loaded, run
from .resources import LIBRARIES, Memory

TICK = "reticent-tick"
_TICK_SECONDS = 3600.0
_MOST_BYTES = 65536
_PATIENCE = 2.0
_FIRST_TO_GO = 500  # of 1000: when memory runs out, the round is ended and not the agent
_HANDLED = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)


@dataclass
class Nursery:
    """Forks, and ends with its first child.

    Attributes:
        folder: Holds the socket.
        first: Process id of the first child, the SuperNode.
        executor: That of the SuperExec, without which the SuperNode would do nothing; 0 before.
    """

    folder: Path
    first: int = 0
    executor: int = 0
    _listener: socket.socket = field(default_factory=lambda: socket.socket(socket.AF_UNIX))
    _signals: tuple[socket.socket, socket.socket] = field(default_factory=socket.socketpair)

    def children(self, first: Sequence[str]) -> list[str]:
        """Fork for ``first``, for whatever is asked for, and for :data:`TICK` once an hour.

        Returns in the children alone.

        The parent exits with the status of the first child. Should the SuperExec end before the
        SuperNode does, that is told to end too: the agent then starts all of it anew.

        Returns:
            The name and the arguments of the program that the child is to be.
        """
        self._listen()
        gc.collect()
        gc.freeze()  # what is shared is not looked at again, and so not copied
        if not (pid := self._fork()):
            return list(first)
        self.first = pid
        due = time.monotonic()
        while True:
            left = max(0.0, due - time.monotonic())
            ready, _, _ = select.select([self._listener, self._signals[0]], [], [], left)
            if time.monotonic() >= due:
                due += _TICK_SECONDS
                if threads() == 1 and self._ticks():
                    return [TICK]
            if self._signals[0] in ready:
                self._react(self._signals[0].recv(256))
            if self._listener in ready and (words := self._answer()):
                return words

    def _listen(self) -> None:
        (self.folder / SOCKET).unlink(missing_ok=True)
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        # A socket's name has 107 bytes at most, and a folder's may have more.
        self._listener.bind(f"/proc/self/fd/{descriptor}/{SOCKET}")
        os.close(descriptor)
        self._listener.listen(16)
        self._signals[1].setblocking(False)
        signal.set_wakeup_fd(self._signals[1].fileno(), warn_on_full_buffer=False)
        for number in _HANDLED:
            signal.signal(number, lambda *_: None)

    def _react(self, signals: bytes) -> None:
        if signal.SIGTERM in signals or signal.SIGINT in signals:
            self._end_first()
        with suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                if found[0] == self.first:
                    sys.exit(os.waitstatus_to_exitcode(found[1]) & 0xFF)
                if found[0] == self.executor:
                    self._end_first()

    def _end_first(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.first, signal.SIGTERM)

    def _answer(self) -> list[str]:
        """Fork for one who asks and is still there; return what it is to be, in the fork alone.

        Who asked and gave up has become the program in the ordinary way.
        """
        connection, _ = self._listener.accept()
        with connection, suppress(OSError):
            connection.settimeout(_PATIENCE)
            words = asked(connection)
            if not words or threads() != 1 or not is_taken(connection):
                return []
            if not (pid := self._fork()):
                return words
            if words[0] == EXECUTOR:
                self.executor = pid
            connection.sendall(YES)
        return []

    def _ticks(self) -> bool:
        """Fork for a tick; return whether this is the fork. One that fails is left out."""
        with suppress(OSError):
            return not self._fork()
        return False

    def _fork(self) -> int:
        """Fork; the child is as a new process is, and ends when this one does.

        Raises:
            OSError: If the system has no process to give; all is then as before.
        """
        sys.stdout.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
            raise
        if pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
            return pid
        end_with_parent()
        signal.set_wakeup_fd(-1)
        for number in _HANDLED:
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)
        for channel in (self._listener, *self._signals):
            channel.close()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
        if os.getppid() != parent:
            os._exit(1)
        return 0


def threads() -> int:
    """Return how many threads this process has."""
    return len(os.listdir("/proc/self/task"))


def asked(connection: socket.socket) -> list[str]:
    """Return what one who asks wants to be; empty if it is not for us, or not one of ours."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    if struct.unpack("3i", credentials)[1] != os.getuid():
        return []
    data = b""
    while not data.endswith(b"\n") and len(data) < _MOST_BYTES:
        if not (more := connection.recv(4096)):
            return []
        data += more
    try:
        words = json.loads(data)
    except (ValueError, RecursionError):
        return []
    sound = isinstance(words, list) and all(isinstance(word, str) for word in words)
    return words if sound and words[:1] in ([EXECUTOR], [PROGRAM]) else []


def is_taken(connection: socket.socket) -> bool:
    """Return whether one who asked is still there, and takes what we are about to do.

    Raises:
        OSError: If it is not, or does not say so in time.
    """
    connection.sendall(OFFER)
    return connection.recv(1) == TAKEN


def prepare(device: Device) -> None:
    """Import what the children need; torch and this package's training only if the owner says so.

    Where memory is too short for a round beside that, torch is left out.
    """
    for name in (SUPERNODE, EXECUTOR, PROGRAM):
        loaded(name)
    importlib.import_module("reticent.client.deployment")
    if not device.owners_policy().resources.warm:
        return
    free = Memory().free()
    if free is not None and free < 2 * LIBRARIES:
        print(f"memory is short ({free >> 20} MB): torch is loaded for each round", flush=True)
    else:
        importlib.import_module("reticent.client.round")


def tick(device: Device) -> None:
    """Let the ledger see the time, so that a budget with a window renews while nobody asks."""
    if device.owners_policy().budget.window_days and (device.state / "ledger.db").is_file():
        with Ledger.open(device.state, verify=False) as ledger:
            ledger.tick()


def main() -> None:
    """Take a device's folder, and the first program with its arguments."""
    folder, *first = sys.argv[1:]
    device = open_device(Path(folder))
    name_process("reticent-base")
    prepare(device)
    if threads() != 1:
        leave(first)
    words = Nursery(device.programs).children(first)
    name_process(words[0])
    if words == [TICK]:
        return tick(device)
    if words[0] == PROGRAM:
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(str(_FIRST_TO_GO))
    leave(words)


def leave(words: Sequence[str]) -> None:
    """Run a program, and end this process without taking apart what it shares with others.

    Python's own end writes to every object there is, which would copy all of them first. And it
    waits for threads: a SuperNode (1.41) whose loop ended, because a TLS connection was cut in its
    handshake perhaps, would stay for good, with the thread of its own HTTP server and of no use.
    """
    status: object = 1
    try:
        run(words)
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


if __name__ == "__main__":
    main()
