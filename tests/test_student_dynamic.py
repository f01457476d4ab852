"""Dynamic quantization from plain arrays, against torch's own and against rounding by hand."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from engines import ENGINES, needs_x86
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn import functional

from reticent.compression.artifact import SelfTest, load_artifact, write_artifact
from reticent.compression.deployable import assemble, parse_spec, quantized, require_dynamic_form
from reticent.compression.dynamic import DynamicSpec, build_dynamic, dynamic_spec, rounded_copy
from reticent.compression.manifest import TaskInfo
from reticent.compression.quantize import WeightGrid, fake_quantize
from reticent.core.errors import ArtifactError, DataError, PlanError
from reticent.core.plan import Backend, Granularity, Quantize, parse_plan
from reticent.core.seeds import torch_generator
from reticent.core.sequences import OneHot

SYMBOLS, LENGTH, HIDDEN = 12, 9, 16
SECTION = Quantize(kind="dynamic")


class LastLSTM(nn.LSTM):
    def forward(self, x: Any) -> Any:
        return super().forward(x)[0][:, -1]


class LastGRU(nn.GRU):
    def forward(self, x: Any) -> Any:
        return super().forward(x)[0][:, -1]


class FirstGRU(nn.GRU):
    def forward(self, x: Any) -> Any:
        return super().forward(x)[0][:, 0]


def filled(*layers: nn.Module) -> nn.Sequential:
    model = nn.Sequential(*layers).eval()
    for index, p in enumerate(model.parameters()):
        p.data = 0.4 * torch.randn(p.shape, generator=torch_generator(41, index))
    return model


def perceptron() -> nn.Sequential:
    return filled(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 5, bias=False))


def recurrent(kind: str) -> nn.Sequential:
    layer = {"lstm": LastLSTM, "gru": LastGRU}[kind](SYMBOLS, HIDDEN, batch_first=True)
    return filled(OneHot(SYMBOLS), layer, nn.Linear(HIDDEN, SYMBOLS))


def codes(count: int = 60) -> torch.Tensor:
    drawn = torch.randint(0, SYMBOLS, (count, LENGTH), generator=torch_generator(42, "codes"))
    return drawn.to(torch.float32)


def images(count: int = 60) -> torch.Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch_generator(43, "x"))


def rounded(x: torch.Tensor, levels: int) -> torch.Tensor:
    """One example's activations on the grid between its extremes."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    if low == high:
        return x
    step = (high - low) / levels
    zero = max(0, min(levels, round(-low / step)))
    return torch.fake_quantize_per_tensor_affine(x, step, zero, 0, levels)


@torch.no_grad()
def by_hand(model: nn.Module, x: torch.Tensor, section: Quantize, levels: int) -> torch.Tensor:
    rows = []
    for row in x.split(1):
        for layer in model.children():
            if isinstance(layer, nn.Linear):
                weight = fake_quantize(layer.weight, WeightGrid(8, section.granularity))
                row = functional.linear(rounded(row, levels), weight, layer.bias)
            else:
                row = layer(row)
        rows.append(row)
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("engine", "levels", "other"),
    [("qnnpack", 255, 127), pytest.param("x86", 127, 255, marks=needs_x86)],
)
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_linear_layers_compute_what_rounding_by_hand_does(
    engine: Backend, levels: int, other: int, granularity: Granularity
) -> None:
    model, x = perceptron(), images()
    section = Quantize(kind="dynamic", granularity=granularity)
    found = build_dynamic(dynamic_spec(model, section), engine)(x)
    # A value halfway between two integers may fall to either.
    step = by_hand(model, x, section, levels).abs().max() / levels
    assert ((found - by_hand(model, x, section, levels)).abs() > 1e-4).float().mean() < 0.1
    assert (found - by_hand(model, x, section, levels)).abs().max() < 2 * step
    assert ((found - by_hand(model, x, section, other)).abs() > 1e-4).float().mean() > 0.5


