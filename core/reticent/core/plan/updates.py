"""Codecs of what travels."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from ..section import Section


class Updates(Section):
    """Codecs of what travels: ``codec`` up, ``broadcast`` down.

    Attributes:
        codec: Stages of updates. ``("auto",)`` becomes the narrowest dither whose alphabet holds
            four standard deviations of the noise at ``step``, and ``ans``.
        broadcast: Stages of models.
        step: The quantizer's public step as a share of the standard deviation of the noise in a
            coordinate of an update; with unit ``client`` as a share of an average coordinate at the
            bound. A dither adds ``step``² / 12 to the variance of one client's noise. Without
            privacy steps are taken from the data.
        pad: With privacy, updates are padded to a length that no private data decide (more, in
            public steps, if one is longer), so that lengths do not tell clients apart.
        delta: When given, a device that holds the last model is sent the change since, in these
            stages, and any other device the whole model in float32; ``broadcast`` is then not
            used. Only where more than half of the clients are asked in a round.
        error_feedback: Devices add what the codec left out to their next update (Seide et al.
            2014); only for ``topk``, ``sign`` and ``lowrank``, and not with unit ``client``.
    """

    step: Annotated[float, Field(ge=0.01, le=16)] = 0.5
    codec: tuple[str, ...] = ("dither4", "ans")
    broadcast: tuple[str, ...] = ("int8", "ans")
    pad: bool = True
    error_feedback: bool = False
    delta: tuple[str, ...] = ()

    @property
    def whole(self) -> tuple[str, ...]:
        """Stages of a whole model on its way down.

        With ``delta`` a whole model must be exactly what a chain of changes leads to.
        """
        return ("identity",) if self.delta else self.broadcast

    @field_validator("codec")
    @classmethod
    def _choose(cls, codec: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        """Write out ``auto``, so that a resolved plan says what it does."""
        if codec != ("auto",) or "step" not in info.data:
            return codec
        fits = (b for b in range(2, 8) if (2 ** (b - 1) - 1) * info.data["step"] >= 4)
        return (f"dither{next(fits, 8)}", "ans")
