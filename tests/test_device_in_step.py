"""A SuperNode sends each message's own reply, also after one whose run ended half-way."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import start_client_internal as flower
from flwr.supernode.nodestate.nodestate_factory import NodeStateFactory

from reticent.client import in_step
from reticent.client.bundles import MOST_BUNDLE_BYTES, MOST_BYTES, contents, require_no_code
from reticent.core.errors import PayloadError
from reticent.core.plan import parse_plan
from reticent.server.certificates import utc_now
from reticent.server.home import create_home
from reticent.server.operate import write_app

NODE, RUN = 7, 1
PROJECT = """[project]
name = "run"
version = "0.1.0"
description = "A run"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "reticent"
[tool.flwr.app.components]
serverapp = "a:b"
clientapp = "c:d"
"""


def unknown(*_: Any) -> None:
    pytest.fail("the run is known")


@dataclass
class Supernode:
    """Flower's state and functions of a SuperNode; the network and the ClientApp are played."""

    store: Any
    state: Any
    sent: list[str] = field(default_factory=list)
    errors: list[Error | None] = field(default_factory=list)
    runtimes: list[float] = field(default_factory=list)
    pushed: list[bytes] = field(default_factory=list)

    def order(self, number: int, ttl: float = 600.0) -> Message:
        content = RecordDict({"order": ConfigRecord({"number": number})})
        order = Message(content, NODE, "train", ttl=ttl, group_id=str(number))
        order.metadata.__dict__["_message_id"] = order.object_id
        return order

    def receive(
        self, order: Message, confirm: Callable[[], None], gone: bool = False, **fetched: Any
    ) -> Any:
        """Receive ``order``; where it is ``gone`` its run ends while its content is fetched."""
        objects = {k: o.deflate() for k, o in get_all_nested_objects(order).items()}
        order.metadata.delivered_at = ""

        def fetch(run: int, name: str) -> bytes:
            if gone:
                raise RunNotRunningException
            return objects[name]

        return flower._pull_and_store_message(
            state=self.state,
            object_store=self.store,
            node_config={},
            receive=lambda: (order, get_object_tree(order)),
            **{"get_run": Run.create_empty, "get_fab": unknown, **fetched},
            pull_object=fetch,
            confirm_message_received=lambda *_: confirm(),
            trusted_entities=None,
        )

    def begin(self) -> int:
        """Start the ClientApp of the order that was received; return its task."""
        (task,) = self.state.get_tasks(statuses=["pending"])
        assert self.state.claim_task(task.task_id)
        assert self.state.activate_task(task.task_id)
        return task.task_id

    def fetch(self) -> None:
        """Fetch an order as a ClientApp does."""
        for order in self.state.get_messages_legacy(run_ids=[RUN], is_reply=False, limit=1):
            self.state.record_message_processing_start(order.metadata.message_id)

    def answer(self, order: Message, error: Error | None = None) -> None:
        """Reply as a ClientApp does, through the state."""
        self.fetch()
        reply = Message(error or RecordDict(), reply_to=order)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        self.state._store_generated_message(reply)
        self.state.record_message_processing_end(order.metadata.message_id)
        self.state.store_message(reply)

    def send(self) -> None:
        def sending(reply: Message, tree: Any, runtime: float) -> tuple[set[str], str]:
            self.sent.append(reply.metadata.reply_to_message_id)
            self.errors.append(reply.error if reply.has_error() else None)
            self.runtimes.append(runtime)
            return {node.object_id for node in iterate_object_tree(tree)}, ""

        def pushing(run: int, session: str, name: str, content: bytes) -> None:
            self.pushed.append(content)

        flower._push_messages(self.state, self.store, sending, pushing)


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Supernode:
    for name, value in (("task_id", 1), ("run_id", RUN), ("node_id", 1)):
        monkeypatch.setattr(TaskIdentity, f"_{name}", value)
    objects = ObjectStoreFactory()
    state = NodeStateFactory(objects).state()
    state.set_node_id(NODE)
    state.store_run(Run.create_empty(RUN))
    return Supernode(objects.store(), state)


