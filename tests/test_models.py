"""Models: sizes as documented, shapes for any image, and only layers the pipeline knows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from reticent.core import models
from reticent.core.errors import DataError, PlanError

KNOWN = (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm, nn.ReLU, nn.Flatten, nn.Linear)


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _folded(model: nn.Sequential) -> nn.Module:
    layers = list(model.eval())
    for i, layer in enumerate(layers[:-1]):
        norm = layers[i + 1]
        if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            layers[i] = fuse_conv_bn_eval(layer, norm)
    return nn.Sequential(*(x for x in layers if not isinstance(x, nn.BatchNorm2d)))


@pytest.mark.parametrize(
    ("kind", "side", "size"),
    [("tiny", 28, 19_178), ("tiny", 8, 15_338), ("wide", 28, 20_746), ("wide", 8, 10_186)],
)
def test_students_have_the_documented_size_after_folding(kind: str, side: int, size: int) -> None:
    student = models.student(kind, (1, side, side), 10)
    assert isinstance(student, nn.Sequential)
    folded = _folded(student)
    assert _size(folded) == size
    x = torch.randn(3, 1, side, side, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(folded(x), student(x), atol=1e-5)


@pytest.mark.parametrize("kind", models.STUDENTS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 8, 8), (2, 7, 19), (1, 1, 1)])
def test_students_map_any_image_to_logits(kind: str, shape: tuple[int, int, int]) -> None:
    student = models.student(kind, shape, 7)
    assert isinstance(student, nn.Sequential)
    assert all(isinstance(x, KNOWN) for x in student)
    out = student(torch.zeros(4, *shape))
    assert out.shape == (4, 7)
    assert out.dtype == torch.float32
    assert any(isinstance(x, nn.GroupNorm) for x in student) == kind.endswith("-gn")
    assert any(isinstance(x, nn.BatchNorm2d) for x in student) != kind.endswith("-gn")


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 8, 8), (1, 5, 9), (1, 1, 1)])
def test_the_teacher_maps_any_image_to_logits(shape: tuple[int, int, int]) -> None:
    teacher = models.teacher(shape, 10)
    assert teacher.eval()(torch.zeros(2, *shape)).shape == (2, 10)
    assert 100_000 < _size(teacher) < 110_000


def test_every_parameter_of_every_model_gets_a_gradient() -> None:
    shape = (1, 12, 12)
    made = [models.student(kind, shape, 4) for kind in models.STUDENTS]
    x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    for model in [*made, models.teacher(shape, 4)]:
        model(x).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_group_norm_students_treat_examples_apart() -> None:
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for kind, apart in (("tiny-gn", True), ("tiny", False)):
        model = models.student(kind, (1, 8, 8), 10)
        assert torch.allclose(model(x)[:2], model(x[:2]), atol=1e-5) == apart


def test_a_model_is_made_again_from_the_same_seed() -> None:
    def flat(seed: int) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = models.student("tiny", (1, 8, 8), 10)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(flat(3), flat(3))
    assert not torch.equal(flat(3), flat(4))


def test_unknown_students_are_refused_with_a_suggestion() -> None:
    with pytest.raises(PlanError, match=r'student\.model="tinny": .*wide-gn.*mean "tiny"'):
        models.student("tinny", (1, 8, 8), 10)
    with pytest.raises(PlanError, match=r'student\.model="tiny-bn"'):
        models.student("tiny-bn", (1, 8, 8), 10)


@pytest.mark.parametrize("shape", [(8,), (8, 8), (1, 1, 8, 8), (0, 8, 8), ()])
def test_only_images_are_taken(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="channels, height, width"):
        models.student("tiny", shape, 10)
    with pytest.raises(DataError, match="channels, height, width"):
        models.teacher(shape, 10)


def test_a_students_own_maker_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from torch import nn\ndef good(shape, classes):\n    return nn.Linear(shape[0], classes)\n"
    )
    (tmp_path / "mine_model.py").write_text(code + "bad = dict\nnumber = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    made = models.student("mine_model:good", (5,), 3)
    assert isinstance(made, nn.Linear)
    assert made.weight.shape == (3, 5)
    for spec, reason in (
        ("mine_model:number", "number is not callable"),
        ("mine_model:none", "none does not exist in module mine_model"),
        ("no_such_module_at_all:x", "cannot be imported"),
        ("mine_model:", "must look like"),
        (":good", "must look like"),
        ("../mine:good", "must look like"),
    ):
        with pytest.raises(PlanError, match=reason):
            models.student(spec, (5,), 3)


def test_a_students_own_maker_must_return_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_wrong.py").write_text("def make(shape, classes):\n    return [1]\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PlanError, match=r"returned a list: must be a torch\.nn\.Module"):
        models.student("mine_wrong:make", (5,), 3)
