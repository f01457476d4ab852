"""The int8 model against its float simulation, and the traps of quantized kernels."""

from __future__ import annotations

import dataclasses
import warnings
from functools import cache

import pytest
import torch
from engines import needs_x86
from torch import nn
from torch.nn import functional

from reticent.compression.convert import (
    Ranges,
    calibrate,
    compare,
    convert,
    fake_quantized_model,
)
from reticent.compression.fold import fold_batchnorm
from reticent.compression.integer import (
    Graph,
    IntegerModel,
    IntegerSpec,
    build,
    parse_graph,
    quantized_engine,
)
from reticent.compression.prune import apply_mask, magnitude_mask
from reticent.compression.quantize import WeightGrid, quantized_weights
from reticent.core.errors import ArtifactError, DataError
from reticent.core.plan import Bits, Granularity, Quantize
from reticent.core.seeds import torch_generator

CLASSES = 10
NOISE = 1.0


def digits(count: int, purpose: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy copies of ten smooth 8x8 patterns."""
    patterns = torch.randn(CLASSES, 1, 4, 4, generator=torch_generator(8, "patterns"))
    patterns = functional.interpolate(patterns, size=(8, 8), mode="bilinear")
    generator = torch_generator(8, purpose)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    noise = torch.randn(count, 1, 8, 8, generator=generator)
    return patterns[labels] + NOISE * noise, labels


def architecture(kind: str) -> nn.Sequential:
    norms = {
        "folded": (nn.BatchNorm2d(8), nn.BatchNorm2d(16)),
        "group": (nn.GroupNorm(4, 8), nn.GroupNorm(4, 16)),
    }
    first, second = norms[kind]
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        first,
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, groups=2),
        second,
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 32),
        nn.ReLU(),
        nn.Linear(32, CLASSES),
    )


@cache
def trained(kind: str) -> nn.Sequential:
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(9)
        model = architecture(kind)
        x, y = digits(512, "train")
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for step in range(60):
            part = slice(64 * (step % 8), 64 * (step % 8) + 64)
            optimizer.zero_grad()
            with quantized_weights(model):
                functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    return fold_batchnorm(model).eval()


@cache
def converted(kind: str) -> tuple[nn.Sequential, IntegerSpec, IntegerModel]:
    model = trained(kind)
    ranges = calibrate(model, digits(200, "public")[0])
    spec = convert(model, ranges)
    return fake_quantized_model(model, ranges), spec, build(spec)


@pytest.mark.parametrize("kind", ["folded", "group"])
def test_int8_agrees_with_its_float_simulation(kind: str) -> None:
    simulated, _, integer = converted(kind)
    x, y = digits(1000, "test")
    agreement = compare(simulated, integer, x)
    assert agreement.argmax >= 0.99
    # A step of the last grid, now and then two, where a value lay between two integers.
    step = integer.graph.layers[-1].output.scale  # type: ignore[union-attr]
    assert agreement.max_difference <= 2.01 * step
    accuracy = (integer(x).argmax(1) == y).float().mean()
    assert accuracy > 0.9
    assert accuracy >= (trained(kind)(x).argmax(1) == y).float().mean() - 0.01


@pytest.mark.parametrize("kind", ["folded", "group"])
def test_a_wrong_model_does_not_agree(kind: str) -> None:
    simulated, spec, _ = converted(kind)
    x = digits(1000, "test")[0]
    name = next(n for n, v in spec.arrays.items() if v.dtype == torch.int8)
    wrong = dict(spec.arrays) | {name: spec.arrays[name].flip(0)}
    assert compare(simulated, build(IntegerSpec(spec.graph, wrong)), x).argmax < 0.98
    # One step of one channel of the last layer a quarter too large is found in the logits.
    last = spec.graph.layers[-1]
    scales = spec.arrays[f"{last.name}.scale"].clone()
    scales[3] *= 1.25
    off = build(IntegerSpec(spec.graph, dict(spec.arrays) | {f"{last.name}.scale": scales}))
    step = last.output.scale  # type: ignore[union-attr]
    assert compare(simulated, off, x).max_difference > 4 * step


@pytest.mark.parametrize("kind", ["folded", "group"])
def test_channels_last_inputs_and_large_batches_change_nothing(kind: str) -> None:
    _, _, integer = converted(kind)
    x = digits(600, "test")[0]
    expected = torch.cat([integer(row) for row in x.split(1)])
    assert torch.equal(integer(x), expected)
    assert torch.equal(integer(x.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(integer(x.transpose(2, 3).contiguous().transpose(2, 3)), expected)


def test_channels_last_with_several_input_channels() -> None:
    generator = torch_generator(10, "rgb")
    model = nn.Sequential(nn.GroupNorm(1, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Flatten())
    model[2].weight.data = torch.randn(model[2].weight.shape, generator=generator)
    model[2].bias.data.zero_()
    x = torch.randn(600, 3, 6, 6, generator=generator)
    integer = build(convert(model, calibrate(model, x)))
    last = x.contiguous(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    assert torch.equal(integer(last), integer(x))


@pytest.mark.parametrize("kind", ["folded", "group"])
def test_it_is_made_of_integers(kind: str) -> None:
    _, spec, integer = converted(kind)
    for name, values in spec.arrays.items():
        is_weight = name.endswith(".weight") and values.dim() > 1
        assert values.dtype == (torch.int8 if is_weight else torch.float32)
    names = [type(getattr(m, "layer", m)).__name__ for m in integer.layers]
    assert names.count("Linear") == 1 and "LinearReLU" in names
    assert ("ConvReLU2d" in names) == (kind == "folded")
    # The engine holds the very integers of the specification.
    for name, module in zip((r.name for r in spec.graph.layers), integer.layers, strict=True):
        if f"{name}.scale" in spec.arrays:
            held = module.layer.weight().int_repr()  # type: ignore[operator,union-attr]
            assert torch.equal(held, spec.arrays[f"{name}.weight"])


def test_the_engine_is_restored_also_after_an_error() -> None:
    before = torch.backends.quantized.engine
    _, _, integer = converted("folded")
    with pytest.raises(DataError, match="layer 0 was given shape"):
        integer(torch.zeros(1, 3, 8, 8))
    assert torch.backends.quantized.engine == before
    with pytest.raises(ArtifactError, match="qnnpack"), quantized_engine("fbgemm"):
        pass


@needs_x86
@pytest.mark.parametrize("bits", [8, 2])
@pytest.mark.parametrize("kind", ["folded", "group"])
def test_the_x86_engine_gives_the_answers_of_qnnpack(kind: str, bits: Bits) -> None:
    model, section = trained(kind), Quantize(bits=bits, edges="none")
    ranges = calibrate(model, digits(200, "public")[0], section)
    spec = convert(model, ranges, section)
    try:
        other = build(spec, "x86")
    except ArtifactError as error:
        assert bits == 8 and "saturate" in str(error)
        pytest.skip("this processor lacks AVX512-VNNI")
    x = digits(1000, "test")[0]
    result = compare(build(spec), other, x)
    assert result.argmax >= 0.99
    assert result.max_difference <= 2.01 * spec.graph.layers[-1].output.scale  # type: ignore[union-attr]
    assert torch.equal(other(x.contiguous(memory_format=torch.channels_last)), other(x))


@needs_x86
def test_weights_that_might_saturate_are_refused_by_x86_and_others_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    model, x = trained("folded"), digits(100, "public")[0]
    spec = converted("folded")[1]
    with pytest.raises(ArtifactError, match=r"array 0\.weight holds 127: engine x86 may saturate"):
        build(spec, "x86")
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in torch 2.10
    with pytest.raises(ArtifactError, match="engine x86 may saturate"):
        build(spec, "x86")
    build(spec, "qnnpack")
    section = Quantize(bits=4, edges="none")
    build(convert(model, calibrate(model, x, section), section), "x86")
    # The bound is exact: 64 fits into 16 bits twice, 65 does not.
    assert 2 * 64 * 255 <= 2**15 - 1 < 2 * 65 * 255
    for magnitude, fits in ((64, True), (65, False), (-65, False)):
        arrays = dict(spec.arrays)
        for name in (n for n, v in arrays.items() if v.dtype == torch.int8):
            arrays[name] = torch.full_like(arrays[name], magnitude)
        if fits:
            build(IntegerSpec(spec.graph, arrays), "x86")
        else:
            with pytest.raises(ArtifactError, match="saturate"):
                build(IntegerSpec(spec.graph, arrays), "x86")


def test_pruned_students_with_empty_channels_convert() -> None:
    model = fold_batchnorm(trained("folded"))
    model[0].weight.data[2] = 0
    apply_mask(model, magnitude_mask(model, 0.7))
    ranges = calibrate(model, digits(200, "public")[0])
    spec = convert(model, ranges)
    assert not spec.arrays["0.weight"][2].any()
    result = compare(fake_quantized_model(model, ranges), build(spec), digits(500, "test")[0])
    assert result.argmax >= 0.99


def test_calibration_changes_nothing_and_uses_the_observer() -> None:
    model = trained("folded")
    before = [p.clone() for p in model.parameters()]
    x = digits(300, "public")[0]
    full, cut = calibrate(model, x), calibrate(model, x, Quantize(observer="histogram"))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert full.input == (float(x.min()), float(x.max()))
    assert full.input[0] < cut.input[0] < cut.input[1] < full.input[1]
    assert all(cut.outputs[n][1] <= high for n, (_, high) in full.outputs.items())
    assert cut.outputs != full.outputs


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_fewer_bits_run_on_the_same_engine(bits: Bits, granularity: Granularity) -> None:
    model = trained("folded")
    section = Quantize(bits=bits, granularity=granularity, edges="none")
    x = digits(300, "public")[0]
    ranges = calibrate(model, x, section)
    spec = convert(model, ranges, section)
    integers = [v for v in spec.arrays.values() if v.dtype == torch.int8]
    assert len(integers) == 4 and all(int(v.abs().max()) == WeightGrid(bits).top for v in integers)
    steps = [v for n, v in spec.arrays.items() if n.endswith(".scale")]
    assert all((v.unique().numel() == 1) == (granularity == "tensor") for v in steps)
    result = compare(
        fake_quantized_model(model, ranges, section), build(spec), digits(500, "test")[0]
    )
    # A weight of one bit leaves many answers close to a tie, which aarch64 rounds otherwise.
    assert result.argmax >= (0.98 if bits == 1 else 0.99)
    other = Quantize(bits=4 if bits == 8 else 8, granularity=granularity)
    wrong = compare(fake_quantized_model(model, ranges, other), build(spec), digits(500, "test")[0])
    assert wrong.max_difference > 2 * result.max_difference


@pytest.mark.parametrize("kind", ["folded", "group"])
def test_the_graph_survives_json(kind: str) -> None:
    graph = converted(kind)[1].graph
    assert parse_graph(graph.model_dump_json().encode()) == graph


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b'{"input": {"scale": 0.0, "zero_point": 0}, "layers": []}',
        b"\xff",
        b'{"input": {"scale": 1.0, "zero_point": 0}, "layers": [{"kind": "exec", "name": "a"}]}',
        b'{"input": {"scale": 1.0, "zero_point": 300}, "layers": []}',
    ],
)
def test_a_malformed_graph_is_refused(text: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"model\.json"):
        parse_graph(text)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.BatchNorm2d(1), "layer 0 .* fold_batchnorm"),
        (nn.Identity(), "layer 0 .* leave it out"),
        (nn.SiLU(), "layer 0 .SiLU. has no integer form"),
        (nn.Conv2d(1, 1, 3, padding="same"), "layer 0 .* number of pixels"),
        (nn.Conv2d(1, 1, 3, padding_mode="reflect", padding=1), "layer 0 .* use zeros"),
        (nn.MaxPool2d(2, ceil_mode=True), "layer 0 .* ceil_mode"),
        (nn.Flatten(0), "layer 0 .* use 1 to -1"),
    ],
)
def test_unsupported_layers_are_refused_with_an_alternative(layer: nn.Module, words: str) -> None:
    with pytest.raises(ArtifactError, match=words):
        convert(nn.Sequential(layer), Ranges((0, 1), {}))


def test_bad_calibration_is_refused() -> None:
    model = trained("folded")
    for x in (
        torch.zeros(0, 1, 8, 8),
        torch.zeros(1, 1, 8, 8, dtype=torch.float64),
        torch.full((1, 1, 8, 8), float("nan")),
    ):
        with pytest.raises(DataError):
            calibrate(model, x)
    ranges = calibrate(model, digits(20, "public")[0])
    with pytest.raises(ArtifactError, match="ranges"):
        convert(model, dataclasses.replace(ranges, outputs={}))
    with pytest.raises(ArtifactError, match="finite and ascending"):
        convert(model, dataclasses.replace(ranges, input=(0.0, float("inf"))))
    with pytest.raises(ArtifactError, match="below zero"):
        convert(model, dataclasses.replace(ranges, outputs=dict(ranges.outputs) | {"0": (-1.0, 1)}))


def test_weights_that_are_not_finite_are_refused() -> None:
    model = fold_batchnorm(trained("folded"))
    ranges = calibrate(model, digits(20, "public")[0])
    model[0].bias.data[0] = float("inf")
    with pytest.raises(ArtifactError, match="layer 0: bias"):
        convert(model, ranges)


def test_arrays_that_do_not_fit_are_refused() -> None:
    spec = converted("folded")[1]
    changes: list[dict[str, torch.Tensor]] = [
        {"0.weight": spec.arrays["0.weight"].float()},
        {"0.scale": spec.arrays["0.scale"][:-1]},
        {"0.scale": torch.zeros_like(spec.arrays["0.scale"])},
        {"0.bias": torch.full_like(spec.arrays["0.bias"], float("nan"))},
        {"extra": torch.zeros(1)},
    ]
    for change in changes:
        with pytest.raises(ArtifactError, match=f"array {next(iter(change))}"):
            build(IntegerSpec(spec.graph, dict(spec.arrays) | change))
    missing = {n: v for n, v in spec.arrays.items() if n != "0.bias"}
    with pytest.raises(ArtifactError, match=r"array 0\.bias: missing"):
        build(IntegerSpec(spec.graph, missing))
    twice = Graph(input=spec.graph.input, layers=(*spec.graph.layers, spec.graph.layers[0]))
    with pytest.raises(ArtifactError, match="twice"):
        build(IntegerSpec(twice, spec.arrays))


def test_inputs_of_another_type_are_refused() -> None:
    integer = converted("folded")[2]
    for x in (torch.zeros(1, 1, 8, 8, dtype=torch.float64), torch.zeros(0, 1, 8, 8)):
        with pytest.raises(DataError, match="float32"):
            integer(x)


@pytest.mark.parametrize("shape", [(1, 2, 8, 8), (1, 3, 8, 8), (1, 8, 8), (1, 1, 8, 12)])
def test_inputs_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    # The engine itself accepts some of these, and returns wrong logits.
    with pytest.raises(DataError, match="was given shape"):
        converted("folded")[2](torch.zeros(shape))