@torch.no_grad()
def gated(kind: str, model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """The recurrence as torch documents it, with products as on qnnpack."""
    layer: Any = model[1]
    matrices = [fake_quantize(w) for w in (layer.weight_ih_l0, layer.weight_hh_l0)]
    hidden, cell = torch.zeros(1, HIDDEN), torch.zeros(1, HIDDEN)
    # The products with all inputs of an example are taken at once: one range for them.
    inputs = functional.linear(rounded(x, 255), matrices[0], layer.bias_ih_l0)
    for part in inputs.unbind(1):
        state = functional.linear(rounded(hidden, 255), matrices[1], layer.bias_hh_l0)
        if kind == "lstm":
            i, f, g, o = (part + state).chunk(4, dim=1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
        else:
            (r, z, n), (sr, sz, sn) = part.chunk(3, dim=1), state.chunk(3, dim=1)
            new = (n + (r + sr).sigmoid() * sn).tanh()
            hidden = (1 - (z + sz).sigmoid()) * new + (z + sz).sigmoid() * hidden
    return hidden


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_recurrent_layers_compute_what_rounding_by_hand_does(kind: str) -> None:
    model = recurrent(kind)
    only = nn.Sequential(*list(model)[:2])
    found = build_dynamic(dynamic_spec(only, SECTION))(codes(20))
    expected = torch.cat([gated(kind, model, row) for row in model[0](codes(20)).split(1)])
    worst = float((found - expected).abs().max())
    assert worst < 0.02
    # Float is farther away, so the rounding was compared.
    assert (found - expected).abs().mean() < 0.5 * (found - only(codes(20))).abs().mean()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["lstm", "gru", "perceptron"])
def test_it_agrees_with_float_as_torchs_own_does(kind: str, engine: Backend) -> None:
    model, x = (
        (perceptron(), images(300)) if kind == "perceptron" else (recurrent(kind), codes(300))
    )
    ours = build_dynamic(dynamic_spec(model, SECTION), engine)(x)
    expected = model(x).detach()
    assert (ours.argmax(1) == expected.argmax(1)).float().mean() >= 0.95
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = copy.deepcopy(model)
            if kind != "perceptron":  # torch looks for its own classes
                plain[1].__class__ = {"lstm": nn.LSTM, "gru": nn.GRU}[kind]
            torchs = quantize_dynamic(plain, {nn.Linear, nn.LSTM, nn.GRU}, dtype=torch.qint8)
        rows = []
        for row in x.split(1):
            for layer in torchs:
                row = layer(row)
                row = row[0][:, -1] if isinstance(row, tuple) else row
            rows.append(row)
    finally:
        torch.backends.quantized.engine = before
    theirs = torch.cat(rows)
    assert (ours - expected).abs().mean() <= 1.2 * (theirs - expected).abs().mean()


@pytest.mark.parametrize("kind", ["lstm", "perceptron"])
def test_an_answer_does_not_depend_on_its_neighbours(kind: str) -> None:
    model, x = (perceptron(), images()) if kind == "perceptron" else (recurrent(kind), codes())
    dynamic = build_dynamic(dynamic_spec(model, SECTION))
    loud = x.clone()
    loud[1:] = 50 * loud[1:]
    assert torch.equal(dynamic(x)[:1], dynamic(loud)[:1])
    assert torch.equal(dynamic(x), torch.cat([dynamic(row) for row in x.split(1)]))


def test_the_simulation_rounds_weights_and_leaves_the_model_alone() -> None:
    model = recurrent("lstm")
    before = [p.detach().clone() for p in model.parameters()]
    simulated = rounded_copy(model, SECTION)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for now, then in zip(simulated.parameters(), before, strict=True):
        assert torch.equal(now, fake_quantize(then) if then.dim() == 2 else then)


def test_it_survives_its_artifact(tmp_path: Path) -> None:
    model, x, key = recurrent("gru"), codes(), Ed25519PrivateKey.generate()
    spec, _ = quantized(model, x, SECTION)
    logits = assemble(spec)(x)
    folder = write_artifact(
        tmp_path / "model",
        spec,
        task=TaskInfo(name="t", classes=SYMBOLS, input_shape=(LENGTH,), preprocessing="none"),
        plan_digest="ab" * 32,
        metrics={},
        privacy="off",
        sizes={},
        self_test=SelfTest(x[:4], logits[:4]),
        private_key=key,
    )
    loaded = load_artifact(folder, key.public_key())
    assert isinstance(spec, DynamicSpec) and loaded.graph == spec.graph
    assert torch.equal(loaded.predict(x), logits)
    with pytest.raises(ArtifactError, match="self test: logits differ"):
        write_artifact(
            tmp_path / "other",
            spec,
            task=loaded.manifest.task,
            plan_digest="ab" * 32,
            metrics={},
            privacy="off",
            sizes={},
            self_test=SelfTest(x[:4], logits[4:8]),
            private_key=key,
        )


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Conv2d(1, 1, 3), r'layer 0 \(Conv2d\) .*kind="static"'),
        (nn.LSTM(3, 4, batch_first=True), r"layer 0 \(LSTM\) .* last hidden"),
        (FirstGRU(3, 4, batch_first=True), r"layer 0 \(FirstGRU\) .* last hidden"),
        (LastLSTM(3, 4), r"layer 0 \(LastLSTM\) .* batch first"),
        (LastLSTM(3, 4, num_layers=2, batch_first=True), r"layer 0 .* one layer"),
        (nn.Flatten(0), r"layer 0 \(Flatten\)"),
    ],
)
def test_other_layers_are_refused_before_training(layer: nn.Module, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        require_dynamic_form(nn.Sequential(layer), SECTION)
    require_dynamic_form(nn.Sequential(layer), Quantize())
    with pytest.raises(PlanError, match=r"nn\.Sequential"):
        require_dynamic_form(layer, SECTION)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = perceptron()
    model[1].weight.data[0, 0] = float("nan")
    with pytest.raises(ArtifactError, match="layer 1 holds"):
        dynamic_spec(model, SECTION)


def test_arrays_that_do_not_fit_are_refused() -> None:
    spec = dynamic_spec(recurrent("lstm"), SECTION)
    arrays = dict(spec.arrays)
    changes: list[tuple[str, torch.Tensor]] = [
        ("1.input.weight", arrays["1.input.weight"].float()),
        ("1.hidden.scale", arrays["1.hidden.scale"][:-1]),
        ("1.hidden.scale", -arrays["1.hidden.scale"]),
        ("2.bias", torch.full((SYMBOLS,), float("inf"))),
        ("2.bias", torch.zeros(SYMBOLS, 1)),
        ("more", torch.zeros(1)),
    ]
    for name, value in changes:
        with pytest.raises(ArtifactError, match=f"array {name}"):
            build_dynamic(DynamicSpec(spec.graph, arrays | {name: value}))
    with pytest.raises(ArtifactError, match=r"array 2\.weight: missing"):
        build_dynamic(DynamicSpec(spec.graph, {n: v for n, v in arrays.items() if n != "2.weight"}))
    gru = spec.graph.layers[1].model_copy(update={"kind": "gru"})
    graph = spec.graph.model_copy(
        update={"layers": (spec.graph.layers[0], gru, spec.graph.layers[2])}
    )
    with pytest.raises(ArtifactError, match="3 rows for each hidden unit"):
        build_dynamic(DynamicSpec(graph, arrays))


@pytest.mark.parametrize(
    "text", [b'{"activations": "dynamic"}', b'{"activations": "static", "layers": []}', b"[", b"{}"]
)
def test_a_malformed_graph_is_refused(text: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"model\.json"):
        parse_spec(text, {})


def test_inputs_that_do_not_fit_are_refused() -> None:
    dynamic = build_dynamic(dynamic_spec(perceptron(), SECTION))
    for x in (images().double(), images()[:0], torch.zeros(2, 7), torch.zeros(2, 3, 4, 5)):
        with pytest.raises(DataError, match=r"float32|was given shape"):
            dynamic(x)


def test_choices_without_effect_are_refused() -> None:
    for choice in ("bits=4", "observer=histogram"):
        with pytest.raises(PlanError, match=r'student\.quantize: kind="dynamic" with'):
            parse_plan("", ["student.quantize.kind=dynamic", f"student.quantize.{choice}"])
    chosen = ["student.quantize.kind=dynamic", "student.quantize.granularity=tensor"]
    assert parse_plan("", chosen).student.quantize.granularity == "tensor"
