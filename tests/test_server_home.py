from __future__ import annotations

import ipaddress
import os
import shlex
import shutil
import socket
import ssl
import stat
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread

import click
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from reticent.cli.main import cli
from reticent.client.unit import device_unit
from reticent.core.errors import ProvisionError
from reticent.core.signing import read_private_key, read_public_key
from reticent.server.certificates import (
    AUTHORITY_DAYS,
    SERVER_DAYS,
    Issued,
    expiry_warning,
    make_authority,
    make_node_key,
    make_server,
    read_certificate,
    utc_now,
)
from reticent.server.flower import answers, arguments
from reticent.server.home import Home, create_home, open_home, rotate_certificate
from reticent.server.unit import server_unit

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
HOSTS = ["server.example", "192.0.2.7", "2001:db8::7"]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return create_home(tmp_path / "server", HOSTS, 8443, NOW)


def loaded(path: Path) -> x509.Certificate:
    return read_certificate(path.read_bytes(), path)


def verified(home: Home, *arguments: str, at: datetime = NOW) -> bool:
    """What `openssl verify` says of the server's certificate."""
    command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver"]
    command += ["-attime", str(int(at.timestamp())), "-CAfile", str(home.tls / "ca.crt")]
    done = subprocess.run(
        [*command, *arguments, str(home.tls / "server.crt")], capture_output=True, check=False
    )
    return done.returncode == 0


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_verifies_the_certificate_for_every_host_and_no_other(home: Home) -> None:
    for host in ("server.example", "localhost"):
        assert verified(home, "-verify_hostname", host)
    for address in ("192.0.2.7", "2001:db8::7", "127.0.0.1"):
        assert verified(home, "-verify_ip", address)
    assert not verified(home, "-verify_hostname", "other.example")
    assert not verified(home, "-verify_ip", "192.0.2.8")
    assert not verified(home, "-verify_hostname", "192.0.2.7x")
    assert not verified(home, at=NOW + timedelta(days=SERVER_DAYS + 1))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_refuses_another_authority_and_a_server_that_signs(
    home: Home, tmp_path: Path
) -> None:
    other = create_home(tmp_path / "other", HOSTS, 8443, NOW)
    shutil.copy(other.tls / "ca.crt", home.tls / "ca.crt")
    assert not verified(home)


def test_the_authority_may_sign_certificates_and_the_server_may_not(home: Home) -> None:
    ca, server = loaded(home.tls / "ca.crt"), loaded(home.tls / "server.crt")
    basic = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert basic.critical and basic.value.ca and basic.value.path_length == 0
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical and usage.value.key_cert_sign and usage.value.crl_sign
    assert not usage.value.digital_signature
    own = server.extensions.get_extension_for_class(x509.KeyUsage)
    assert own.critical and own.value.digital_signature and not own.value.key_cert_sign
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    purposes = server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purposes) == [ExtendedKeyUsageOID.SERVER_AUTH]
    server.verify_directly_issued_by(ca)
    assert server.serial_number != ca.serial_number


def test_names_are_names_and_addresses_are_addresses(home: Home) -> None:
    server = loaded(home.tls / "server.crt")
    found = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert found.get_values_for_type(x509.DNSName) == ["server.example", "localhost"]
    addresses = found.get_values_for_type(x509.IPAddress)
    assert addresses == [ipaddress.ip_address(a) for a in (*HOSTS[1:], "127.0.0.1")]


@pytest.mark.parametrize(
    "host",
    [
        *("", "a b", "-a.example", "a..b", "300.1.1.1", "1.2.3", "ä.example", "a" * 64),
        *("fe80::1%eth0", "::ffff:192.0.2.7"),
        *("0.0.0.0", "::", "fe80::1", "169.254.1.1", "224.0.0.1", "ff02::1", "255.255.255.255"),
    ],
)
def test_what_is_no_host_is_refused_before_anything_is_written(tmp_path: Path, host: str) -> None:
    with pytest.raises(ProvisionError, match="--host"):
        create_home(tmp_path / "server", [host], 8000, NOW)
    assert list(tmp_path.iterdir()) == []


