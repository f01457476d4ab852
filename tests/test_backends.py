"""Every backend: the spec's own integers, the fake-quantized student's answers, clear refusals."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from engines import has_vnni
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reticent.compression.artifact import SelfTest, load_artifact, verify_artifact, write_artifact
from reticent.compression.backends import BACKEND_NAMES, BackendName
from reticent.compression.backends.base import Deployed, deploy, installed, load
from reticent.compression.backends.frames import framed, unframed
from reticent.compression.backends.registry import BACKENDS
from reticent.compression.convert import calibrate, compare, convert, fake_quantized_model
from reticent.compression.integer import Graph, Grid, IntegerSpec
from reticent.compression.manifest import TaskInfo
from reticent.core.errors import ArtifactError, DataError, DependencyError
from reticent.core.seeds import torch_generator

Pair = tuple[int, int]
SHAPE = (2, 9, 9)
KINDS = ("folded", "group", "linear")
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def architecture(kind: str) -> nn.Sequential:
    if kind == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(162, 20), nn.ReLU(), nn.Linear(20, 5))
    norm = [nn.GroupNorm(2, 8)] if kind == "group" else []
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, stride=2, padding=1),
        *norm,
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8),  # not followed by a ReLU
        nn.MaxPool2d(2, 1),
        nn.ReLU(),  # not merged into a layer
        nn.Flatten(),
        nn.Linear(32, 5),
    )


def images(count: int, purpose: str) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch_generator(4, purpose))


@cache
def converted(kind: str) -> tuple[nn.Sequential, IntegerSpec]:
    """Return the fake-quantized student and the int8 model of random weights."""
    model = architecture(kind).eval()
    generator = torch_generator(5, kind)
    for p in model.parameters():
        fan = p[0].numel() if p.dim() > 1 else 10
        p.data = torch.randn(p.shape, generator=generator) / fan**0.5
    ranges = calibrate(model, images(200, "public"))
    return fake_quantized_model(model, ranges), convert(model, ranges)


@cache
def deployed(kind: str, name: BackendName) -> Deployed:
    if not installed(BACKENDS[name]):
        pytest.skip(f"{name} is not installed")
    if name == "x86" and not has_vnni:
        pytest.skip("this processor lacks AVX512-VNNI: weights of 8 bits are refused")
    return deploy(converted(kind)[1], BACKENDS[name], SHAPE)


def last_step(spec: IntegerSpec) -> float:
    return spec.graph.layers[-1].output.scale  # type: ignore[union-attr]


def test_every_name_has_its_backend() -> None:
    assert tuple(BACKENDS) == BACKEND_NAMES
    assert all(name == backend.name for name, backend in BACKENDS.items())
    # The engines of torch read the same file; every other backend has a form of its own.
    assert len({backend.model_file for backend in BACKENDS.values()}) == len(BACKENDS) - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_a_backend_answers_as_the_fake_quantized_student(kind: str, name: BackendName) -> None:
    simulated, spec = converted(kind)
    found = compare(simulated, deployed(kind, name).model, images(600, "test"))
    # A step of the last grid, now and then two, where a value lay between two integers.
    assert found.max_difference <= 2.01 * last_step(spec)
    assert found.argmax >= 0.98


@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_another_model_is_told_apart(name: BackendName) -> None:
    spec = converted("folded")[1]
    arrays = {k: v.clone() for k, v in spec.arrays.items()}
    arrays["7.weight"] = arrays["7.weight"].flip(1)
    deployed("folded", name)  # skips if it is not installed
    simulated = converted("folded")[0]
    other = deploy(IntegerSpec(spec.graph, arrays), BACKENDS[name], SHAPE)
    found = compare(simulated, other.model, images(600, "test"))
    assert found.max_difference > 5 * last_step(spec)
    assert found.argmax < 0.9


@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_any_memory_format_and_batch_gives_the_same_logits(name: BackendName) -> None:
    model, x = deployed("folded", name).model, images(7, "test")
    whole = model(x)
    assert whole.shape == (7, 5) and whole.dtype == torch.float32
    assert torch.equal(whole, model(x.contiguous(memory_format=torch.channels_last)))
    assert torch.equal(whole, torch.cat([model(row) for row in x.split(1)]))


@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_wrong_inputs_are_refused(name: BackendName) -> None:
    model = deployed("folded", name).model
    for wrong in (images(2, "test").double(), images(2, "test")[:0]):
        with pytest.raises(DataError, match="must be float32"):
            model(wrong)
    with pytest.raises((ArtifactError, DataError)):
        model(images(1, "test")[:, :1])


@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_bytes_that_are_no_model_are_refused(name: BackendName) -> None:
    made = deployed("folded", name)
    for wrong in (b"", b"junk" * 99):
        with pytest.raises(ArtifactError, match=r"model\.[a-z]+"):
            load(made.backend, made.graph, wrong)


@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_writing_again_gives_the_same_bytes(name: BackendName) -> None:
    made = deployed("folded", name)
    assert made.backend.write(converted("folded")[1], SHAPE) == made.data


@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_an_artifact_of_each_backend_is_verified_and_runs(
    name: BackendName, tmp_path: Path
) -> None:
    made, x = deployed("folded", name), images(4, "test")
    folder = write_artifact(
        tmp_path / "model",
        converted("folded")[1],
        task=TaskInfo(name="noise", classes=5, input_shape=SHAPE, preprocessing="none"),
        plan_digest="ab" * 32,
        metrics={},
        privacy="off",
        sizes={},
        self_test=SelfTest(x, made.model(x)),
        private_key=KEY,
        deployed=made,
    )
    artifact = load_artifact(folder, KEY.public_key())
    assert artifact.manifest.backend == name
    assert artifact.data == made.data
    assert (folder / made.backend.model_file).read_bytes() == made.data
    assert torch.equal(artifact.predict(x), made.model(x))
    assert made.backend.runs_on in (folder / "MODEL_CARD.md").read_text()
    (folder / made.backend.model_file).write_bytes(made.data[:-1] + b"\x01\x02")
    with pytest.raises(ArtifactError, match=r"model\.[a-z]+"):
        verify_artifact(folder, KEY.public_key())


@pytest.mark.parametrize("name", [n for n in BACKEND_NAMES if n not in ("qnnpack", "x86")])
def test_a_backend_that_is_not_installed_says_what_to_install(
    name: BackendName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert not installed(BACKENDS[name])
    with pytest.raises(DependencyError, match=rf"pip install 'reticent\[{name}\]'"):
        deploy(converted("linear")[1], BACKENDS[name], SHAPE)
    with pytest.raises(DependencyError, match="needs the Python packages"):
        load(BACKENDS[name], converted("linear")[1].graph, b"")


@pytest.mark.parametrize("name", [n for n in BACKEND_NAMES if n not in ("qnnpack", "x86")])
def test_a_layer_that_a_backend_lacks_is_named(name: BackendName) -> None:
    deployed("linear", name)
    strange: Any = type("UpsampleRecord", (), {"name": "up1", "kind": "upsample"})()
    graph = Graph.model_construct(input=Grid(scale=0.1, zero_point=0), layers=(strange,))
    with pytest.raises(ArtifactError, match=rf"layer up1 \(upsample\): the backend {name}"):
        deploy(IntegerSpec(graph, {}), BACKENDS[name], SHAPE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_onnx_file_holds_the_specs_integers_and_steps(kind: str) -> None:
    onnx = pytest.importorskip("onnx")
    spec = converted(kind)[1]
    model = onnx.load_from_string(unframed(deployed(kind, "onnx").data, "model.onnx.zst"))
    onnx.checker.check_model(model, full_check=True)
    held = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for name, array in spec.arrays.items():
        layer, part = name.split(".")
        if f"{layer}.scale" not in spec.arrays:  # a GroupNorm
            np.testing.assert_array_equal(held[name], array.numpy())
        elif part == "scale":
            np.testing.assert_array_equal(held[f"{layer}.weight.scale"], array.numpy())
        elif part == "weight":
            assert held[f"{name}.integers"].dtype == np.int8
            np.testing.assert_array_equal(held[f"{name}.integers"], array.numpy())
        else:
            steps = held[f"{layer}.bias.scale"]
            assert np.all(np.abs(held[f"{name}.integers"] * steps - array.numpy()) <= steps)


@pytest.mark.parametrize("kind", KINDS)
def test_the_onnx_reference_evaluator_agrees(kind: str) -> None:
    reference = pytest.importorskip("onnx.reference")
    simulated, spec = converted(kind)
    x = images(20, "test")
    evaluator = reference.ReferenceEvaluator(
        unframed(deployed(kind, "onnx").data, "model.onnx.zst")
    )
    (logits,) = evaluator.run(None, {"input": x.numpy()})
    difference = np.abs(logits - simulated(x).detach().numpy())
    assert difference.max() <= 2.01 * last_step(spec)
    assert (difference > 0.01 * last_step(spec)).mean() < 0.1


@settings(max_examples=25, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.sampled_from([1, 2]),
    relu=st.booleans(),
    pool=st.booleans(),
)
def test_any_convolution_means_the_same_in_onnx(
    kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, groups: int, relu: bool, pool: bool
) -> None:
    if not installed(BACKENDS["onnx"]):
        pytest.skip("onnx is not installed")
    conv = nn.Conv2d(2, 4, kernel, stride, padding, dilation, groups)
    rest = ([nn.ReLU()] if relu else []) + ([nn.MaxPool2d((2, 1), (1, 2))] if pool else [])
    model = nn.Sequential(conv, *rest).eval()
    generator = torch_generator(7, "any")
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    x = images(30, "any")
    ranges = calibrate(model, x)
    spec = convert(model, ranges)
    found = deploy(spec, BACKENDS["onnx"], SHAPE).model(x)
    simulated = fake_quantized_model(model, ranges)(x)
    step = spec.graph.layers[0].output.scale  # type: ignore[union-attr]
    assert found.shape == simulated.shape
    difference = (found - simulated).abs()
    # Within a layer a value goes to a neighbouring integer, and rarely.
    assert difference.max() <= 1.01 * step
    assert (difference > 0.5 * step).double().mean() < 0.02


def test_a_bias_beyond_int32_is_refused() -> None:
    pytest.importorskip("onnx")
    spec = converted("linear")[1]
    arrays = dict(spec.arrays) | {"1.bias": torch.full((20,), 1e9)}
    with pytest.raises(ArtifactError, match="layer 1: a bias is more than"):
        BACKENDS["onnx"].write(IntegerSpec(spec.graph, arrays), SHAPE)


def test_frames_are_undone_and_anything_else_is_refused() -> None:
    plain = bytes(1000) + bytes(range(256))
    frame = framed(plain)
    assert unframed(frame, "f") == plain and framed(plain) == frame and len(frame) < 400
    declares_too_much = b"\x28\xb5\x2f\xfd\xe0" + (2**40).to_bytes(8, "little")
    for bad in (
        b"",
        plain,
        frame[:-1],
        frame + b"x",
        frame[:-9] + b"12345678\xff",
        declares_too_much,
    ):
        with pytest.raises(ArtifactError, match=r"model\.x\.zst: .*frame"):
            unframed(bad, "model.x.zst")


@pytest.mark.parametrize("name", ["onnx", "xnnpack"])
def test_few_bits_make_the_stored_file_smaller(name: BackendName) -> None:
    deployed("linear", name)  # skips if it is not installed
    spec, backend = converted("linear")[1], BACKENDS[name]
    coarse = {
        key: (array // 32 * 32 if array.dtype == torch.int8 else array)
        for key, array in spec.arrays.items()
    }
    smaller = backend.write(IntegerSpec(spec.graph, coarse), SHAPE)
    assert len(smaller) < 0.75 * len(backend.write(spec, SHAPE))
