"""Measurements apart: one process a model, within a device's limits, and numbers that are right."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from reticent.compression.backends import apart
from reticent.compression.backends.apart import Subject, measure_apart
from reticent.compression.backends.float_chain import float_model
from reticent.compression.backends.profiles import NO_LIMITS, PROFILES, Profile, parse_profile
from reticent.compression.convert import calibrate, convert
from reticent.compression.dynamic import dynamic_spec
from reticent.compression.integer import Graph, Grid, LinearRecord
from reticent.core import sequences
from reticent.core.errors import ArtifactError, DataError
from reticent.core.plan import Quantize
from reticent.core.seeds import torch_generator

EXAMPLE = np.zeros((1, 100), np.float32)


def wide(name: str, features: int) -> Subject:
    """Return a float model of 100 inputs and two outputs with 103 weights a feature."""
    grid = Grid(scale=1.0, zero_point=0)
    graph = Graph(
        input=grid,
        layers=(
            LinearRecord(name="a", relu=True, output=grid),
            LinearRecord(name="b", relu=False, output=grid),
        ),
    )
    weights = {
        "a.weight": torch.ones(features, 100),
        "a.bias": torch.ones(features),
        "b.weight": torch.ones(2, features),
    }
    data = safetensors.torch.save(weights)
    files = {"model.json": graph.model_dump_json().encode(), "weights.safetensors": data}
    return Subject(name, "fp32", files)


def in_a_process(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_float_model_is_the_one_that_was_converted() -> None:
    generator = torch_generator(6, "floats")
    x = torch.randn(40, 2, 8, 8, generator=generator)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, bias=False),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(4, 4, 2, padding=1, groups=4),
        nn.ReLU(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 3),
    ).eval()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    graph = convert(model, calibrate(model, x)).graph
    assert torch.equal(float_model(graph, model.state_dict())(x), model(x))


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_the_float_model_of_a_dynamic_graph_is_the_student(kind: str) -> None:
    model = sequences.student(kind, (40,), 36).eval()
    x = torch.arange(80.0).view(2, 40) % 36
    graph = dynamic_spec(model, Quantize(kind="dynamic")).graph
    assert torch.equal(float_model(graph, model.state_dict())(x), model(x))


def test_memory_grows_by_the_weights_of_the_larger_model() -> None:
    subjects = [wide("small", 10), wide("large", 50_000)]
    small, large = measure_apart(subjects, EXAMPLE, 10, NO_LIMITS)
    grown = (large.memory_bytes or 0) - (small.memory_bytes or 0)
    weights = 4 * 103 * 50_000
    assert 0.95 * weights < grown < 2.5 * weights
    for measured in (small, large):
        assert not measured.misfit and measured.latency is not None
        assert 0 < measured.latency.median_us <= measured.latency.p95_us
        assert (measured.process_bytes or 0) > (measured.memory_bytes or 0) > 0


def test_a_model_that_does_not_fit_is_reported_and_the_rest_is_measured() -> None:
    subjects = [wide("large", 400_000), wide("small", 10)]
    large, small = measure_apart(subjects, EXAMPLE, 10, PROFILES["gateway"])
    assert large.misfit and large.latency is None and large.memory_bytes is None
    assert not small.misfit and small.latency is not None


def test_what_fails_without_limits_is_an_error_that_names_the_model() -> None:
    graph = wide("any", 3).files["model.json"]
    broken = Subject("broken", "qnnpack", {"model.json": graph, "model.safetensors": b"x"})
    with pytest.raises(ArtifactError, match=r"broken: cannot be measured: ArtifactError: model\."):
        measure_apart([broken], EXAMPLE, 10, NO_LIMITS)


def test_what_fails_for_another_reason_than_memory_is_an_error_within_a_profile_too() -> None:
    graph = wide("any", 3).files["model.json"]
    broken = Subject("broken", "qnnpack", {"model.json": graph, "model.safetensors": b"x"})
    with pytest.raises(ArtifactError, match=r"broken: cannot be measured: ArtifactError: model\."):
        measure_apart([broken, wide("small", 10)], EXAMPLE, 10, PROFILES["pi4"])


def test_a_process_that_hangs_without_memory_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "_PATIENCE", 0.1)
    (slow,) = measure_apart([wide("slow", 10)], EXAMPLE, 10, PROFILES["pi4"])
    assert slow.misfit == "the process ended with status -9: it said nothing"
    (unlimited,) = measure_apart([wide("slow", 10)], EXAMPLE, 10, NO_LIMITS)
    assert not unlimited.misfit


def test_limits_that_cannot_be_set_are_not_taken_for_a_large_model() -> None:
    code = (
        "import resource, sys\n"
        "sys.path.insert(0, 'tests')\n"
        "from test_backends_bench import *\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (3 * 10**9, 3 * 10**9))\n"
        "try: measure_apart([wide('small', 10)], EXAMPLE, 10, parse_profile('memory=4GB'))\n"
        "except ArtifactError as error: print(error)\n"
    )
    said = in_a_process(code)
    assert said.startswith("small: profile memory=4GB cannot be imposed on a process: ValueError")


def test_limits_hold_in_the_process() -> None:
    code = (
        "import os, resource\n"
        "from reticent.compression.backends.worker import _limit\n"
        "_limit(300_000_000, 1)\n"
        "print(len(os.sched_getaffinity(0)), *resource.getrlimit(resource.RLIMIT_DATA))\n"
        "try: bytearray(400_000_000)\n"
        "except MemoryError: print('refused')\n"
        "print(len(bytearray(100_000_000)))\n"
    )
    assert in_a_process(code).split() == ["1", "300000000", "300000000", "refused", "100000000"]


def test_more_cores_than_there_are_means_all() -> None:
    code = (
        "import os\nfrom reticent.compression.backends.worker import _limit\n"
        "_limit(None, 10_000)\nprint(len(os.sched_getaffinity(0)))\n"
    )
    assert int(in_a_process(code)) == len(os.sched_getaffinity(0))


def test_an_onnx_model_is_run_without_torch() -> None:
    pytest.importorskip("onnxruntime")
    code = (
        "import sys, reticent.compression.backends.worker\n"
        "import reticent.compression.backends.onnx_session\n"
        "print('torch' in sys.modules, 'onnx' in sys.modules)\n"
    )
    assert in_a_process(code).split() == ["False", "False"]


@given(
    st.integers(1, 10**6),
    st.sampled_from([("kB", 10**3), ("MB", 10**6), ("GB", 10**9), ("MiB", 2**20)]),
    st.integers(1, 64),
)
def test_limits_are_read(amount: int, unit: tuple[str, int], cpus: int) -> None:
    text = f"cpus={cpus},memory={amount}{unit[0]}"
    assert parse_profile(text) == Profile(text, amount * unit[1], cpus)


def test_profiles_have_names() -> None:
    assert all(parse_profile(name) == profile for name, profile in PROFILES.items())
    assert parse_profile("cpus=2").memory_bytes is None
    assert parse_profile("memory=1GB").cpus is None


@pytest.mark.parametrize(
    "text",
    [
        *("", "pi5", "memory", "memory=", "memory=1", "memory=0MB", "memory=1.5GB", "memory=1mb"),
        *("memory=99999999999999GB", "memory=1048577GiB", f"memory={'9' * 5000}kB"),
        *(
            f"cpus={'9' * 5000}",
            "cpus=0",
            "cpus=-1",
            "cpus=²",
            "cpus=1,cpus=2",
            "memory=1GB,",
            "disk=1GB",
        ),
    ],
)
def test_other_texts_are_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(DataError, match=r"gateway.*memory=256MB,cpus=1") as caught:
        parse_profile(text)
    assert f'"{text}"' in str(caught.value)
