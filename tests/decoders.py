"""Every decoder that reads network or disk, in one list, as functions of bytes.

A decoder returns or raises one of its typed errors, in :data:`SECONDS` of CPU time, and allocates
at most ``spare`` bytes and ``factor`` times its input (its declared bound). ``tests/test_decoders``
tries a little of that in CI, ``benchmarks/fuzz.py`` much.

Formats that a digest or a signature protects are given to the parser behind it, with the digest
made to fit: a signer may err, too.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import shutil
import struct
import tempfile
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from safetensors.numpy import save
from torch import nn

from reticent.cli.inputs import read_inputs
from reticent.client.agent import Report, read_report
from reticent.client.budget import remembered_budget
from reticent.client.bundles import contents, require_no_code
from reticent.client.diary import BEGUN, Diary
from reticent.client.downlink import ModelMissing, changed, remember
from reticent.client.failures import read_failures
from reticent.client.folder import create_device, open_device, read_node_key
from reticent.client.identity import open_identity, require_met
from reticent.client.kept import Kept
from reticent.client.models import Models
from reticent.client.policy import load_policy
from reticent.client.records import pack
from reticent.compression.artifact import _unpack as unpack_self_test
from reticent.compression.backends.frames import framed, unframed
from reticent.compression.backends.qnnpack import QNNPACK
from reticent.compression.codec import Codec, build_codec
from reticent.compression.codec.build import QUANTIZERS as PLAIN_NAMES
from reticent.compression.codec.frame import OVERHEAD
from reticent.compression.convert import calibrate, convert
from reticent.compression.deployable import parse_form
from reticent.compression.manifest import TaskInfo, files_of, parse_manifest
from reticent.compression.structure import build as build_structure
from reticent.compression.structure import describe
from reticent.core.bundle import Bundle, read_bundle
from reticent.core.bundle import _canonical as canonical
from reticent.core.errors import PayloadError, ReticentError
from reticent.core.offer import Receipt, offer_of, open_offer, parse_offer, sign_offer
from reticent.core.plan import load_plan, parse_plan, plan_from_json
from reticent.core.protocol import PROTOCOL, Constants, Order
from reticent.core.run import Run
from reticent.core.seeds import torch_generator
from reticent.core.signing import SIGNATURE_BYTES
from reticent.core.tasks.folder import restore
from reticent.core.tasks.har import _read as read_har
from reticent.core.tasks.idx import encode_idx, gzip_bytes, parse_idx
from reticent.core.update import Layout
from reticent.privacy.anchor import Signed, check_statement, state
from reticent.privacy.bond import is_bond, make_bond
from reticent.privacy.events import Composed, PoissonGaussian, event_from_json
from reticent.privacy.ledger import Budget, Grants, Head, Ledger
from reticent.privacy.ledger.tip import create_tip, read_tip
from reticent.privacy.report.audited import read_audit
from reticent.privacy.report.schema import load_schema
from reticent.privacy.report.signing import read_signature, sign
from reticent.privacy.report.verify import _parsed as parse_report
from reticent.server.attempt import Attempt, Teller, error_of, read_attempt
from reticent.server.certificates import expiry, utc_now
from reticent.server.enrolment import POLICY, enroll
from reticent.server.folding import Folder, Rules
from reticent.server.folding import Kept as Public
from reticent.server.home import create_home, open_home
from reticent.server.journal import Journal
from reticent.server.offers import Shipment
from reticent.server.optimizer import ServerState
from reticent.server.partial import decode_tally, encode_tally
from reticent.server.registry import changing, read_registry
from reticent.server.replies import read_reply
from reticent.server.rounds import Tally
from reticent.simulations.grid import enter_task, node_of, numbered
from reticent.simulations.packets import Packer, Work, messages_in
from reticent.simulations.sweep.manifest import manifest_of, read_manifest, write_manifest
from reticent.simulations.sweep.points import Base

SECONDS = 1.0
MIB = 2**20
_ROOT = tempfile.TemporaryDirectory(prefix="decoders-")
FOLDER = Path(_ROOT.name)
APP = '[project]\nname = "run"\nversion = "1"\n[tool.flwr.app]\npublisher = "reticent"\n'
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
BLOCKS = (30, 0, 27)
LAYOUT = Layout(("a", "b", "c"), ((6, 5), (0,), (9, 3)))
Decode = Callable[[bytes], object]


@dataclass(frozen=True)
class Decoder:
    """One decoder.

    Attributes:
        name: What it reads.
        decode: Reads bytes, or raises one of ``errors``.
        valid: Inputs that it accepts, which others are made of.
        mended: Returns an input with its checksum made right, to get behind that.
        spare: Bytes that it may allocate whatever the input.
        factor: Bytes that it may allocate besides for each byte of input.
        errors: Its typed errors.
    """

    name: str
    decode: Decode
    valid: tuple[bytes, ...]
    mended: Callable[[bytes], bytes] = bytes
    spare: int = 2 * MIB
    factor: int = 64
    errors: tuple[type[Exception], ...] = (ReticentError,)


def with_crc(payload: bytes) -> bytes:
    """Return an encoded update with the checksum of what it holds."""
    head, rest = payload[: OVERHEAD - 4], payload[OVERHEAD:]
    return head + struct.pack("<I", zlib.crc32(rest, zlib.crc32(head))) + rest


def at(name: str, read: Callable[[Path], object]) -> Decode:
    """Return a decoder that writes its input to a file and has it read."""
    path = FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)

    def decode(data: bytes) -> object:
        path.write_bytes(data)
        return read(path)

    return decode


def in_text(read: Callable[[str], object]) -> Decode:
    """Return a decoder of text; every byte string is one, with a character for each odd byte."""
    return lambda data: read(data.decode("utf-8", "replace"))


# ----- updates and models on their way -----

_NAMES = (*PLAIN_NAMES, "topk", "randk:0.3", "lowrank:1")
_CODED = ("identity", "int8", "int4", "int2:shared", "dither8", "dither4", "sign", "topk", "randk")
CHAINS = [
    *((q,) for q in _NAMES),
    *((q, e) for q in _CODED for e in ("ans", "zstd")),
    *(("hadamard", q, "ans") for q in ("int1", "dither3", "dither2:blocks")),
]


def _encoded(codec: Codec, seed: int) -> bytes:
    generator = np.random.default_rng(seed)
    vector = generator.standard_t(2, size=57).astype(np.float32)
    return codec.encode(vector, BLOCKS, generator, 0.25)


def _codecs() -> Iterator[Decoder]:
    for names in CHAINS:
        codec = build_codec(names, LAYOUT)
        valid = tuple(_encoded(codec, seed) for seed in range(3))

        def decode(data: bytes, codec: Codec = codec) -> object:
            return codec.decode(data, BLOCKS)

        yield Decoder(f"codec {'+'.join(names)}", decode, valid, with_crc, spare=MIB // 4)


def _change() -> Decoder:
    codec, model = build_codec(("int8", "ans"), LAYOUT), np.ones(57, dtype=np.float32)
    held = RecordDict()
    remember(held, model)
    payload = codec.encode(model, BLOCKS, np.random.default_rng(0))
    after = model + codec.decode(payload, BLOCKS)
    marks = [hashlib.sha256(v.astype("<f4").tobytes()).digest() for v in (model, after)]

    def decode(data: bytes) -> object:
        return changed(codec, data[64:], data[:64], BLOCKS, held)

    valid = b"".join(marks) + payload
    return Decoder("change of a model", decode, (valid,), errors=(ReticentError, ModelMissing))


def _reply() -> Decoder:
    """Read a reply as the server does: its update, behind the bit of an adaptive bound."""
    enter_task()
    codec = build_codec(("int8", "ans"), LAYOUT)
    folder = Folder(codec, Rules(1, LAYOUT, 1e6, clip=1.0, bit=True))
    order = numbered(Message(RecordDict(), node_of(0), "train", group_id="1"), 1)

    def decode(data: bytes) -> object:
        return folder.read(Message(RecordDict({"update": pack(data)}), reply_to=order))

    valid = b"\1" + _encoded(codec, 0)
    return Decoder("reply", decode, (valid,), lambda d: d[:1] + with_crc(d[1:]))


def _objects() -> Decoder:
    """Read the objects of a reply as a SuperLink hands them over, here each behind its length."""
    enter_task()
    order = numbered(Message(RecordDict(), node_of(0), "train", group_id="1"), 1)
    content = {"update": pack(b"u" * 200), "statement": pack(b"s" * 90)}
    found = get_all_nested_objects(Message(RecordDict(content), reply_to=order))
    names = list(found)

    def decode(data: bytes) -> object:
        objects, rest = dict[str, bytes](), data
        for name in names:
            end = 2 + int.from_bytes(rest[:2], "big")
            objects[name], rest = rest[2:end], rest[end:]
        return read_reply(names[-1], objects)

    deflated = [it.deflate() for it in found.values()]
    valid = b"".join(len(content).to_bytes(2, "big") + content for content in deflated)
    return Decoder("objects of a reply", decode, (valid,))


_CHAIN = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def _structure() -> Decoder:
    text = describe(_CHAIN)
    read = in_text(lambda text: build_structure(text, (1, 6, 6), 3, 10_000))
    return Decoder("structure", read, (text.encode(),), spare=8 * MIB)


def _constants() -> Decoder:
    one = Constants(b"\xff\x80", np.eye(3, dtype=np.float32))
    held = np.ones(5, dtype=np.float32)
    two = Constants(b"", np.zeros((0, 0), dtype=np.float32), "{}", held, held)
    return Decoder("constants", Constants.decode, (one.encode(), two.encode()))


def _order() -> Decoder:
    order = Order(PROTOCOL, "run", "ab" * 32, 3, "cd" * 32, 1.5, 6.4, 0.5)

    def decode(data: bytes) -> object:
        try:
            config = dict(ConfigRecord(json.loads(data)))
        except (ValueError, TypeError, RecursionError, AttributeError) as error:
            raise PayloadError("Flower's own record holds nothing else") from error
        return Order.from_config(config)

    return Decoder("order", decode, (json.dumps(asdict(order)).encode(),))


def _statement() -> Decoder:
    signed = state(KEY, Head(7, "ab" * 32), "run", 1, b"payload")

    def decode(data: bytes) -> object:
        return check_statement(Signed.decode(data), "run", 1, b"payload")

    return Decoder("ledger statement", decode, (signed.encode(),))


def _offers() -> Iterator[Decoder]:
    offer, _ = offer_of(3, "ab" * 32, {"manifest.json": b"{}", "model.safetensors": b"x" * 90})
    signed = sign_offer(KEY, offer)

    def decode(data: bytes) -> object:
        return open_offer(KEY.public_key(), data)

    yield Decoder("offer, signed", decode, (signed,))
    yield Decoder("offer", parse_offer, (signed[SIGNATURE_BYTES:],), factor=256)
    yield Decoder("receipt", Receipt.decode, (Receipt(3, 12345).encode(),))


# ----- between the processes of a simulation -----


def _partial() -> Iterator[Decoder]:
    for keep in (False, True):
        tally = Tally.begin(57, keep)
        tally.sum.add(np.ones(57, dtype=np.float32))
        tally.accepted, tally.failed = {3}, {5}
        if tally.vectors is not None:
            tally.vectors[3] = np.ones(57, dtype=np.float32)

        def decode(data: bytes, keep: bool = keep) -> object:
            return decode_tally(data, 57, keep)

        yield Decoder(f"partial sum, keep={keep}", decode, (encode_tally(tally),))


def _packets() -> Iterator[Decoder]:
    enter_task()
    order = ConfigRecord({"round": 3, "clip": 0.1, "run": "r"})
    content = {"order": order, "broadcast": pack(b"model")}
    sent = [Message(RecordDict(content), node_of(n), "train", group_id="3") for n in range(3)]
    packer = Packer(Rules(3, LAYOUT, 1e6), Public(b"constants", np.ones(57, dtype=np.float32)))
    data = packer.work(sent)
    event = PoissonGaussian(0.1, 1.0, 1)
    grants = Grants(FOLDER, "r", 3, event, {"client-0": 1}, {"client-1": 4.0})
    share, work = packer.share(sent, grants), Work.decode(data)
    yield Decoder("work of a round", Work.decode, (data,))
    yield Decoder("share of a round", lambda data: messages_in(data, work, FOLDER), (share,))


# ----- files: plans and data -----


def _plans() -> Iterator[Decoder]:
    toml = (
        b'[task]\nname = "digits"\n[federation]\nrounds = 3\n[updates]\ncodec = ["int8", "ans"]\n'
    )
    plan = parse_plan(toml.decode())
    # A plan is written by people: what it declares is read whole, so memory follows the text.
    yield Decoder("plan.toml", at("plan.toml", load_plan), (toml,), factor=4096)
    read = in_text(plan_from_json)
    yield Decoder("plan as JSON", read, (plan.canonical().encode(),), factor=4096)


def _npz(**arrays: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)  # pyright: ignore[reportArgumentType]
    return out.getvalue()


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def _data() -> Iterator[Decoder]:
    images = encode_idx(np.arange(18, dtype=np.uint8).reshape(2, 3, 3))
    idx = (images, gzip_bytes(images), encode_idx(np.ones((2, 2), dtype=np.float32)))

    def parse(data: bytes) -> object:
        return parse_idx(data, max_bytes=MIB)

    yield Decoder("IDX", parse, idx, spare=3 * MIB)
    signals = {"signals": np.zeros((4, 9, 128)), "label": np.ones(4), "user": np.ones(4)}
    har = _npz(**{k: v.astype(np.float32) for k, v in signals.items()})
    stored = io.BytesIO()
    np.savez(stored, **{k: v[:1] for k, v in signals.items()})
    yield Decoder("har.npz", at("har.npz", read_har), (har, stored.getvalue()), factor=2048)
    packed = save({"signals": np.ones(3, dtype=np.float32)})
    folder = at("data/own.safetensors", lambda path: restore(path.parent, "own", "add it"))
    yield Decoder("data folder", folder, (packed,))
    task = TaskInfo(name="t", classes=3, input_shape=(4,), preprocessing='{"divide": 255}')
    array = np.ones((2, 4), dtype=np.float32)
    for suffix, valid in ((".npy", _npy(array)), (".safetensors", save({"inputs": array}))):
        name = f"inputs{suffix}"
        yield Decoder(name, at(name, lambda path: read_inputs(path, task)), (valid,))


# ----- files: artifacts, reports, runs -----


def _artifact() -> Iterator[Decoder]:
    generator = torch_generator(11, "decoders")
    with torch.no_grad():
        for p in _CHAIN.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    x = torch.randn(40, 1, 6, 6, generator=generator)
    spec = convert(_CHAIN, calibrate(_CHAIN, x))
    graph = spec.graph.model_dump_json().encode()
    yield Decoder("model.json", parse_form, (graph,), factor=256)
    model = QNNPACK.write(spec, (1, 6, 6))

    def load(data: bytes) -> object:
        return QNNPACK.load(spec.graph, data)

    yield Decoder("model.safetensors", load, (model,), spare=8 * MIB, factor=4096)
    entry = {"bytes": 3, "sha256": "ab" * 32}
    manifest = {
        "created_by": "reticent",
        "plan_digest": "ab" * 32,
        "task": {"name": "t", "classes": 3, "input_shape": [1, 6, 6], "preprocessing": "none"},
        "metrics": {},
        "privacy": {"epsilon": 8.0},
        "sizes": {},
        "files": dict.fromkeys(files_of("qnnpack"), entry),
    }
    yield Decoder("manifest.json", parse_manifest, (json.dumps(manifest).encode(),), factor=256)
    tensors = save({"inputs": np.ones((1, 4), dtype=np.float32)})

    def unpack(data: bytes) -> object:
        return unpack_self_test("self_test.safetensors", {"self_test.safetensors": data})

    yield Decoder("self_test.safetensors", unpack, (tensors,))
    frame = framed(bytes(100) + b"x" * 50)
    yield Decoder("zstandard frame", lambda data: unframed(data, "m"), (frame,), spare=17 * MIB)


def _least(schema: dict[str, Any]) -> Any:
    """Return a small value that a JSON Schema of the report's kind admits."""
    if "$ref" in schema:
        return _least(load_schema()["$defs"][schema["$ref"].split("/")[-1]])
    if "anyOf" in schema:
        return _least(schema["anyOf"][0])
    if "const" in schema or "enum" in schema:
        return schema.get("const", next(iter(schema.get("enum", [None]))))
    kind = schema.get("type", "null")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        return {name: _least(schema["properties"][name]) for name in schema.get("required", [])}
    if kind == "array":
        return [_least(schema["items"]) for _ in range(schema.get("minItems", 1))]
    number = schema.get("minimum", schema.get("exclusiveMinimum", 0) + 0.5)
    text = "ab" * 32 if "64" in schema.get("pattern", "") else "ab"
    whole = max(1, schema.get("minimum", 1))
    values = {"string": text, "boolean": True, "number": number, "integer": whole}
    return values.get(kind)


