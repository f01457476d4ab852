"""Many nodes in one process: Flower's own client of the Fleet API, without SuperNodes or torch.

What is real: the SuperLink, TLS, node keys, and every request that a SuperNode makes (activation,
heartbeats, a look for messages every 3 s, the run, its app, every object of a message, the reply
and its objects). What is simulated: there is no ClientApp; a node answers with as many bytes as it
is told to. Each node is a thread with a connection of its own.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import tomli_w
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.control_pb2 import RegisterNodeRequest
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from reticent.client.records import pack

POLL_SECONDS, HEARTBEAT_SECONDS = 3.0, 30.0


def register(address: str, authority: Path, keys: list[ec.EllipticCurvePrivateKey]) -> None:
    """Let a SuperLink admit nodes, as ``flwr supernode register`` does, without a process each."""
    with ControlHttpClient.from_server_address(
        address, False, authority.read_bytes(), [RuntimeVersionHttpInterceptor("CLI")]
    ) as client:
        for key in keys:
            public = public_key_to_bytes(key.public_key())
            client.RegisterNode(RegisterNodeRequest(public_key=public))


def new_key() -> ec.EllipticCurvePrivateKey:
    """Return a node key."""
    return ec.generate_private_key(ec.SECP384R1())


def app(folder: Path, config: dict[str, Any]) -> Path:
    """Write the Flower app of :mod:`swarm_server` with this configuration; return its folder."""
    components = {"serverapp": "swarm_server:app", "clientapp": "seeded_device:app"}
    project = {"name": "asking", "version": "0.1.0", "description": "d", "license": "Apache-2.0"}
    given = {key: str(value) for key, value in config.items()}
    settings = {"publisher": "reticent", "components": components, "config": given}
    text = {"project": {**project, "dependencies": []}, "tool": {"flwr": {"app": settings}}}
    folder.mkdir()
    (folder / "pyproject.toml").write_text(tomli_w.dumps(text))
    return folder


class FleetNode:
    """A node as the SuperLink sees it.

    Args:
        address: ``host:port`` of the SuperLink.
        authority: The certificate to trust.
        key: The node's key.
        insecure: Whether to speak plain HTTP.
    """

    def __init__(
        self,
        address: str,
        authority: Path,
        key: ec.EllipticCurvePrivateKey,
        insecure: bool = False,
    ) -> None:
        self.key, self.id, self._known = key, 0, set[int]()
        self.client = FleetHttpClient.from_server_address(
            address,
            insecure,
            None if insecure else authority.read_bytes(),
            [NodeAuthHttpInterceptor(key, key.public_key())],
        )

    @property
    def node(self) -> Node:
        return Node(node_id=self.id)

    def activate(self) -> int:
        """Become connected, and return the id."""
        public = public_key_to_bytes(self.key.public_key())
        asked = ActivateNodeRequest(public_key=public, heartbeat_interval=HEARTBEAT_SECONDS)
        self.id = self.client.ActivateNode(asked).node_id
        return self.id

    def heartbeat(self) -> None:
        """Stay connected."""
        asked = SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=HEARTBEAT_SECONDS)
        self.client.SendNodeHeartbeat(asked)

    def check_in(self) -> PullMessagesResponse:
        """Ask for a message."""
        return self.client.PullMessages(PullMessagesRequest(node=self.node))

    def look(self) -> Message | None:
        """Return a message with the objects that it consists of fetched, if there is one."""
        found = self.check_in()
        return self.fetch(found) if found.messages_list else None

    def fetch(self, found: PullMessagesResponse) -> Message:
        """Fetch everything that a message consists of, and return it without its content."""
        message = message_from_proto(found.messages_list[0])
        run = message.metadata.run_id
        if run not in self._known:
            told = self.client.GetRun(GetRunRequest(node=self.node, run_id=run)).run
            asked = GetFabRequest(node=self.node, hash_str=told.fab_hash, run_id=run)
            self.client.GetFab(asked)
            self._known.add(run)
        for tree in iterate_object_tree(found.message_object_trees[0]):
            self._fetch(run, tree.object_id)
        self.client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self.node, run_id=run, message_object_id=message.metadata.message_id
            )
        )
        return message

    def _fetch(self, run: int, name: str) -> bytes:
        while True:
            asked = PullObjectRequest(node=self.node, run_id=run, object_id=name)
            found = self.client.PullObject(asked)
            if found.object_available:
                return found.object_content
            time.sleep(0.2)

    def answer(self, message: Message, payload: bytes) -> bool:
        """Send a reply of an update; return whether the SuperLink wanted its objects."""
        return self.push(Message(RecordDict({"update": pack(payload)}), reply_to=message))

    def push(self, reply: Message) -> bool:
        """Send a reply as it is."""
        reply.metadata.__dict__["_message_id"] = reply.object_id
        objects = get_all_nested_objects(reply)
        tree, run = get_object_tree(reply), reply.metadata.run_id
        bare = remove_content_from_message(reply) if reply.has_content() else reply
        told = self.client.PushMessages(
            PushMessagesRequest(
                node=self.node,
                messages_list=[message_to_proto(bare)],
                message_object_trees=[tree],
                clientapp_runtime_list=[0.0],
            )
        )
        for name in told.objects_to_push:
            asked = PushObjectRequest(
                node=self.node,
                run_id=run,
                object_id=name,
                object_content=objects[name].deflate(),
                session_id=told.session_id,
            )
            self.client.PushObject(asked)
        return bool(told.objects_to_push)

    def leave(self) -> None:
        """Disconnect."""
        self.client.DeactivateNode(DeactivateNodeRequest(node_id=self.id))

    def close(self) -> None:
        """Close the connection."""
        self.client.close()


class Swarm:
    """Connected nodes that look for messages and answer each with ``size`` bytes.

    A request whose connection fails, or that gets no answer in 30 s, is tried again, as a SuperNode
    does. :attr:`seconds` holds, by kind of request, how long each took; :attr:`failures` the rest.
    """

    def __init__(self, nodes: list[FleetNode], size: int, poll: float = POLL_SECONDS) -> None:
        self._size, self._poll = size, poll
        self.seconds: dict[str, list[float]] = {
            kind: [] for kind in ("activate", "check-in", "fetch", "answer", "heartbeat", "leave")
        }
        self.failures: list[str] = []
        self.retries = 0
        self._over, self._lock = threading.Event(), threading.Lock()
        self._threads = [
            threading.Thread(target=self._live, args=(node, random.Random(i)), daemon=True)
            for i, node in enumerate(nodes)
        ]

    def start(self) -> None:
        """Connect all nodes, spread over as long as one looks for messages once."""
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Disconnect all nodes."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    def marked(self) -> dict[str, int]:
        """Return how many requests of each kind were made so far."""
        with self._lock:
            return {kind: len(values) for kind, values in self.seconds.items()}

    def _live(self, node: FleetNode, draw: random.Random) -> None:
        self._over.wait(self._poll * draw.random())
        try:
            self._timed("activate", node.activate)
            beat = time.monotonic()
            while not self._over.is_set():
                if time.monotonic() - beat > 0.8 * HEARTBEAT_SECONDS:
                    self._timed("heartbeat", node.heartbeat)
                    beat = time.monotonic()
                found = self._timed("check-in", node.check_in)
                if not found.messages_list:
                    self._over.wait(self._poll)
                    continue
                message = self._timed("fetch", lambda f=found: node.fetch(f))
                payload = draw.randbytes(self._size)
                self._timed("answer", lambda m=message, p=payload: node.answer(m, p))
            self._timed("leave", node.leave)
        except Exception as error:  # a thread must not end unseen
            with self._lock:
                self.failures.append(f"{type(error).__name__}: {error}")
        finally:
            node.close()

    def _timed(self, kind: str, call: Callable[[], Any]) -> Any:
        began = time.monotonic()
        while True:
            try:
                result = call()
                break
            except httpx.TransportError:
                with self._lock:
                    self.retries += 1
        with self._lock:
            self.seconds[kind].append(time.monotonic() - began)
        return result
