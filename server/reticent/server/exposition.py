"""Prometheus metrics of a run, on a port of the loopback interface.

The text format (version 0.0.4) is a dozen lines to write, which is no reason for a dependency of
every server. Only what the run has released is shown.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from reticent.core.errors import NetworkError, ReticentError
from reticent.core.run import Run

from .status import run_status

_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SAMPLES = (
    ("reticent_rounds_total", "counter", "Committed rounds", "round"),
    ("reticent_rounds_planned", "gauge", "Rounds of the plan", "rounds"),
    ("reticent_messages_total", "counter", "Orders sent, repetitions included", "asked"),
    ("reticent_replies_total", "counter", "Updates used", "replies"),
    ("reticent_bytes_up_total", "counter", "Encoded bytes of used updates", "bytes_up"),
    ("reticent_bytes_down_total", "counter", "Encoded bytes of models and constants", "bytes_down"),
    ("reticent_epsilon", "gauge", "Epsilon against readers of the models so far", "epsilon"),
    ("reticent_nodes_online", "gauge", "Connected nodes when the server last looked", "online"),
)


def exposition(status: dict[str, Any]) -> str:
    """Return what :func:`.status.run_status` says as Prometheus text; what is unknown is absent."""
    lines: list[str] = []
    for name, kind, text, key in _SAMPLES:
        if status[key] is not None:
            lines += [*_head(name, kind, text), f"{name} {status[key]}"]
    lines += _head("reticent_drops_total", "counter", "Replies not used, by reason")
    for reason, count in sorted(status["dropped"].items()):
        lines.append(f'reticent_drops_total{{reason="{_escaped(reason)}"}} {count}')
    return "\n".join(lines) + "\n"


@contextmanager
def exposed(run: Run, port: int | None) -> Iterator[None]:
    """Serve ``/metrics`` of a run on 127.0.0.1 while the block runs; with None, nothing.

    Raises:
        NetworkError: If the port cannot be had.
    """
    if port is None:
        yield
        return
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), _handler(lambda: run_status(run)))
    except OSError as error:
        raise NetworkError(f"--metrics-port {port}: {error.strerror}") from error
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(status: Callable[[], dict[str, Any]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/metrics":
                self.send_error(404)
                return
            try:
                body = exposition(status()).encode()
            except ReticentError:
                self.send_error(503)  # a file in the middle of being written
                return
            self.send_response(200)
            self.send_header("Content-Type", _TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing: the terminal shows the run."""

    return Handler


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}.", f"# TYPE {name} {kind}"]


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