def _reports() -> Iterator[Decoder]:
    run = Run(FOLDER / "report-run")
    run.folder.mkdir()
    report = json.dumps(_least(load_schema())).encode()
    yield Decoder("report.json", lambda data: parse_report(run, data), (report,), factor=4096)
    signed = sign(KEY, "ab" * 32, "cd" * 32, {"report.json": report}).encode()

    def signature(data: bytes) -> object:
        return read_signature(data, KEY.public_key(), "report.sig")

    yield Decoder("report.sig", signature, (signed,))
    plan = parse_plan("")
    audit = {
        **{"schema": 1, "plan": plan.digest, "unit": "example", "relation": "add-or-remove-one"},
        **{"claimed": {"epsilon": 8.0, "delta": 1e-5}, "lower_bound": 1.0, "confidence": 0.99},
        **{"weaker_bounds": {"any_dependence": 0.5, "any_mechanism": 0.5}, "estimate": None},
        **{"method": "m", "canaries": 8, "rounds": 2, "interval": [0.1, 0.9], "interval_of": "x"},
        "randomness": {
            **{"pairs": 1, "largest_correlation": None, "limit": None, "variance_ratio": 1.0},
            **{"variance_interval": [0.9, 1.1], "passed": True},
        },
        **{"verdict": "consistent", "seconds": 1.5, "command": "c"},
    }
    read = at("report-run/audit.json", lambda path: read_audit(run, plan))
    yield Decoder("audit.json", read, (json.dumps(audit).encode(),))
    known = PoissonGaussian(0.1, 1.0, 3)
    event = Composed((known, known), 2).to_json().encode()
    yield Decoder("event", in_text(event_from_json), (known.to_json().encode(), event), factor=256)


