"""The server's directory: keys, certificates, devices, and how its SuperLink is configured."""

from __future__ import annotations

import ipaddress
import os
import secrets
import shutil
import sys
import tomllib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import tomli_w
from cryptography.hazmat.primitives.serialization import Encoding

from reticent.core.durable import sync_folder
from reticent.core.errors import ProvisionError
from reticent.core.run import write_atomic
from reticent.core.signing import PUBLIC_KEY, make_signing_key, read_public_key, write_new
from reticent.core.systemd import quoted

from .certificates import (
    Issued,
    alternative_names,
    expiry,
    make_authority,
    make_server,
    read_authority_key,
    read_certificate,
)
from .countersign import create_state
from .unit import NAME, server_unit

CONNECTION = "reticent"
_ALWAYS = ["localhost", "127.0.0.1"]  # names of this machine, wherever its commands come in


@dataclass(frozen=True)
class Home:
    """Paths in a server's directory, which :func:`create_home` makes.

    Attributes:
        folder: An absolute path.
        hosts: Names and addresses by which devices reach the server; the first is in bundles.
        port: The SuperLink's TCP port.
    """

    folder: Path
    hosts: tuple[str, ...]
    port: int

    @property
    def address(self) -> str:
        """``host:port`` for devices."""
        return _joined(self.hosts[0], self.port)

    @property
    def listens_on(self) -> str:
        """The first host if devices are to come from this machine alone, else every interface.

        Of IPv6 if the first host is an address of IPv6: the SuperLink listens on one family.
        """
        if all(map(_is_loopback, self.hosts)):
            return _loopback(self.hosts[0])
        return "::" if ":" in self.hosts[0] else "0.0.0.0"

    @property
    def inward(self) -> str:
        """The loopback address at which this machine's own commands reach the SuperLink."""
        return {"::": "::1", "0.0.0.0": "127.0.0.1"}.get(self.listens_on, self.listens_on)

    @property
    def tls(self) -> Path:
        """Folder of ``ca.crt``, ``ca.key``, ``server.crt`` and ``server.key``."""
        return self.folder / "tls"

    @property
    def keys(self) -> Path:
        """Folder of the countersigning key; those of plans and artifacts are in folders in it."""
        return self.folder / "keys"

    @property
    def devices(self) -> Path:
        """The record of enrolled devices."""
        return self.folder / "devices.json"

    @property
    def bundles(self) -> Path:
        """Folder of the devices' bundles; they hold private keys."""
        return self.folder / "bundles"

    @property
    def flower(self) -> Path:
        """Flower's own home (``FLWR_HOME``), with the connection to this server's SuperLink."""
        return self.folder / "flower"

    @property
    def database(self) -> Path:
        """The SuperLink's SQLite database."""
        return self.folder / "superlink.db"

    @property
    def log(self) -> Path:
        """What a SuperLink prints that ``reticent server run`` started."""
        return self.folder / "superlink.log"

    @property
    def last_run(self) -> Path:
        """Names the run directory that was served last."""
        return self.folder / "last-run"

    @property
    def deliveries(self) -> Path:
        """Folder of the models that were offered to devices."""
        return self.folder / "deliveries"

    @property
    def unit(self) -> Path:
        """The systemd unit."""
        return self.folder / NAME

    def public_key(self, purpose: str = "") -> str:
        """Return the public half of a key as PEM; ``purpose`` is "", "plans" or "artifacts".

        Raises:
            ArtifactError: If it is not there, or not one.
        """
        path = self.keys / purpose / PUBLIC_KEY
        read_public_key(path)
        return path.read_text()

    def authority(self) -> str:
        """Return the certificate of the server's authority as PEM.

        Raises:
            ProvisionError: If it is not there, or not one.
        """
        path = self.tls / "ca.crt"
        return read_certificate(_read(path), path).public_bytes(Encoding.PEM).decode("ascii")

    def certificate_ends(self, name: str) -> datetime:
        """Return when ``ca.crt`` or ``server.crt`` ends."""
        path = self.tls / name
        return expiry(_read(path), path)


