"""What a client's examples cost: hard labels, and the teacher's answers where the plan has them."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from reticent.core.plan import Distill
from reticent.privacy.clipping import Loss


def loss_of(distill: Distill, soft: torch.Tensor | None) -> Loss:
    """Return the sum of the examples' losses, on whatever device they are.

    Args:
        distill: The plan's section.
        soft: The teacher's mean answer to each label, ``(classes, classes)``; None without them.
    """
    if soft is None or distill.local_weight == 0:
        return cross_entropy
    weight, heat = distill.local_weight, distill.temperature

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hard = cross_entropy(logits, labels)
        log_student = F.log_softmax(logits / heat, dim=1)
        mimic = F.kl_div(log_student, soft.to(labels.device)[labels], reduction="sum")
        return (1 - weight) * hard + weight * heat**2 * mimic

    return loss


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the sum of the examples' losses by their labels alone."""
    return F.cross_entropy(logits, labels, reduction="sum")