def _runs() -> Iterator[Decoder]:
    run = Run(FOLDER / "run")
    run.folder.mkdir()
    run.checkpoints.mkdir()
    journal = Journal(run)
    journal.commit(ServerState.begin(np.ones(3, dtype=np.float32)), {"round": 0}, ["1"], None)
    stored = run.checkpoints / "round-000000.safetensors"
    valid = stored.read_bytes()
    journal._db.execute("PRAGMA synchronous = OFF")

    def checkpoint(data: bytes) -> object:
        stored.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        journal._db.execute("UPDATE rounds SET checkpoint = ?, metrics = '{}'", (digest,))
        return journal.latest()

    def figures(data: bytes) -> object:
        text = data.decode("utf-8", "replace")
        journal._db.execute("UPDATE rounds SET metrics = ?", (text,))
        return journal.metrics()

    yield Decoder("checkpoint", checkpoint, (valid,))
    yield Decoder("figures of the journal", figures, (b'{"round": 1, "dropped": {}}',), factor=256)
    summary = at("run/summary.json", lambda path: run.read_summary())
    yield Decoder("summary.json", summary, (b'{"accuracy": 0.5}',), factor=256)
    lines = at("run/metrics.jsonl", lambda path: run.read_metrics())
    yield Decoder("metrics.jsonl", lines, (b'{"round": 1}\n{"round": 2}\n',), factor=256)
    shipment = Shipment(FOLDER / "shipment", offer_of(1, "ab" * 32, {"model": b"x"})[0], b"")
    progress = at("shipment/progress.json", lambda path: shipment.progress())
    way = b'{"pi-1": {"state": "sending", "offset": 5, "reason": ""}}'
    yield Decoder("progress.json", progress, (way,), factor=256)
    (FOLDER / "sweep").mkdir(exist_ok=True)
    write_manifest(FOLDER / "sweep", manifest_of(Base("", (), "plan"), {"seed": ("1", "2")}, 1))
    sweep = (FOLDER / "sweep" / "sweep.json").read_bytes()
    yield Decoder("sweep.json", at("sweep/sweep.json", lambda p: read_manifest(p.parent)), (sweep,))


