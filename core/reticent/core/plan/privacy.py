"""The promise."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ..section import Count, Positive, Section

DEFAULT_EPSILON = 8.0


class Privacy(Section):
    """The promise: unit, adversary, and either a target epsilon or a noise multiplier.

    Attributes:
        unit: What one neighbour differs in: one ``example`` of one client, or all that one
            ``client`` contributes. With ``client`` the server bounds every decoded update and adds
            the noise itself, so ``trust`` must be ``aggregator``.
        trust: ``local``: every client adds the full noise, the promise holds against the server.
            ``aggregator``: every client adds a share, the promise holds against everyone who sees
            the models, and the server is trusted to look only at the sum.
        epsilon: Target; the noise multiplier is calibrated over the whole schedule.
        noise_multiplier: Given instead of ``epsilon``, which is then reported.
        relation: How the neighbour differs: one unit added or removed (its contribution becomes
            zero), or replaced by another one.
        delta: The delta at which epsilon is stated.
        clip: L2 bound of one example's gradient, or of one client's update (``unit = "client"``),
            between 1e-12 and 1e12: float32 could not keep another.
        clipping: ``flat``: one norm over all parameters; ``per-layer``: every parameter tensor has
            its own bound, and the squares of the bounds sum to ``clip`` squared.
        clip_quantile: Adaptive clipping of clients' updates (Andrew et al. 2021): ``clip`` is then
            the first bound, and later bounds follow this quantile of the updates' norms by noised
            counts, which are charged. Only with ``unit = "client"``.
        examples_per_user: Most examples of one client that belong to one person, when such a bound
            is known; the report then states a user-level epsilon.
        budget: The hard stop of each simulated device's ledger; ``epsilon`` when absent, and
            unlimited when only ``noise_multiplier`` is given.
        secret_cohort: Nobody who sees the models learns who takes part: epsilon against them then
            counts the sampling of clients. Only with ``unit = "client"`` and
            ``federation.sampling = "poisson"``.
    """

    unit: Literal["example", "client"] = "example"
    trust: Literal["local", "aggregator"] = "aggregator"
    epsilon: Positive | None = None
    noise_multiplier: Positive | None = None
    relation: Literal["add-or-remove-one", "replace-one"] = "add-or-remove-one"
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    clip: Annotated[float, Field(ge=1e-12, le=1e12)] = 0.5
    clipping: Literal["flat", "per-layer"] = "flat"
    clip_quantile: Annotated[float, Field(gt=0, lt=1)] | None = None
    examples_per_user: Count | None = None
    budget: Positive | None = None
    secret_cohort: bool = False

    @model_validator(mode="after")
    def _unit_fits(self) -> Self:
        if self.unit == "client":
            if self.trust != "aggregator":
                raise ValueError(
                    f'trust="{self.trust}": must be "aggregator" when unit is "client", because '
                    "the server bounds the updates and adds the noise"
                )
            if self.clipping != "flat" or self.examples_per_user is not None:
                raise ValueError(
                    'clipping="per-layer" and examples_per_user are about single examples: leave '
                    'them out when unit is "client"'
                )
        elif self.clip_quantile is not None:
            raise ValueError(
                f"clip_quantile={self.clip_quantile}: adaptive clipping is of clients' updates: "
                'give unit="client", or leave it out'
            )
        return self

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.epsilon is not None and self.noise_multiplier is not None:
            raise ValueError(
                f"epsilon={self.epsilon} and noise_multiplier={self.noise_multiplier} are both "
                "given: give epsilon (the noise is calibrated) or noise_multiplier (epsilon is "
                "reported), not both"
            )
        if self.epsilon is None and self.noise_multiplier is None:
            raise ValueError(
                'neither epsilon nor noise_multiplier is given: give one, or write privacy = "off"'
            )
        return self
