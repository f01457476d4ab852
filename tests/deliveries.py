"""Artifacts, offers and devices that several test files share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reticent.client.delivery import Part, Recipient
from reticent.client.folder import Device, accept_policy, create_device
from reticent.client.models import Models
from reticent.client.trial import check_model
from reticent.compression.artifact import SelfTest, write_artifact
from reticent.compression.convert import calibrate, convert
from reticent.compression.integer import build
from reticent.compression.manifest import TaskInfo
from reticent.core.bundle import read_bundle, sign_plan
from reticent.core.errors import ArtifactError
from reticent.core.offer import Offer, Receipt, offer_of, sign_offer
from reticent.core.plan import parse_plan
from reticent.core.seeds import torch_generator
from reticent.core.signing import PRIVATE_KEY, read_private_key
from reticent.server.certificates import utc_now
from reticent.server.enrolment import POLICY, enroll
from reticent.server.home import Home, create_home

PLAN = parse_plan("")
OWNERS = "[budget]\nepsilon = 9.0\ndelta = 1e-5\n[resources]\nspare_memory_mb = 0\n"
TASK = TaskInfo(name="blobs", classes=3, input_shape=(4,), preprocessing="none")
PIECE = 700


@dataclass(frozen=True)
class Fleet:
    """A server and its one device."""

    home: Home
    device: Device

    def key(self, purpose: str) -> Any:
        return read_private_key(self.home.keys / purpose / PRIVATE_KEY)

    def recipient(self, plan: Any = PLAN, **changes: Any) -> Recipient:
        """The device as it takes models; its self-test is :func:`quick` unless it is changed."""
        signature = sign_plan(self.key("plans"), plan.digest)
        options = {"trial": quick, **changes}
        return Recipient(self.device, plan.canonical, signature, **options)

    @property
    def models(self) -> Models:
        return Models(self.device.models)


def quick(folder: Path, key: Path, plan: str, size: int) -> str:
    """What the self-test's process does, in this one."""
    try:
        check_model(folder, key, plan)
    except ArtifactError as error:
        return str(error)
    return ""


def make_fleet(folder: Path, policy: str = OWNERS) -> Fleet:
    home = create_home(folder / "server", ["127.0.0.1"], 8000, utc_now())
    (bundle,) = enroll(home, ["pi-1"], POLICY, utc_now())
    device = create_device(folder / "pi-1", read_bundle(bundle))
    accept_policy(device, policy, "test")
    return Fleet(home, device)


def make_artifact(fleet: Fleet, folder: Path, seed: int = 0, **changes: Any) -> dict[str, bytes]:
    """Write an artifact that the server signed, and return its files."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    generator = torch_generator(seed, "delivery")
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    x = torch.randn(20, 4, generator=generator)
    spec = convert(model, calibrate(model, x))
    options: dict[str, Any] = {
        "task": TASK,
        "plan_digest": PLAN.digest,
        "metrics": {},
        "privacy": "off",
        "sizes": {},
        "self_test": SelfTest(x[:2], build(spec)(x[:2])),
        "private_key": fleet.key("artifacts"),
    }
    write_artifact(folder, spec, **(options | changes))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def offered(
    fleet: Fleet, files: dict[str, bytes], version: int = 1, plan: str = PLAN.digest
) -> tuple[Offer, bytes, bytes]:
    """Return an offer, the offer as it is sent, and the bytes that follow."""
    offer, data = offer_of(version, plan, files)
    return offer, sign_offer(fleet.key("artifacts"), offer), data


def parts(signed: bytes, data: bytes, begin: int = 0, piece: int = PIECE) -> list[Part]:
    """Return a model as messages bring it, from an offset on."""
    places = range(begin, len(data), piece)
    return [Part(signed, data[place : place + piece], place) for place in places]


def receipt(recipient: Recipient, part: Part) -> Receipt:
    return Receipt.decode(recipient.receive(part).value)


def bring(recipient: Recipient, signed: bytes, data: bytes) -> Receipt:
    """Ask what is there, send the rest, and return the last receipt."""
    last = receipt(recipient, Part(signed))
    for part in parts(signed, data, last.offset):
        last = receipt(recipient, part)
    return last