def create_home(folder: Path, hosts: list[str], port: int, now: datetime) -> Home:
    """Make a server's directory with new keys and certificates, whole or not at all.

    Directories get mode 0700 and private keys 0600. Nothing that exists is ever overwritten.

    Raises:
        ProvisionError: If the folder exists and is not empty, a host is not one, or it cannot be
            written, or Flower or systemd cannot be given its path.
    """
    folder = folder.expanduser().absolute()
    alternative_names(hosts)
    _require_path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ProvisionError(
            f"{folder}: already exists and is not empty; nothing was overwritten. `reticent server "
            "rotate` renews the certificate of a server; choose another folder for a new one"
        )
    home = Home(folder, tuple(hosts), port)
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        part.mkdir(mode=0o700, parents=True)
        _fill(Home(part, home.hosts, port), home, now)
        part.replace(folder)
    except OSError as error:
        raise ProvisionError(f"{folder}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return home


def open_home(folder: Path) -> Home:
    """Open what :func:`create_home` made.

    Raises:
        ProvisionError: If it is not there, or damaged.
    """
    folder = folder.expanduser().absolute()
    path = folder / "server.toml"
    try:
        settings = tomllib.loads(_read(path).decode())
    except (ValueError, RecursionError) as error:
        raise ProvisionError(f"{path}: damaged: {error}") from error
    return Home(folder, *_settings(settings, path))


def rotate_certificate(home: Home, now: datetime) -> datetime:
    """Replace the server's certificate and its key by new ones of the same authority.

    Devices need nothing new. A SuperLink that runs uses them from its next start on. How Flower's
    commands reach it is written anew too: an earlier version may have had it otherwise.

    Returns:
        When the new certificate ends.

    Raises:
        ProvisionError: If the authority cannot be used: the old certificate stays.
    """
    where = home.tls / "ca.key"
    authority = Issued(home.authority().encode("ascii"), _read(where))
    read_authority_key(authority, where)
    _write_server(home, authority, now)
    write_private(home.flower / "config.toml", _connection(home).encode())
    return home.certificate_ends("server.crt")


def _require_path(folder: Path) -> None:
    """Refuse a folder that systemd or Flower would not take as it is.

    Raises:
        ProvisionError: Saying why.
    """
    quoted(folder)
    if "?" in str(folder):
        raise ProvisionError(
            f"{folder}: must hold no ?, at which Flower takes its database's path to end: choose "
            "another folder"
        )


def _fill(part: Home, final: Home, now: datetime) -> None:
    create_state(part.folder)
    signing = [part.keys / purpose for purpose in ("plans", "artifacts")]
    for folder in (part.keys, *signing, part.tls, part.bundles, part.flower):
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
    for folder in signing:
        make_signing_key(folder)
    authority = make_authority(now)
    write_new(part.tls / "ca.key", authority.key, 0o600)
    write_new(part.tls / "ca.crt", authority.certificate, 0o644)
    _write_server(part, authority, now)
    write_new(part.folder / "server.toml", tomli_w.dumps(_stored(final)).encode(), 0o644)
    write_new(part.flower / "config.toml", _connection(final).encode(), 0o600)
    write_new(part.unit, server_unit(final.folder, command()).encode(), 0o644)


def command() -> Path:
    """Return the absolute path of the ``reticent`` command of this installation."""
    return Path(sys.executable).absolute().parent / "reticent"


def _write_server(home: Home, authority: Issued, now: datetime) -> None:
    names = list(dict.fromkeys([*home.hosts, *_ALWAYS, home.inward]))
    made = make_server(authority, names, now)
    # A crash between the two leaves a pair that TLS refuses: rotating again mends it.
    write_private(home.tls / "server.key", made.key)
    write_atomic(home.tls / "server.crt", made.certificate)


def write_private(path: Path, data: bytes) -> None:
    """Replace a file whose mode is 0600 from its first byte on; durable on return.

    After a crash either the old or the new content is there.
    """
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    write_new(temporary, data, 0o600)
    os.replace(temporary, path)
    sync_folder(path.parent)


def _connection(home: Home) -> str:
    settings = {
        "address": _joined(home.inward, home.port),
        "root-certificates": str(home.tls / "ca.crt"),
    }
    table = {"superlink": {"default": CONNECTION, CONNECTION: settings}}
    return tomli_w.dumps(table)


def _stored(home: Home) -> dict[str, Any]:
    return {"hosts": list(home.hosts), "port": home.port}


def _settings(given: dict[str, Any], path: Path) -> tuple[tuple[str, ...], int]:
    hosts, port = given.get("hosts"), given.get("port")
    if set(given) != {"hosts", "port"} or not isinstance(hosts, list) or not hosts:
        raise ProvisionError(f"{path}: must hold hosts, a list, and port, and nothing else")
    if type(port) is not int or not 1 <= port <= 65535:
        raise ProvisionError(f"{path}: port={port!r}: must be a number from 1 to 65535")
    return _hosts(hosts, path), port


def _hosts(given: list[Any], path: Path) -> tuple[str, ...]:
    for host in given:
        if not isinstance(host, str):
            raise ProvisionError(f"{path}: hosts: {host!r}: must be a string")
    alternative_names(given, f"{path}: hosts:")
    return tuple(given)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ProvisionError(
            f"{path}: cannot be read: {error.strerror}; `reticent server init` makes it"
        ) from error


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _loopback(host: str) -> str:
    return "127.0.0.1" if host == "localhost" else str(ipaddress.ip_address(host))
