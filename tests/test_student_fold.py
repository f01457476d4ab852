"""Folding: the same function with fewer layers, and a refusal where it cannot be."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from reticent.compression.fold import fold_batchnorm
from reticent.core.errors import PlanError
from reticent.core.seeds import torch_generator


def student(bias: bool = False, affine: bool = True) -> nn.Sequential:
    generator = torch_generator(1, "fold")
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=bias),
        nn.BatchNorm2d(4, affine=affine),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, groups=2, bias=bias),
        nn.BatchNorm2d(6, affine=affine),
        nn.Flatten(),
        nn.Linear(6 * 36, 3),
    )
    for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
        tensor.data = torch.rand(tensor.shape, generator=generator) + 0.1
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_folding_keeps_the_function(bias: bool, affine: bool) -> None:
    model = student(bias, affine)
    x = torch.randn(5, 1, 8, 8, generator=torch_generator(2, "x"))
    folded = fold_batchnorm(model)
    expected = model.eval()(x)
    torch.testing.assert_close(folded.eval()(x), expected, rtol=1e-5, atol=1e-5)
    # The same comparison tells a model whose statistics were forgotten.
    without = nn.Sequential(*(m for m in model if not isinstance(m, nn.BatchNorm2d)))
    assert (without(x) - expected).abs().max() > 0.1


def test_folding_uses_running_statistics_in_training_mode_too() -> None:
    model = student().train()
    folded = fold_batchnorm(model)
    assert folded.training and all(m.training for m in folded)
    x = torch.randn(5, 1, 8, 8, generator=torch_generator(2, "x"))
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-5, atol=1e-5)


def test_folding_copies_and_leaves_no_buffers() -> None:
    model = student()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    folded = fold_batchnorm(model)
    assert [type(m).__name__ for m in folded] == ["Conv2d", "ReLU", "Conv2d", "Flatten", "Linear"]
    assert not list(folded.buffers())
    assert all(p.requires_grad for p in folded.parameters())
    for p in folded.parameters():
        p.data.zero_()
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_a_model_without_batchnorm_is_unchanged() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU())
    folded = fold_batchnorm(model)
    assert [type(m) for m in folded] == [type(m) for m in model]
    assert folded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in folded.state_dict().items())


def test_names_are_kept_when_chosen_and_numbered_anew_when_not() -> None:
    layers: list[nn.Module] = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()]
    named = nn.Sequential(OrderedDict(zip(["stem", "norm", "act"], layers, strict=True)))
    assert [n for n, _ in fold_batchnorm(named).named_children()] == ["stem", "act"]
    plain = nn.Sequential(*layers)
    assert [n for n, _ in fold_batchnorm(plain).named_children()] == ["0", "1"]


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([nn.BatchNorm2d(2)], "layer 0 .* follows nothing"),
        ([nn.Conv2d(1, 2, 3), nn.ReLU(), nn.BatchNorm2d(2)], "layer 2 .* follows ReLU"),
        ([nn.Conv2d(1, 2, 3), nn.BatchNorm2d(3)], "layer 1 .* 3 features"),
        (
            [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False)],
            "layer 1 .* running statistics",
        ),
    ],
)
def test_what_cannot_be_folded_is_refused_by_name(layers: list[nn.Module], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        fold_batchnorm(nn.Sequential(*layers))