def test_certificates_end_when_they_say(home: Home) -> None:
    assert home.certificate_ends("ca.crt") == NOW + timedelta(days=AUTHORITY_DAYS)
    assert home.certificate_ends("server.crt") == NOW + timedelta(days=SERVER_DAYS)


def test_a_certificate_does_not_outlive_its_authority() -> None:
    authority = make_authority(NOW)
    late = NOW + timedelta(days=AUTHORITY_DAYS - 10)
    server = read_certificate(make_server(authority, ["a.example"], late).certificate, "it")
    assert server.not_valid_after_utc == NOW + timedelta(days=AUTHORITY_DAYS)
    with pytest.raises(ProvisionError, match="authority expired"):
        make_server(authority, ["a.example"], NOW + timedelta(days=AUTHORITY_DAYS))


def test_private_keys_are_their_owners_alone(home: Home) -> None:
    old = os.umask(0)
    try:
        fresh = create_home(home.folder.with_name("open"), HOSTS, 8000, NOW)
    finally:
        os.umask(old)
    for path in [fresh.folder, *fresh.folder.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_dir():
            assert mode == 0o700, path
        elif b"PRIVATE KEY" in path.read_bytes():
            assert mode == 0o600, path
    private = [p.name for p in fresh.folder.rglob("*") if p.is_file() and p.suffix != ".db"]
    assert sorted(private).count("signing_key.pem") == 3
    assert {"ca.key", "server.key"} <= set(private)


def test_keys_of_three_purposes_are_three_keys(home: Home) -> None:
    texts = {home.public_key(purpose) for purpose in ("", "plans", "artifacts")}
    assert len(texts) == 3
    for folder in (home.keys, home.keys / "plans", home.keys / "artifacts"):
        key = read_private_key(folder / "signing_key.pem").public_key()
        assert key == read_public_key(folder / "signing_key.pub.pem")


def test_a_server_is_never_overwritten(home: Home) -> None:
    before = {p: p.read_bytes() for p in home.folder.rglob("*") if p.is_file()}
    with pytest.raises(ProvisionError, match="nothing was overwritten"):
        create_home(home.folder, HOSTS, 8000, NOW)
    assert {p: p.read_bytes() for p in home.folder.rglob("*") if p.is_file()} == before


def test_a_server_is_made_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("reticent.server.home.server_unit", full)
    with pytest.raises(ProvisionError, match="No space left"):
        create_home(tmp_path / "server", HOSTS, 8000, NOW)
    assert list(tmp_path.iterdir()) == []


def test_a_server_is_opened_as_it_was_made(home: Home) -> None:
    assert open_home(home.folder) == home
    assert home.address == "server.example:8443"
    connection = tomllib.loads((home.flower / "config.toml").read_text())["superlink"]
    assert connection["reticent"]["address"] == "127.0.0.1:8443"
    assert Path(connection["reticent"]["root-certificates"]) == home.tls / "ca.crt"
    given = arguments(home)
    assert "--enable-supernode-auth" in given and "--insecure" not in given
    assert given[given.index("--host") + 1] == "0.0.0.0"


def test_a_server_for_this_machine_alone_listens_on_no_other_interface(tmp_path: Path) -> None:
    for number, hosts in enumerate((["localhost"], ["127.0.0.1", "::1"])):
        assert create_home(tmp_path / str(number), hosts, 1, NOW).listens_on == "127.0.0.1"
    assert create_home(tmp_path / "2", ["::1"], 8000, NOW).address == "[::1]:8000"
    assert create_home(tmp_path / "3", ["localhost", "a.example"], 1, NOW).listens_on == "0.0.0.0"


@pytest.mark.parametrize(
    ("host", "listens", "inward"),
    [
        ("::1", "::1", "::1"),
        ("2001:db8::1", "::", "::1"),
        ("127.0.0.2", "127.0.0.2", "127.0.0.2"),
        ("192.0.2.7", "0.0.0.0", "127.0.0.1"),
        ("a.example", "0.0.0.0", "127.0.0.1"),
    ],
)
def test_a_superlink_is_reached_where_devices_and_commands_look_for_it(
    tmp_path: Path, host: str, listens: str, inward: str
) -> None:
    home = create_home(tmp_path / "server", [host], 8443, NOW)
    given = arguments(home)
    assert given[given.index("--host") + 1] == listens
    connection = tomllib.loads((home.flower / "config.toml").read_text())["superlink"]
    where = f"[{inward}]:8443" if ":" in inward else f"{inward}:8443"
    assert connection["reticent"]["address"] == where
    if ":" in inward and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    with tls_server(home) as port:
        assert answers(Home(home.folder, home.hosts, port))


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@contextmanager
def tls_server(home: Home) -> Iterator[int]:
    """Listen with the server's certificate, as its SuperLink does, on a free port."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(home.tls / "server.crt", home.tls / "server.key")
    family = socket.AF_INET6 if ":" in home.listens_on else socket.AF_INET
    with socket.create_server((home.listens_on, 0), family=family) as listener:
        greeting = Thread(target=lambda: greet(context, listener))
        greeting.start()
        yield listener.getsockname()[1]
        greeting.join(10)


def greet(context: ssl.SSLContext, listener: socket.socket) -> None:
    raw, _ = listener.accept()
    with suppress(ssl.SSLError), context.wrap_socket(raw, server_side=True):
        pass


def test_a_server_that_an_earlier_version_made_for_other_addresses_is_mended_by_rotation(
    tmp_path: Path,
) -> None:
    home = create_home(tmp_path / "server", ["192.0.2.7"], 8443, NOW)
    config = home.flower / "config.toml"
    authority = Issued((home.tls / "ca.crt").read_bytes(), (home.tls / "ca.key").read_bytes())
    made, connection = make_server(authority, ["192.0.2.7"], utc_now()), config.read_text()
    (home.tls / "server.key").write_bytes(made.key)
    (home.tls / "server.crt").write_bytes(made.certificate)
    config.write_text(connection.replace("127.0.0.1", "192.0.2.7"))
    with (
        tls_server(home) as port,
        pytest.raises(ProvisionError, match=r"name 127\.0\.0\.1.* rotate"),
    ):
        answers(Home(home.folder, home.hosts, port))
    rotate_certificate(home, utc_now())
    assert config.read_text() == connection and stat.S_IMODE(config.stat().st_mode) == 0o600
    with tls_server(home) as port:
        assert answers(Home(home.folder, home.hosts, port))


def test_a_stranger_on_the_port_is_not_the_superlink(home: Home, tmp_path: Path) -> None:
    other = create_home(tmp_path / "other", ["192.0.2.7"], 8443, utc_now())
    with tls_server(other) as port:
        assert not answers(Home(home.folder, ("192.0.2.7",), port))


@pytest.mark.parametrize(
    "text",
    [
        *("", "hosts = []\nport = 1", 'hosts = ["a"]\nport = 0', 'hosts = ["a"]\nport = true', "x"),
        *("hosts = [1, {}]\nport = 1", 'hosts = [""]\nport = 1', 'hosts = ["a", "b c"]\nport = 1'),
    ],
)
def test_damaged_settings_are_an_error(home: Home, text: str) -> None:
    (home.folder / "server.toml").write_text(text)
    with pytest.raises(ProvisionError, match=r"server\.toml"):
        open_home(home.folder)


def test_a_folder_without_a_server_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ProvisionError, match="reticent server init"):
        open_home(tmp_path)


def test_rotation_makes_a_new_key_under_the_same_authority(home: Home) -> None:
    ca, old = (home.tls / "ca.crt").read_bytes(), (home.tls / "server.key").read_bytes()
    later = NOW + timedelta(days=300)
    assert rotate_certificate(home, later) == later + timedelta(days=SERVER_DAYS)
    assert (home.tls / "ca.crt").read_bytes() == ca
    assert (home.tls / "server.key").read_bytes() != old
    assert stat.S_IMODE((home.tls / "server.key").stat().st_mode) == 0o600
    loaded(home.tls / "server.crt").verify_directly_issued_by(loaded(home.tls / "ca.crt"))
    ssl.create_default_context().load_cert_chain(home.tls / "server.crt", home.tls / "server.key")


def test_a_key_of_another_authority_signs_no_certificate(home: Home, tmp_path: Path) -> None:
    other = create_home(tmp_path / "other", HOSTS, 8443, NOW)
    before = (home.tls / "server.crt").read_bytes()
    shutil.copy(other.tls / "ca.key", home.tls / "ca.key")
    with pytest.raises(ProvisionError, match=r"ca\.key: is not the key"):
        rotate_certificate(home, NOW)
    assert (home.tls / "server.crt").read_bytes() == before


@pytest.mark.parametrize(
    ("days", "said"),
    [
        (31, None),
        (30, None),
        (29, "expires in 29 days, on 2026-06-30"),
        (0, "expired on 2026-06-01"),
    ],
)
def test_a_warning_comes_thirty_days_ahead(days: int, said: str | None) -> None:
    warning = expiry_warning("it", NOW + timedelta(days=days), NOW, "renew it")
    assert warning == (None if said is None else f"it {said}: renew it")


def test_a_node_key_is_of_the_curve_that_flower_takes() -> None:
    private, public = make_node_key()
    key = serialization.load_ssh_private_key(private.encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp384r1"
    assert serialization.load_ssh_public_key(public.encode()) == key.public_key()
    assert "\n" not in public


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_unit_and_would_not_accept_a_wrong_one(tmp_path: Path) -> None:
    command = tmp_path / "reticent"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    text = server_unit(tmp_path / "a server", command)

    def complaints(text: str) -> str:
        path = tmp_path / "reticent-server.service"
        path.write_text(text)
        done = subprocess.run(
            ["systemd-analyze", "verify", str(path)], capture_output=True, check=False, text=True
        )
        return done.stderr if done.returncode == 0 else done.stderr or "failed"

    assert "reticent-server" not in complaints(text)
    assert "Unknown key" in complaints(text.replace("UMask", "Umaks"))
    assert complaints(text.replace(str(command), str(tmp_path / "absent")))


@pytest.mark.parametrize("unit", [server_unit, device_unit])
def test_the_command_line_takes_what_a_unit_starts(unit: Callable[[Path, Path], str]) -> None:
    folder = Path("/srv/a folder")
    (line,) = (x for x in unit(folder, Path("/opt/reticent")).splitlines() if "ExecStart" in x)
    words = shlex.split(line.removeprefix("ExecStart="))
    assert words.pop(0) == "/opt/reticent"
    command: click.Command | None = cli
    context = click.Context(cli)
    while isinstance(command, click.Group):
        _, command, words = command.resolve_command(context, words)
    assert command is not None
    assert command.make_context("unit", words).params["folder"] == folder


@pytest.mark.parametrize(
    ("name", "who"),
    [("50%", "systemd"), ('a"b', "systemd"), ("a\udcffb", "systemd"), ("a?", "Flower")],
)
def test_a_path_that_a_server_cannot_have_is_refused(tmp_path: Path, name: str, who: str) -> None:
    with pytest.raises(ProvisionError, match=who):
        create_home(tmp_path / name, HOSTS, 8000, NOW)
    assert list(tmp_path.iterdir()) == []