# ----- files: a device's own -----


def _device() -> Iterator[Decoder]:
    folder = FOLDER / "device"
    folder.mkdir()
    ledger = Ledger.open(FOLDER / "ledger")
    identity = open_identity(folder, ())
    head = ledger.charge("device", "r", 1, PoissonGaussian(0.1, 1.0, 1), Budget(9.0, 1e-5))
    anchors = json.dumps({identity.name: [head.sequence, ledger.head().mac]}).encode()

    def met(path: Path) -> object:
        return require_met(ledger, path.parent)

    yield Decoder("anchors.json", at("device/anchors.json", met), (anchors,))
    budget = at("device/budget.json", lambda path: remembered_budget(path.parent))
    yield Decoder("budget.json", budget, (b'{"epsilon": 3.0, "delta": 1e-5}',))
    create_tip(folder / "ledger.tip", bytes(32), Head(4, "ab" * 32))
    tip = at("device/ledger.tip", lambda path: read_tip(path, bytes(32)))
    yield Decoder("ledger.tip", tip, ((folder / "ledger.tip").read_bytes(),))
    slots = [{"version": v, "plan": "ab" * 32, "sha256": "cd" * 32} for v in (3, 2)]
    tried = [{"version": 4, "failed": 1, "cut_short": 2, "at": 1.5}]
    state = json.dumps({"slots": slots, "highest": 3, "tried": tried}).encode()
    before = json.dumps({"slots": slots, "highest": 3, "tried": 4, "tries": 1}).encode()
    models = at("device/models/state.json", lambda path: Models(path.parent).state())
    yield Decoder("models/state.json", models, (state, before))
    own = Kept(folder / "personal", "d", "run")
    own.keep(1, np.ones(4, dtype=np.float32))
    path = own._path(1)

    def vector(data: bytes) -> object:
        path.write_bytes(data)
        return own.before(2, np.zeros(4, dtype=np.float32))

    yield Decoder("kept vector", vector, (path.read_bytes(),))


