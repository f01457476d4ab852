from __future__ import annotations

import json
import logging
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from reticent.core.bundle import (
    MOST_BYTES,
    Bundle,
    is_signed_plan,
    is_signed_policy,
    read_bundle,
    sign_plan,
    sign_policy,
    write_bundle,
)
from reticent.core.errors import ProvisionError

BUNDLE = Bundle(
    name="pi-1",
    index=0,
    address="server.example:8000",
    created="2026-01-01T00:00:00+00:00",
    expires="2027-01-01T00:00:00+00:00",
    ca_certificate="ca",
    node_key="SECRET",
    node_public="public",
    policy='budget-epsilon = 1.0 # "ε"\n',
    policy_signature="00",
    countersign_key="a",
    plan_key="b",
    artifact_key="c",
)


def altered(**changes: Any) -> bytes:
    return json.dumps({**json.loads(BUNDLE.encode()), **changes}).encode()


def test_a_bundle_is_read_as_it_was_written_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "pi-1.bundle"
    write_bundle(path, BUNDLE)
    assert read_bundle(path) == BUNDLE
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["pi-1.bundle"]


def test_a_bundle_never_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / "pi-1.bundle"
    path.write_text("mine")
    with pytest.raises(ProvisionError, match="already there"):
        write_bundle(path, BUNDLE)
    assert path.read_text() == "mine"


def test_what_a_crash_left_does_not_stand_in_the_way(tmp_path: Path) -> None:
    (tmp_path / ".pi-1.bundle.tmp").write_text("half")
    write_bundle(tmp_path / "pi-1.bundle", BUNDLE)
    assert read_bundle(tmp_path / "pi-1.bundle") == BUNDLE


@pytest.mark.parametrize("key", [f.name for f in fields(Bundle)])
def test_a_change_of_any_field_is_found(key: str) -> None:
    new = {"index": 1, "name": "pi-2", "created": BUNDLE.expires, "expires": BUNDLE.created}
    with pytest.raises(ProvisionError, match="altered or damaged"):
        Bundle.decode(altered(**{key: new.get(key, "other")}))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not JSON"),
        (b"[]", "is not a reticent-bundle"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b" " * (MOST_BYTES + 1), "at most"),
        (altered(format="other"), "is not a reticent-bundle"),
        (altered(version=2), "version 2: must be 1"),
        (altered(version=True), "version True"),
        (altered(extra=1), "unknown: extra"),
        (altered(index="0"), "index: must be int"),
        (altered(index=True), "index: must be int"),
        (altered(index=-1), "at least 0"),
        (altered(name="../pi"), "must match"),
        (altered(node_key=None), "node_key: must be str"),
        (altered(policy="\ud800"), "surrogate"),
        (altered(expires="soon"), "ISO 8601"),
        (altered(expires="2027-01-01"), "with its zone"),
    ],
)
def test_what_is_no_bundle_is_refused_with_the_reason(data: bytes, said: str) -> None:
    with pytest.raises(ProvisionError, match=said):
        Bundle.decode(data)


@given(st.binary(max_size=300))
def test_no_bytes_crash_the_reader(data: bytes) -> None:
    with pytest.raises(ProvisionError):
        Bundle.decode(data)


@given(
    st.sampled_from([f.name for f in fields(Bundle)]),
    st.recursive(st.none() | st.integers() | st.text(), st.lists),
)
def test_no_value_crashes_the_reader(key: str, value: Any) -> None:
    data = altered(**{key: value})
    if asdict(BUNDLE)[key] != value:
        with pytest.raises(ProvisionError):
            Bundle.decode(data)


def test_a_bundle_in_a_log_shows_no_key(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        logging.getLogger().info("%r %s", BUNDLE, [BUNDLE])
    assert "pi-1" in caplog.text and "SECRET" not in caplog.text


def test_the_checksum_is_of_everything_else() -> None:
    assert BUNDLE.checksum == replace(BUNDLE).checksum
    assert json.loads(BUNDLE.encode())["checksum"] == BUNDLE.checksum


def test_signatures_of_policies_and_plans_are_not_each_others() -> None:
    key, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    policy, plan = sign_policy(key, "x"), sign_plan(key, "x")
    public = key.public_key()
    assert is_signed_policy(public, policy, "x") and is_signed_plan(public, plan, "x")
    assert not is_signed_policy(public, plan, "x") and not is_signed_plan(public, policy, "x")
    assert not is_signed_policy(public, policy, "y")
    assert not is_signed_policy(other.public_key(), policy, "x")
    assert not is_signed_policy(public, "zz", "x") and not is_signed_plan(public, "", "x")
