"""The artifact: written whole, verified before it is read, and the same model afterwards."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reticent.compression.artifact import SelfTest, load_artifact, verify_artifact, write_artifact
from reticent.compression.convert import calibrate, convert
from reticent.compression.integer import IntegerSpec, build
from reticent.compression.manifest import TaskInfo, files_of
from reticent.core.errors import ArtifactError, DataError
from reticent.core.seeds import torch_generator
from reticent.core.signing import make_signing_key, read_private_key, read_public_key

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key()
TASK = TaskInfo(name="blobs", classes=3, input_shape=(1, 6, 6), preprocessing="none")
FILES = files_of("qnnpack")
ALL_FILES = sorted([*FILES, "manifest.json", "manifest.sig"])


def make_spec() -> tuple[IntegerSpec, torch.Tensor]:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )
    generator = torch_generator(11, "artifact")
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    x = torch.randn(40, 1, 6, 6, generator=generator)
    return convert(model, calibrate(model, x)), x


SPEC, X = make_spec()
LOGITS = build(SPEC)(X)


def write(folder: Path, **changes: Any) -> Path:
    options: dict[str, Any] = {
        "task": TASK,
        "plan_digest": "ab" * 32,
        "metrics": {"accuracy": 0.75},
        "privacy": {"epsilon": 8.0, "delta": 1e-5},
        "sizes": {"fp32": 1234},
        "self_test": SelfTest(X[:4], LOGITS[:4]),
        "private_key": KEY,
    }
    return write_artifact(folder, SPEC, **(options | changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("artifact") / "model")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def resigned(folder: Path, change: Mapping[str, Any]) -> None:
    """Change the manifest and sign it again: what only the holder of the key could do."""
    data = json.loads((folder / "manifest.json").read_text()) | change
    text = json.dumps(data).encode()
    (folder / "manifest.json").write_bytes(text)
    (folder / "manifest.sig").write_bytes(KEY.sign(text))


def test_the_loaded_model_is_the_written_one(whole: Path) -> None:
    artifact = load_artifact(whole, PUBLIC)
    assert torch.equal(artifact.predict(X), LOGITS)
    last = X.contiguous(memory_format=torch.channels_last)
    assert torch.equal(artifact.predict(last), LOGITS)
    assert artifact.graph == SPEC.graph
    assert artifact.manifest == verify_artifact(whole, PUBLIC)
    assert artifact.manifest.task == TASK and artifact.manifest.metrics == {"accuracy": 0.75}


def test_the_folder_holds_exactly_what_the_manifest_says(whole: Path) -> None:
    files = contents(whole)
    assert sorted(files) == ALL_FILES
    manifest = json.loads(files["manifest.json"])
    assert {n: e["bytes"] for n, e in manifest["files"].items()} == {
        n: len(files[n]) for n in FILES
    }
    assert b"blobs" in files["MODEL_CARD.md"] and b"8.0" in files["MODEL_CARD.md"]
    assert manifest["created_by"].startswith("reticent")


def test_writing_twice_gives_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    assert contents(write(tmp_path / "again")) == contents(whole)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(ALL_FILES), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_one_changed_byte_anywhere_is_found(whole: Path, name: str, at: float, flip: int) -> None:
    path = whole / name
    original = path.read_bytes()
    changed = bytearray(original)
    changed[int(at * len(original))] ^= flip
    try:
        path.write_bytes(bytes(changed))
        with pytest.raises(ArtifactError):
            verify_artifact(whole, PUBLIC)
        with pytest.raises(ArtifactError):
            load_artifact(whole, PUBLIC)
    finally:
        path.write_bytes(original)
    verify_artifact(whole, PUBLIC)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.mark.parametrize("name", ALL_FILES)
def test_missing_truncated_longer_and_linked_files_are_found(copy: Path, name: str) -> None:
    path = copy / name
    data = path.read_bytes()
    for changed in (data[:-1], data + b"\0", b""):
        path.write_bytes(changed)
        with pytest.raises(ArtifactError, match=r"\S"):
            load_artifact(copy, PUBLIC)
    path.unlink()
    with pytest.raises(ArtifactError, match=name):
        load_artifact(copy, PUBLIC)
    outside = copy.parent / "outside"
    outside.write_bytes(data)
    path.symlink_to(outside)
    with pytest.raises(ArtifactError, match="plain file"):
        load_artifact(copy, PUBLIC)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ArtifactError, match="plain file"):
        load_artifact(copy, PUBLIC)


def test_extra_files_are_found(copy: Path) -> None:
    (copy / "model.pkl").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"model\.pkl: is not part"):
        verify_artifact(copy, PUBLIC)


def test_another_key_is_refused(whole: Path) -> None:
    with pytest.raises(ArtifactError, match="signature"):
        verify_artifact(whole, Ed25519PrivateKey.generate().public_key())


def test_nothing_is_parsed_before_the_signature_fits(copy: Path) -> None:
    (copy / "manifest.json").write_bytes(b"not json")
    with pytest.raises(ArtifactError, match="signature"):
        verify_artifact(copy, PUBLIC)


def test_no_file_is_opened_before_its_digest_fits(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"\xff" * (copy / "model.safetensors").stat().st_size)
    with pytest.raises(ArtifactError, match="not the file that was signed"):
        load_artifact(copy, PUBLIC)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/file", "manifest.json"])
def test_paths_that_lead_elsewhere_are_refused_even_when_signed(copy: Path, name: str) -> None:
    files = json.loads((copy / "manifest.json").read_text())["files"]
    resigned(copy, {"files": files | {name: files["model.json"]}})
    with pytest.raises(ArtifactError, match="must list"):
        verify_artifact(copy, PUBLIC)


@pytest.mark.parametrize(
    "change", [{"format_version": 3}, {"unknown": 1}, {"plan_digest": "zz"}, {"files": {}}]
)
def test_a_signed_manifest_must_still_be_valid(copy: Path, change: dict[str, Any]) -> None:
    resigned(copy, change)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        verify_artifact(copy, PUBLIC)


def test_files_above_the_cap_are_refused_by_the_manifest(copy: Path) -> None:
    files = json.loads((copy / "manifest.json").read_text())["files"]
    files["model.json"]["bytes"] = 2**40
    resigned(copy, {"files": files})
    with pytest.raises(ArtifactError, match=r"files\.model\.json\.bytes"):
        verify_artifact(copy, PUBLIC)


def test_the_self_test_refuses_other_logits(tmp_path: Path) -> None:
    for wrong in (LOGITS[4:8], LOGITS[:4, :2], LOGITS[:4] * math.nan):
        with pytest.raises(ArtifactError, match="self test"):
            write(tmp_path / "bad", self_test=SelfTest(X[:4], wrong))
    assert not list(tmp_path.iterdir())


def test_the_self_test_runs_on_load(copy: Path) -> None:
    manifest = verify_artifact(copy, PUBLIC)
    other = write(copy.parent / "other", self_test=SelfTest(X[4:8], LOGITS[4:8]))
    # A whole artifact, rightly signed, whose stored logits belong to other inputs.
    data = safetensors.torch.save({"inputs": X[:4], "logits": LOGITS[4:8].contiguous()})
    (other / "self_test.safetensors").write_bytes(data)
    files = {n: e.model_dump() for n, e in manifest.files.items()}
    digest = hashlib.sha256(data).hexdigest()
    files["self_test.safetensors"] = {"bytes": len(data), "sha256": digest}
    resigned(other, {"files": files})
    verify_artifact(other, PUBLIC)
    with pytest.raises(ArtifactError, match="self test: logits differ"):
        load_artifact(other, PUBLIC)


@pytest.mark.parametrize("privacy", ["off", {"epsilon": math.inf}, {"epsilon": "infinity"}])
def test_no_privacy_is_spelled_out(tmp_path: Path, privacy: Any) -> None:
    folder = write(tmp_path / "off", privacy=privacy)
    assert verify_artifact(folder, PUBLIC).privacy["epsilon"] == "infinity"
    card = (folder / "MODEL_CARD.md").read_text()
    assert "ε = infinity" in card and "with differential privacy" not in card


@pytest.mark.parametrize(
    "change",
    [
        {"privacy": {}},
        {"privacy": {"epsilon": 1.0}},
        {"privacy": {"epsilon": math.nan, "delta": 1e-5}},
        {"privacy": {"epsilon": -1.0, "delta": 1e-5}},
        {"metrics": {"accuracy": math.nan}},
        {"sizes": {"fp32": object()}},
        {"plan_digest": "short"},
    ],
)
def test_an_incomplete_account_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=next(iter(change))):
        write(tmp_path / "bad", **change)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused_unless_an_artifact_is_replaced(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    with pytest.raises(ArtifactError, match="already exists"):
        write(folder)
    write(folder, replace=True, metrics={"accuracy": 0.5})
    assert load_artifact(folder, PUBLIC).manifest.metrics == {"accuracy": 0.5}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_is_not_an_artifact_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    with pytest.raises(ArtifactError, match="is not an artifact"):
        write(tmp_path / "home", replace=True)
    assert (tmp_path / "home" / "letter").read_text() == "dear"


@pytest.mark.parametrize("manifest", ['{"name": "my web extension"}', "not JSON", "", None])
def test_a_folder_with_somebody_elses_manifest_is_not_replaced(
    tmp_path: Path, manifest: str | None
) -> None:
    folder = tmp_path / "extension"
    (folder / ".git").mkdir(parents=True)
    (folder / "thesis.tex").write_text("precious")
    if manifest is None:
        os.mkfifo(folder / "manifest.json")
    else:
        (folder / "manifest.json").write_text(manifest)
    with pytest.raises(ArtifactError, match="is not an artifact, so it is not replaced"):
        write(folder, replace=True)
    assert (folder / "thesis.tex").read_text() == "precious" and (folder / ".git").is_dir()


@pytest.mark.parametrize("kind", ["file", "folder", "link", "folder with an artifact's name"])
def test_an_artifact_with_anything_else_in_its_folder_is_not_replaced(
    copy: Path, kind: str
) -> None:
    path = copy / ("MODEL_CARD.md" if kind.endswith("name") else "notes")
    if kind.endswith("name"):
        path.unlink()
    if kind == "file":
        path.write_text("precious")
    elif kind == "link":
        path.symlink_to(copy / "model.json")
    else:
        path.mkdir()
    with pytest.raises(ArtifactError, match=f"holds {path.name}, which is not part of an artifact"):
        write(copy, replace=True)
    assert path.exists()


def test_an_artifact_that_lacks_a_file_may_be_replaced(copy: Path) -> None:
    (copy / "model.json").unlink()
    write(copy, replace=True)
    assert load_artifact(copy, PUBLIC)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="cannot be written"):
        write(tmp_path / "file" / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("x", [X[:, :, :5], X[0], X.double(), X[:0], X * math.nan])
def test_predict_refuses_what_it_was_not_made_for(whole: Path, x: torch.Tensor) -> None:
    with pytest.raises(DataError):
        load_artifact(whole, PUBLIC).predict(x)


def test_a_missing_folder_is_an_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        verify_artifact(tmp_path / "nowhere", PUBLIC)


def test_keys_round_trip_are_private_and_never_overwritten(tmp_path: Path, whole: Path) -> None:
    key = make_signing_key(tmp_path / "keys")
    private, public = tmp_path / "keys/signing_key.pem", tmp_path / "keys/signing_key.pub.pem"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    raw = key.private_bytes_raw()
    assert read_private_key(private).private_bytes_raw() == raw
    folder = write(tmp_path / "model", private_key=read_private_key(private))
    assert load_artifact(folder, read_public_key(public)).manifest.task == TASK
    with pytest.raises(ArtifactError, match="already there"):
        make_signing_key(tmp_path / "keys")
    assert read_private_key(private).private_bytes_raw() == raw
    private.unlink()  # a new one would not fit the public key that people hold
    with pytest.raises(ArtifactError, match=r"signing_key.pub.pem: a key is already there"):
        make_signing_key(tmp_path / "keys")
    assert not private.exists()


def test_other_keys_are_refused(tmp_path: Path) -> None:
    other = X25519PrivateKey.generate()
    pem = serialization.Encoding.PEM
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "x.pub").write_bytes(other.public_key().public_bytes(pem, info))
    pkcs8, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (tmp_path / "x.pem").write_bytes(other.private_bytes(pem, pkcs8, plain))
    (tmp_path / "junk").write_bytes(b"junk")
    for name in ("x.pub", "junk", "absent"):
        with pytest.raises(ArtifactError):
            read_public_key(tmp_path / name)
    for name in ("x.pem", "junk", "absent"):
        with pytest.raises(ArtifactError):
            read_private_key(tmp_path / name)
