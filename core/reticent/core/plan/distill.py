"""Distillation from a teacher."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ..section import Positive, Section


class Distill(Section):
    """Distillation from a teacher, on public data; see :mod:`reticent.compression.distill`.

    Attributes:
        kind: What is imitated: softened answers (``response``; Hinton, Vinyals and Dean 2015), a
            hidden layer (``feature``; Romero et al. 2015), distances and angles between the
            examples of a batch (``relation``; Park et al. 2019), two of them, or nothing.
        mode: Who teaches. ``offline``: a trained teacher. ``online``: teacher and student learn
            from each other (Zhang et al. 2018). ``self``: the teacher has the student's own
            architecture (Furlanello et al. 2018). ``reverse``: a model of the student's
            architecture teaches the teacher first (Yuan et al. 2020).
        temperature: Softens both distributions; the loss is scaled by its square.
        weight: Share of the distillation loss while the student trains on public data.
        local_weight: Share of the distillation loss on the devices, where the teacher's answer for
            an example is its mean softened response to public examples of the same label (a table
            of classes x classes, public, so that no teacher travels and no device runs one).
    """

    kind: Literal[
        "response", "feature", "relation", "response+feature", "response+relation", "none"
    ] = "response"
    mode: Literal["offline", "online", "self", "reverse"] = "offline"
    temperature: Positive = 2.0
    weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    local_weight: Annotated[float, Field(ge=0, le=1)] = 0.0

    @property
    def terms(self) -> tuple[str, ...]:
        """The parts of ``kind``: of response, feature and relation; empty for ``none``."""
        return () if self.kind == "none" else tuple(self.kind.split("+"))

    @property
    def tuning(self) -> Distill:
        """What guides a student that is already trained: the same without the hidden layer.

        A hint leads to a good start (Romero et al. 2015, section 2.3); its projection begins at
        random and would first pull a trained student away from there.
        """
        kind = {"feature": "none", "response+feature": "response"}.get(self.kind, self.kind)
        return self.model_copy(update={"kind": kind})

    @model_validator(mode="after")
    def _devices_have_answers_only(self) -> Self:
        if self.local_weight == 0 or "response" in self.terms or self.kind == "none":
            return self
        why = (
            "a relation between examples is not a sum over examples, so clipping each example's "
            "gradient would not bound what one example changes"
            if self.kind == "relation"
            else "devices hold the teacher's mean answers, and not its hidden layers"
        )
        raise ValueError(
            f'local_weight={self.local_weight}: must be 0 when kind is "{self.kind}": {why}; use '
            f'kind="response+{self.kind}" for the public data with "response" on the devices'
        )

    @model_validator(mode="after")
    def _mode_fits(self) -> Self:
        if self.mode != "offline" and self.kind == "none":
            raise ValueError(f'mode="{self.mode}": nothing is distilled when kind is "none"')
        if self.mode == "online" and self.kind != "response":
            raise ValueError(
                f'kind="{self.kind}": must be "response" when mode is "online", because hidden '
                "layers of a teacher that still changes are no target"
            )
        return self
