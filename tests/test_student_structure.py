"""Descriptions of chains: exact inverses, and nothing hostile is built."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from reticent.compression.fold import folded
from reticent.compression.structure import MAX_TEXT, build, describe
from reticent.core.errors import PayloadError, PlanError
from reticent.core.models import STUDENTS, student

SHAPE = (1, 8, 8)


def rich() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, (3, 5), (1, 2), (1, 2), (1, 1), bias=False),
        nn.GroupNorm(2, 8, 1e-3),
        nn.GELU(),
        nn.MaxPool2d(2, stride=1, padding=1, ceil_mode=True),
        nn.Conv2d(8, 4, 3, padding=2, dilation=2, groups=4),
        nn.SiLU(),
        nn.AvgPool2d((2, 1), count_include_pad=False),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d((2, 3)),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Identity(),
        nn.Linear(24, 7, bias=False),
        nn.ReLU(),
        nn.Linear(7, 5),
    )


def same_function(first: nn.Module, second: nn.Module) -> bool:
    second.load_state_dict(first.state_dict())
    inputs = torch.randn(3, *SHAPE)
    return torch.equal(first(inputs), second(inputs))


def test_what_is_built_is_what_was_described() -> None:
    model = rich()
    text = describe(model)
    copy = build(text, SHAPE, 5)
    assert describe(copy) == text
    assert all(not p.any() for p in copy.parameters())
    assert same_function(model, copy)


@pytest.mark.parametrize("kind", STUDENTS)
def test_every_built_in_student_has_a_description(kind: str) -> None:
    model = folded(student(kind, SHAPE, 10).eval())
    assert same_function(model, build(describe(model), SHAPE, 10))


def test_no_random_numbers_are_drawn() -> None:
    text = describe(rich())
    before = torch.random.get_rng_state()
    build(text, SHAPE, 5)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(1),
        nn.Conv2d(1, 1, 1, padding_mode="reflect"),
        nn.Conv2d(1, 1, 1, padding="same"),
        nn.ReLU(inplace=True),
        nn.GELU("tanh"),
        nn.Flatten(0),
        nn.Sequential(nn.ReLU()),
        nn.GroupNorm(1, 1, affine=False),
        nn.AdaptiveAvgPool2d((None, 2)),
        nn.Dropout(0.5),
    ],
)
def test_layers_without_a_description_are_refused_by_name(layer: nn.Module) -> None:
    with pytest.raises(PlanError, match=r"student layer 1 \(" + type(layer).__name__):
        describe(nn.Sequential(nn.ReLU(), layer))


def test_a_model_that_is_no_chain_is_refused() -> None:
    with pytest.raises(PlanError, match=r"only an nn\.Sequential"):
        describe(nn.Linear(1, 1))


def linear(**changes: object) -> str:
    layers = [{"kind": "flatten"}, {"kind": "linear", "inputs": 64, "outputs": 5, "bias": True}]
    layers[1] |= changes
    return json.dumps({"version": 1, "layers": layers})


def conv(**changes: object) -> str:
    layer = {
        "kind": "conv2d",
        "inputs": 1,
        "outputs": 5,
        "kernel": [8, 8],
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
        "groups": 1,
        "bias": False,
    }
    return json.dumps({"version": 1, "layers": [layer | changes, {"kind": "flatten"}]})


def pool(**changes: object) -> str:
    layer = {
        "kind": "max_pool2d",
        "kernel": [3, 3],
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "ceil": False,
    }
    layers = [layer | changes, {"kind": "flatten"}, {"kind": "linear", "inputs": 64, "outputs": 5}]
    layers[2]["bias"] = True
    return json.dumps({"version": 1, "layers": layers})


def test_the_plain_texts_of_these_tests_are_good() -> None:
    build(linear(), SHAPE, 5)
    build(conv(), SHAPE, 5)
    build(pool(), SHAPE, 5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"version":1,"layers":[]}',
        '{"version":2,"layers":[{"kind":"flatten"}]}',
        '{"version":1,"layers":[{"kind":"flatten"}],"more":1}',
        '{"version":1,"layers":[{"kind":"batch_norm","channels":3}]}',
        '{"version":1,"layers":[{"kind":"os.system"}]}',
        '{"version":1,"layers":[{"kind":"group_norm","groups":3,"channels":4,"eps":0.1}]}',
        json.dumps({"version": 1, "layers": [{"kind": "relu"}] * 300}),
        " " * (MAX_TEXT + 1),
        '{"version":1,"layers":[{"kind":"group_norm","groups":1,"channels":1,"eps":0.1}]}',
        pool(padding=[2, 0]),
        pool(kernel=[9, 1]),
        linear(inputs=63),
        linear(outputs=6),
        linear(outputs=0),
        linear(outputs=-5),
        linear(outputs=5.0),
        linear(outputs="5"),
        linear(bias=1),
        linear(inputs=2**20, outputs=2**20),
        linear(inputs=10**30),
        conv(groups=3),
        conv(kernel=[8]),
        conv(kernel=[9, 8]),
        conv(kernel=[2**20, 2**20]),
        conv(outputs=2**14, kernel=[1, 1], padding=[1000, 1000]),
        conv(stride=[0, 1]),
    ],
)
def test_hostile_texts_are_refused(text: str) -> None:
    with pytest.raises(PayloadError, match="structure"):
        build(text, SHAPE, 5)


def test_logits_of_another_length_are_refused() -> None:
    text = json.dumps({"version": 1, "layers": [{"kind": "flatten"}]})
    with pytest.raises(PayloadError, match=r"must be \(5,\)"):
        build(text, SHAPE, 5)


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=80))
def test_any_text_is_built_or_refused(text: str) -> None:
    with pytest.raises(PayloadError):
        build(text, SHAPE, 5)


WINDOWS = st.tuples(*[st.integers(1, 4)] * 3, st.integers(0, 2), st.integers(1, 2), st.booleans())


@settings(deadline=None, max_examples=150)
@given(WINDOWS, st.sampled_from(["conv", "max", "avg"]), st.integers(1, 7), st.integers(1, 7))
def test_shapes_are_those_that_torch_gives(
    window: tuple[int, int, int, int, int, bool], kind: str, height: int, width: int
) -> None:
    kernel, wide, stride, padding, dilation, ceil = window
    # With ceil_mode torch also takes windows that are larger than the image; these are refused.
    reach = dilation if kind == "max" else 1
    least = min(height - reach * (kernel - 1), width - reach * (wide - 1)) + 2 * padding
    assume(not ceil or kind == "conv" or least >= 1)
    sizes = ((kernel, wide), stride)
    layer: nn.Module = {
        "conv": nn.Conv2d(2, 4, *sizes, padding, dilation, 2),
        "max": nn.MaxPool2d(*sizes, padding, dilation, ceil_mode=ceil),
        "avg": nn.AvgPool2d(*sizes, padding, ceil),
    }[kind]
    shape = (2, height, width)
    try:
        expected = int(layer(torch.zeros(3, *shape)).flatten(1).shape[1])
    except RuntimeError:
        expected = 0
    text = describe(nn.Sequential(layer, nn.Flatten()))
    if expected:
        assert len(build(text, shape, expected)) == 2
    else:
        with pytest.raises(PayloadError, match="cannot take"):
            build(text, shape, 1)
