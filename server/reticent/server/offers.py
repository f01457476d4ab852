"""What a server offered to devices: numbered, signed, and kept as it was sent.

``deliveries/N/`` in the server's directory holds the signed offer of version N, the bytes of its
model, and, once it was sent, ``progress.json`` and ``attempt.json``.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reticent.core.decoding import parse_json
from reticent.core.errors import ArtifactError, RunError
from reticent.core.offer import Offer, offer_of, open_offer, sign_offer
from reticent.core.run import Run, write_atomic
from reticent.core.signing import (
    PRIVATE_KEY,
    PUBLIC_KEY,
    read_private_key,
    read_public_key,
    write_new,
)

from .home import Home

WAITING, SENDING, INSTALLED, REFUSED = "waiting", "sending", "installed", "refused"


@dataclass(frozen=True)
class Parcel:
    """How far a model has come to one device.

    Attributes:
        state: ``waiting`` (for the device to connect, or to want it), ``sending``, ``installed`` or
            ``refused``.
        offset: Bytes that the device said it holds.
        reason: Why it waits or was refused, in the words of a fixed code.
    """

    state: str = WAITING
    offset: int = 0
    reason: str = ""

    @property
    def closed(self) -> bool:
        """Return whether there is nothing more to send."""
        return self.state in (INSTALLED, REFUSED)

    @property
    def words(self) -> str:
        """All of it, for a person."""
        why = f": {self.reason}" if self.reason else ""
        return f"{self.state}, {self.offset:,} bytes" if self.state == SENDING else self.state + why


@dataclass(frozen=True)
class Shipment:
    """One version, as it is sent.

    Attributes:
        folder: Its folder.
        offer: What is offered.
        signed: The offer with its signature.
    """

    folder: Path
    offer: Offer
    signed: bytes

    @property
    def run(self) -> Run:
        """The folder, as one in which a ServerApp writes its attempt."""
        return Run(self.folder)

    def data(self) -> bytes:
        """Return the model's bytes."""
        return (self.folder / "model").read_bytes()

    def write_progress(self, parcels: dict[str, Parcel]) -> None:
        """Keep how far the model has come, by device."""
        text = json.dumps({name: asdict(parcel) for name, parcel in parcels.items()})
        write_atomic(self.folder / "progress.json", text.encode())

    def progress(self) -> dict[str, Parcel]:
        """Return how far the model has come; nothing if it was not sent yet.

        Raises:
            RunError: If the record is damaged.
        """
        path = self.folder / "progress.json"
        try:
            found = parse_json(path.read_bytes())
            return {name: Parcel(**entry) for name, entry in found.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, AttributeError, OSError) as error:
            raise RunError(f"{path}: damaged: {error}") from error


def prepare_shipment(home: Home, run: Run, version: int | None = None) -> Shipment:
    """Number and sign the artifact of a run, or find it as it was offered before.

    The artifact must verify under the server's key and pass its self-test here.

    Args:
        home: The server.
        run: A run with an artifact.
        version: Offer it under this number, which must be a new one above all others; by default
            the one that it was offered under before, else the next.

    Raises:
        ArtifactError: If there is no such artifact, or it cannot have the number.
    """
    plan, files = run.plan().digest, _files(home, run)
    with _changing(home) as folder:
        known = {found.offer.version: found for found in shipments(home)}
        same = [n for n, s in known.items() if _offers(s.offer, plan, files)]
        if version in same or (version is None and same):
            return known[max(same) if version is None else version]
        highest = max(known, default=0)
        if version is not None and version <= highest:
            raise ArtifactError(
                f"--version {version}: must be above {highest}, which was offered before, because "
                "devices take no version that is not newer than theirs"
            )
        offer, data = offer_of(version or highest + 1, plan, files)
        return _keep(home, folder, offer, data)


def shipments(home: Home) -> list[Shipment]:
    """Return everything that was offered, the newest last.

    Raises:
        ArtifactError: If a record is damaged.
    """
    folders = [p for p in home.deliveries.glob("[1-9]*") if p.name.isdecimal()]
    return [open_shipment(home, int(path.name)) for path in sorted(folders, key=_number)]


def open_shipment(home: Home, version: int) -> Shipment:
    """Return what was offered under a number.

    Raises:
        ArtifactError: If there is none, or its record is damaged.
    """
    folder = home.deliveries / str(version)
    try:
        signed = (folder / "offer").read_bytes()
    except OSError as error:
        raise ArtifactError(f"{folder}: no offer there: {error.strerror}") from error
    key = read_public_key(home.keys / "artifacts" / PUBLIC_KEY)
    try:
        return Shipment(folder, open_offer(key, signed), signed)
    except ArtifactError as error:
        raise ArtifactError(f"{folder / 'offer'}: {error}") from error


def _number(path: Path) -> int:
    return int(path.name)


def _offers(offer: Offer, plan: str, files: dict[str, bytes]) -> bool:
    return offer == offer_of(offer.version, plan, files)[0]


def _files(home: Home, run: Run) -> dict[str, bytes]:
    """Return the files of a run's artifact, which devices will accept."""
    from reticent.compression.artifact import load_artifact  # imports torch
    from reticent.compression.manifest import MANIFEST, SIGNATURE

    if not run.artifact.is_dir():
        raise ArtifactError(f"{run.folder}: has no artifact: the run has not ended, or made none")
    key = read_public_key(home.keys / "artifacts" / PUBLIC_KEY)
    manifest = load_artifact(run.artifact, key).manifest
    if manifest.plan_digest != run.plan().digest:
        raise ArtifactError(f"{run.artifact}: is of another plan than the run")
    names = (MANIFEST, SIGNATURE, *manifest.files)
    return {name: (run.artifact / name).read_bytes() for name in names}


@contextmanager
def _changing(home: Home) -> Iterator[Path]:
    """Hold the folder of deliveries: two commands must not give one number twice."""
    home.deliveries.mkdir(mode=0o700, exist_ok=True)
    with (home.deliveries / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield home.deliveries


def _keep(home: Home, folder: Path, offer: Offer, data: bytes) -> Shipment:
    """Write an offer whole or not at all."""
    key = read_private_key(home.keys / "artifacts" / PRIVATE_KEY)
    part, path = folder / f".{secrets.token_hex(4)}", folder / str(offer.version)
    signed = sign_offer(key, offer)
    try:
        part.mkdir(mode=0o700)
        write_new(part / "offer", signed, 0o600)
        write_new(part / "model", data, 0o600)
        os.rename(part, path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Shipment(path, offer, signed)


def last_delivery(home: Home) -> dict[str, Any] | None:
    """Return the newest version and how far it has come, as JSON values; None if there is none."""
    found = shipments(home)
    if not found:
        return None
    parcels = {name: asdict(parcel) for name, parcel in found[-1].progress().items()}
    offer = found[-1].offer
    return {"version": offer.version, "plan": offer.plan, "bytes": offer.size, "devices": parcels}