@pytest.fixture
def mended(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_pull_and_store_message", "_push_messages"):
        monkeypatch.setattr(flower, name, getattr(flower, name))
    in_step.mend_supernode()


def ended() -> None:
    raise RunNotRunningException


def one_given_up_and_one_good(node: Supernode) -> tuple[str, str]:
    """Answer an order whose run ends before it is confirmed, and then a good one."""
    first, second = node.order(1), node.order(2)

    def confirm() -> None:
        node.answer(first)
        ended()

    assert node.receive(first, confirm) is None
    assert node.receive(second, lambda: None) == RUN
    node.answer(second)
    node.send()
    return first.metadata.message_id, second.metadata.message_id


def test_flowers_own_supernode_sends_a_reply_too_many(node: Supernode) -> None:
    """What is mended; once Flower does so itself, :mod:`reticent.client.in_step` can go."""
    first, second = one_given_up_and_one_good(node)
    assert node.sent == [first, second]


@pytest.mark.usefixtures("mended")
def test_a_reply_to_a_message_that_was_given_up_is_dropped(node: Supernode) -> None:
    _, second = one_given_up_and_one_good(node)
    assert node.sent == [second]


@pytest.mark.usefixtures("mended")
@pytest.mark.parametrize("gone", [False, True])
def test_of_a_message_that_was_given_up_nothing_is_left_to_answer(
    node: Supernode, gone: bool
) -> None:
    """Neither if it was here whole nor if its content never came: that would be waited for."""
    assert node.receive(node.order(1), ended, gone) is None
    assert not node.state.get_messages_legacy(is_reply=False)
    assert [task.status.status for task in node.state.get_tasks()] == ["finished"]


@pytest.mark.usefixtures("mended")
def test_in_step_a_supernode_works_as_flowers_own(node: Supernode) -> None:
    orders = [node.order(number) for number in range(3)]
    for order in orders:
        assert node.receive(order, lambda: None) == RUN
        node.answer(order)
        node.send()
    assert node.sent == [order.metadata.message_id for order in orders]
    assert node.receive(node.order(9), lambda: None) == RUN


def bundle(files: Mapping[str, str] | None = None, kind: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return an app as Flower sends it, with ``files`` by name."""
    data, held = io.BytesIO(), {"pyproject.toml": PROJECT, **(files or {})}
    listed = contents(held["pyproject.toml"].encode()).decode()
    with zipfile.ZipFile(data, "w", kind) as archive:
        for name, text in {".info/CONTENT": listed, **held}.items():
            archive.writestr(name, text)
    return data.getvalue()


def listing(*lines: str) -> bytes:
    """Return an app whose list of contents has more lines."""
    first = contents(PROJECT.encode()).decode()
    return bundle({".info/CONTENT": "\n".join([first, *lines])})


@pytest.mark.usefixtures("mended")
@pytest.mark.parametrize(
    ("kind", "content", "run"),
    [
        (TaskType.SERVER_APP, bundle(), 2),
        (TaskType.AGENT_APP, bundle(), None),
        (TaskType.SERVER_APP, bundle({"evil.py": ""}), None),
        (TaskType.SERVER_APP, b"", None),
    ],
)
def test_messages_of_runs_that_bring_code_are_ignored(
    node: Supernode, kind: TaskType, content: bytes, run: int | None
) -> None:
    order = node.order(1)
    order.metadata.__dict__["_run_id"] = 2
    found = node.receive(
        order,
        lambda: None,
        get_run=lambda number: replace(Run.create_empty(number), primary_task_type=kind),
        get_fab=lambda digest, number: Fab(digest, content, {}),
    )
    assert found == run
    assert len(node.state.get_tasks()) == (0 if run is None else 1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PK", "no bundle"),
        (bundle({"reticent/evil.pyc": ""}), "only"),
        (bundle({f"{n}.py": "" for n in range(9)}), "and more"),
        (bundle({}, zipfile.ZIP_LZMA), "compressed in another way"),
        (bundle({"pyproject.toml": "["}), "no bundle"),
        (bundle({"pyproject.toml": PROJECT.replace("0.1.0", "1/../../x")}), "project.version"),
        (bundle({"pyproject.toml": PROJECT.replace("reticent", "/etc")}), "publisher"),
        (bundle({"pyproject.toml": "a = 1"}), "project.name"),
        (bundle({"pyproject.toml": "#" * (MOST_BYTES + 1)}), "more than"),
        (bundle({".info/CONTENT": "#" * (MOST_BYTES + 1)}), "more than"),
        (bytes(MOST_BUNDLE_BYTES) + bundle(), "bytes: at most"),
        (bundle({".info/CONTENT": ""}), "list of contents"),
        (bundle({".info/CONTENT": f"pyproject.toml,{'0' * 64},8"}), "list of contents"),
        (listing(f"/etc/hostname,{'0' * 64},8"), "list of contents"),
        (listing(f"../me.csv,{'0' * 64},8"), "list of contents"),
        (listing(""), "list of contents"),
    ],
)
def test_a_bundle_of_more_than_a_configuration_is_refused(content: bytes, said: str) -> None:
    with pytest.raises(PayloadError, match=said):
        require_no_code(content)


@pytest.mark.filterwarnings("ignore:GitWildMatch")
def test_the_servers_own_apps_are_taken(tmp_path: Path) -> None:
    home = create_home(tmp_path / "server", ["127.0.0.1"], 8000, utc_now())
    (tmp_path / "app").mkdir()
    write_app(tmp_path / "app", parse_plan("", []), home, {}, "a:b")
    require_no_code(build_fab_from_disk(tmp_path / "app"))
