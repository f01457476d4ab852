"""What clipped sums refuse, because the guarantee would not hold or nothing could be computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reticent.core.errors import DataError, PlanError
from reticent.core.models import student
from reticent.core.update import Layout
from reticent.privacy.clipping import ClippedGradients, FunctionalGradients


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def batch_of(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(count, 1, 8, 8), torch.zeros(count, dtype=torch.int64)


def test_batch_normalisation_is_refused() -> None:
    torch.manual_seed(0)
    model = student("tiny", (1, 8, 8), 10)
    with pytest.raises(DataError, match="batch normalisation"):
        ClippedGradients(model, Layout.of(model))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_for_which_the_hooks_have_the_wrong_gradient_is_refused(mode: Any) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode=mode), nn.Flatten())
    with pytest.raises(DataError, match=f"padding_mode='{mode}'"):
        ClippedGradients(model, Layout.of(model))


def test_a_row_for_padding_is_refused_where_only_the_hooks_know_the_student() -> None:
    """They would train it."""
    table = nn.Embedding(4, 3, padding_idx=3)
    model = nn.Sequential(table, nn.Conv1d(5, 2, 1), nn.Flatten(), nn.Linear(6, 3))
    with pytest.raises(DataError, match="student layer 0 has padding_idx=3"):
        ClippedGradients(model, Layout.of(model), shape=(5,))


@pytest.mark.parametrize("kind", [ClippedGradients, FunctionalGradients])
@pytest.mark.parametrize("table", [nn.Embedding, nn.EmbeddingBag])
def test_a_table_that_changes_by_what_is_looked_up_is_refused(kind: Any, table: Any) -> None:
    model = nn.Sequential(table(4, 3, max_norm=1.0), nn.Flatten(), nn.Linear(3, 3))
    with pytest.raises(DataError, match=r"student layer 0 has max_norm=1\.0"):
        kind(model, Layout.of(model))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


class Folding(nn.Module):
    """Makes rows of one example's places, each of which would get a bound of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.reshape(-1, 4)).view(len(x), -1, 2).sum(dim=1)


def test_a_parameter_that_is_not_used_is_refused() -> None:
    model = Unused()
    gradients = ClippedGradients(model, Layout.of(model))
    with pytest.raises(DataError, match="no per-example gradient"):
        gradients.sum(torch.randn(3, 4), torch.zeros(3, dtype=torch.int64), cross_entropy, 1.0)


def test_a_model_that_takes_one_example_for_several_is_refused() -> None:
    model = Folding()
    gradients = ClippedGradients(model, Layout.of(model))
    with pytest.raises(DataError, match="6 rows for 3 examples"):
        gradients.sum(torch.randn(3, 2, 4), torch.zeros(3, dtype=torch.int64), cross_entropy, 1.0)


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan"), float("inf"), 1e-13, 1e13])
def test_a_clip_that_float32_cannot_keep_is_refused(clip: float) -> None:
    model = model_of()
    with pytest.raises(PlanError, match=r"privacy\.clip="):
        ClippedGradients(model, Layout.of(model)).sum(*batch_of(2), cross_entropy, clip)


def test_bad_arguments_are_refused() -> None:
    model = model_of()
    layout = Layout.of(model)
    with pytest.raises(PlanError, match=r'privacy\.clipping="ghost": must be flat or per-layer'):
        ClippedGradients(model, layout, clipping="ghost")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="microbatch=0"):
        ClippedGradients(model, layout, microbatch=0)
    with pytest.raises(DataError, match="2 inputs and 3 labels"):
        ClippedGradients(model, layout).sum(batch_of(2)[0], batch_of(3)[1], cross_entropy, 1.0)