# ----- files of a deployment: bundles, policies, a server's and a device's folder -----


def _with_checksum(data: bytes) -> bytes:
    """Return a bundle with the checksum of what it holds."""
    try:
        content = json.loads(data)
        content.pop("checksum", None)
        digest = hashlib.sha256(canonical(content)).hexdigest()
        return json.dumps({**content, "checksum": digest}).encode("ascii")
    except (ValueError, TypeError, AttributeError, RecursionError):
        return data


def _app(project: bytes) -> bytes:
    """Return an app of one file."""
    app = io.BytesIO()
    with zipfile.ZipFile(app, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pyproject.toml", project)
        archive.writestr(".info/CONTENT", contents(project))
    return app.getvalue()


def _with_contents(data: bytes) -> bytes:
    """Return an app with the list of contents of what it holds, if that can be read."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive, archive.open("pyproject.toml") as file:
            return _app(file.read(2**18))
    except Exception:
        return data


def _deployment() -> Iterator[Decoder]:
    now = utc_now()
    home = create_home(FOLDER / "server", ["127.0.0.1", "::1"], 8000, now)
    (path,) = enroll(home, ["pi-1"], POLICY, now)
    with changing(home.devices) as registry:
        key = replace(registry.devices["pi-1"].key, node=2**63 + 5)
        registry.devices["pi-1"] = registry.devices["pi-1"].with_key(key)
    yield Decoder("bundle", Bundle.decode, (path.read_bytes(),), _with_checksum)
    yield Decoder("app", require_no_code, (_app(APP.encode()),), _with_contents)
    device = create_device(FOLDER / "pi-1", read_bundle(path))

    def unpacked(data: bytes) -> object:
        try:
            return create_device(FOLDER / "new-device", Bundle.decode(data))
        finally:
            shutil.rmtree(FOLDER / "new-device", ignore_errors=True)

    yield Decoder("bundle's keys", unpacked, (path.read_bytes(),), _with_checksum, factor=256)
    full = re.sub(r"(?m)^# (?=\w+ = )", "", POLICY).encode()  # with all that it only proposes
    # A policy is written by people: what it declares is read whole, so memory follows the text.
    yield Decoder("policy", at("policy.toml", load_policy), (POLICY.encode(), full), factor=4096)
    registered = at("server/devices.json", read_registry)
    yield Decoder("devices.json", registered, (home.devices.read_bytes(),), factor=256)
    settings = at("server/server.toml", lambda path: open_home(path.parent))
    valid = (home.folder / "server.toml").read_bytes()
    yield Decoder("server.toml", settings, (valid,), factor=4096)
    yield Decoder("certificate", lambda d: expiry(d, path), ((home.tls / "ca.crt").read_bytes(),))
    own = at("pi-1/device.toml", lambda path: open_device(path.parent))
    toml = (device.folder / "device.toml").read_bytes()
    yield Decoder("device.toml", own, (toml,), factor=4096)
    node = device.node_key.read_bytes()
    yield Decoder("node key", at("pi-1/other.key", read_node_key), (node,))
    bond = make_bond(read_node_key(device.node_key), "ab" * 32)
    yield Decoder("bond", lambda d: is_bond(d, key.public, "ab" * 32), (bond,))


def _told() -> Iterator[Decoder]:
    """What processes tell each other in small files."""
    run = Run(FOLDER / "told")
    run.folder.mkdir()
    Teller(run, "token").seen(2, "pi-1")
    valid = (run.folder / "attempt.json").read_bytes()
    attempt = at("told/attempt.json", lambda _: error_of(read_attempt(run) or Attempt("", 0, 0)))
    yield Decoder("attempt.json", attempt, (valid,), factor=256)
    diary = Diary(run.folder)
    diary.add(BEGUN, plan="ab" * 32, round=1)
    diary.add("refused", "a reason", "ab" * 32, 2, 1011)
    lines = (run.folder / "diary.jsonl").read_bytes()

    def told(path: Path) -> object:
        return diary.lines(), diary.failures("ab" * 32), diary.refusals()

    yield Decoder("diary.jsonl", at("told/diary.jsonl", told), (lines,), factor=512)
    counts = (run.folder / "failures.json").read_bytes()
    failed = at("told/failures.json", lambda path: read_failures(path.parent))
    yield Decoder("failures.json", failed, (counts,), factor=256)
    device = open_device(FOLDER / "pi-1")
    report = json.dumps(asdict(Report("running", node=7))).encode()
    said = at("pi-1/agent.json", lambda _: read_report(device))
    yield Decoder("agent.json", said, (report,), factor=256)


DECODERS: dict[str, Decoder] = {
    decoder.name: decoder
    for decoder in (
        *_codecs(),
        _change(),
        _reply(),
        _objects(),
        _structure(),
        _constants(),
        _order(),
        _statement(),
        *_offers(),
        *_partial(),
        *_packets(),
        *_plans(),
        *_data(),
        *_artifact(),
        *_reports(),
        *_runs(),
        *_device(),
        *_deployment(),
        *_told(),
    )
}


# ----- trying them -----

_NUMBERS = (0, 1, 0x7F, 0xFF, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
TOKENS = (
    *(n.to_bytes(8, "little") for n in _NUMBERS),
    *(n.to_bytes(4, "big") for n in _NUMBERS if n < 2**32),
    *(b"NaN", b"Infinity", b"-1", b"1e999", b"null", b"true", b"{}", b"[]", b'""', b"\\ud800"),
    *(
        b"9" * 400,
        b"9" * 5000,
        b"[" * 3000,
        b'{"a":' * 3000,
        b"\0" * 64,
        b"\xff" * 64,
        b"F64",
        b"BF16",
    ),
)


def mutated(decoder: Decoder, random: random.Random) -> bytes:
    """Return one of the valid inputs of ``decoder`` with a few places changed."""
    data = bytearray(random.choice(decoder.valid))
    for _ in range(random.randint(1, 4)):
        place, end = random.randint(0, len(data)), random.randint(0, len(data))
        kind = random.randint(0, 5)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << random.randint(0, 7)
        elif kind == 1:
            data[place : place + random.randint(0, 8)] = random.choice(TOKENS)
        elif kind == 2:
            data[place:place] = random.randbytes(random.randint(1, 8))
        elif kind == 3:
            del data[place : place + random.randint(1, 8)]
        elif kind == 4:
            data[place:place] = data[min(place, end) : max(place, end)]
        else:
            del data[place:]
    return decoder.mended(bytes(data)) if random.random() < 0.7 else bytes(data)


@dataclass(frozen=True)
class Cost:
    """What one decoding took: seconds of this thread's CPU, and bytes at their peak."""

    seconds: float
    bytes: int
    accepted: bool


def tried(decoder: Decoder, data: bytes) -> Cost:
    """Decode ``data`` under ``tracemalloc``; anything but a typed error is raised."""
    tracemalloc.reset_peak()
    before, began, accepted = tracemalloc.get_traced_memory()[0], time.thread_time(), True
    try:
        decoder.decode(data)
    except decoder.errors:
        accepted = False
    seconds = time.thread_time() - began
    return Cost(seconds, tracemalloc.get_traced_memory()[1] - before, accepted)


def exceeded(decoder: Decoder, data: bytes, cost: Cost) -> str:
    """Return which bound ``cost`` exceeds, in words; empty for none."""
    most = decoder.spare + decoder.factor * len(data)
    if cost.seconds > SECONDS:
        return f"{decoder.name}: {cost.seconds:.2f} s for {len(data)} bytes"
    if cost.bytes > most:
        return f"{decoder.name}: {cost.bytes} bytes for {len(data)}: at most {most}"
    return ""
