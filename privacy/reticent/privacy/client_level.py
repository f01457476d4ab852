"""Client-level privacy: bounded updates, one noised sum a round, fixed and adaptive bounds.

Guarantee. One round releases ``sum_i clip(update_i, C) + N(0, (z C)^2 I)`` and, with an adaptive
bound, ``sum_i (b_i - 1/2) + N(0, s^2)``, where ``b_i`` tells whether update ``i`` was within the
bound. What is protected is everything that one *client* contributes to the round, against everyone
who sees the models and bounds but not the updates. The cohort is fixed by a public seed, and is
not part of what is protected.

=====================  ==========================================  ===========  ==========
relation               neighbouring rounds differ in               sum moves    count moves
=====================  ==========================================  ===========  ==========
add-or-remove-one      one client's contribution, which is zero    at most C    at most 1/2
                       in one of them
replace-one            one client's contribution, in any way       at most 2C   at most 1
=====================  ==========================================  ===========  ==========

Each is a Gaussian mechanism of noise multiplier ``z`` and ``2 s`` (noise over the bound of one
contribution; the accountant doubles what replace-one moves). Sources: McMahan, Ramage, Talwar and
Zhang 2018, section 3; Andrew, Thakkar, McMahan and Ramaswamy 2021, algorithm 1 and section 2.2.

The noise is the server's. A device trusts the server to bound the sum, to add the noise and to
show nothing else: against the server itself epsilon is infinite. The encoded length of an update
depends on it and is not noised, and with padding whether it exceeds the common length does, so sums
of lengths are for whoever runs the server. Float64 rounding of the sum and of the noise is not part
of the guarantee.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reticent.core.errors import PayloadError, PlanError, PrivacyError
from reticent.core.norms import l2_norm

from .events import Composed, Event, PoissonGaussian, on_one_sample
from .randomness import Stream

Floats = NDArray[np.float64]

COUNT_NOISE = 1 / 20
"""Noise of the count over the clients of a round: sigma_b = m / 20 (Andrew et al. 2021)."""

CLIP_RATE = 0.2
"""Learning rate of the adaptive bound (Andrew et al. 2021, section 3)."""

CLIP_RANGE = 1000.0
"""An adaptive bound stays within this factor of the plan's clip, either way."""

# Far above the rounding error of a computed norm: 2**-53 for each of up to ten million squares.
_MARGIN = 1e-9


def norm_of(update: NDArray[np.floating]) -> float:
    """Return the L2 norm in float64, without overflow or underflow of the squares."""
    values = update.astype(np.float64)
    peak = float(np.abs(values).max(initial=0.0))
    if peak == 0 or not math.isfinite(peak):
        return peak
    return peak * l2_norm(values / peak)


def is_within(update: NDArray[np.floating], clip: float) -> bool:
    """Return whether :func:`clipped` leaves ``update`` as it is."""
    return norm_of(update) * (1 + _MARGIN) <= clip


def clipped(update: NDArray[np.floating], clip: float) -> Floats:
    """Return ``update`` with an L2 norm of at most ``clip``, float64 of the same shape.

    Guarantee: the norm of what is returned is at most ``clip`` in exact arithmetic, for every
    input, whatever a client or a codec made of it:

    ============================  =======================================================
    input                         returned
    ============================  =======================================================
    norm <= clip                  the input itself (within one part in 10^9 of the bound it
                                  counts as above it)
    norm > clip                   the input scaled to a norm one part in 10^9 below ``clip``
    all zeros, or empty           zeros
    a value is NaN or infinite    zeros
    ============================  =======================================================

    Raises:
        PrivacyError: If ``clip`` is not finite and above zero.
    """
    if not 0 < clip < math.inf:
        raise PrivacyError(f"clip={clip}: must be finite and > 0")
    values = update.astype(np.float64)
    norm = norm_of(values)
    if not math.isfinite(norm):
        finite = bool(np.isfinite(values).all())
        return clipped(values * 2.0**-64, clip) if finite else np.zeros_like(values)
    if norm * (1 + _MARGIN) <= clip:
        return values
    # The division first: clip / norm may be too small for a float where the result is not.
    return values / norm * (clip / (1 + _MARGIN))


def finite(update: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return ``update``, or zeros of its shape if any of its values is NaN or infinite."""
    return update if bool(np.isfinite(update).all()) else np.zeros_like(update)


def with_bit(encoded: bytes, inside: bool) -> bytes:
    """Return an encoded update behind one byte that tells whether it was within the bound."""
    return bytes([inside]) + encoded


def split_bit(payload: bytes) -> tuple[bool, bytes]:
    """Return what :func:`with_bit` put together.

    Raises:
        PayloadError: If the first byte is not 0 or 1: a larger vote would break the sensitivity.
    """
    if payload[:1] not in (b"\0", b"\1"):
        raise PayloadError("the update does not begin with the bit of an adaptive bound")
    return payload[0] == 1, payload[1:]


def noised_sum(total: Floats, clip: float, multiplier: float, stream: Stream) -> Floats:
    """Return ``total`` plus N(0, (multiplier * clip)^2) in every coordinate, drawn once.

    ``total`` is a sum of vectors that :func:`clipped` bounded by ``clip``; it may be a sum of none.
    """
    return total + multiplier * clip * stream.normal(len(total))


def noised_fraction(inside: int, replies: int, clients: int, noise: float, stream: Stream) -> float:
    """Return a noised fraction of the clients whose updates were within the bound.

    Each reply counts as its bit minus one half, so that one client moves the count by at most one
    half (Andrew et al. 2021, section 2.2); a client that did not reply counts as zero. The
    denominator is public, as in the sum. The result is not clamped: it may lie outside [0, 1].

    Args:
        inside: Replies that were within the bound.
        replies: All replies.
        clients: Clients of a round, the public denominator.
        noise: Standard deviation of the noise of the count.
        stream: Randomness of this round's count alone.
    """
    centred = inside - replies / 2
    return 0.5 + (centred + noise * float(stream.normal(1)[0])) / clients


def sum_multiplier(noise_multiplier: float, count_noise: float | None) -> float:
    """Return the noise multiplier of the sum, so that sum and count together have the given one.

    ``z = (noise_multiplier^-2 - (2 count_noise)^-2)^(-1/2)`` (Andrew et al. 2021, theorem 1): the
    count is a Gaussian mechanism of multiplier ``2 count_noise``, and the two together are one of
    multiplier ``noise_multiplier``. Without a count the sum has all of it.

    Raises:
        PlanError: If the count alone reveals more than ``noise_multiplier`` allows.
    """
    if count_noise is None:
        return noise_multiplier
    # By their ratio, and without powers: any finite multiplier may be asked for, 1e-200 or 1e300.
    ratio = noise_multiplier / (2 * count_noise)
    left = 1 - ratio * ratio
    if left <= 0:
        needed = noise_multiplier / (2 * COUNT_NOISE) // 1 + 1
        raise PlanError(
            f"privacy.clip_quantile: the count of updates within the bound has noise of standard "
            f"deviation federation.clients_per_round / 20 = {count_noise:g}, which alone reveals "
            f"more than noise multiplier {noise_multiplier:.4g} allows; use at least "
            f"{needed:.15g} clients_per_round, a larger epsilon (a smaller noise_multiplier), or "
            "leave out clip_quantile for a fixed bound"
        )
    return noise_multiplier * left**-0.5


def client_event(
    noise_multiplier: float, relation: str, count_noise: float | None, rate: float = 1.0
) -> Event:
    """Return the event of one round for one client: a noised sum, and with it a noised count.

    With a ``rate`` below 1 the round is a secret Poisson sample of the clients. Sum and count are
    taken over the *same* sample, so together they are one event of the whole multiplier
    (:func:`.on_one_sample`), not two.

    Raises:
        PlanError: If an adaptive bound's count alone reveals more than the multiplier allows.
    """
    z = sum_multiplier(noise_multiplier, count_noise)
    update = PoissonGaussian(rate, z, 1, relation, "client")
    if count_noise is None:
        return update
    count = PoissonGaussian(rate, 2 * count_noise, 1, relation, "client")
    return Composed((update, count)) if rate == 1 else on_one_sample([update, count])


@dataclass(frozen=True)
class ClipRule:
    """How the bound moves from round to round; everything here is a public constant.

    Attributes:
        start: The bound of the first round.
        quantile: Fraction of the clients' norms that the bound follows; None for a fixed bound.
        rate: Learning rate of the geometric update.
    """

    start: float
    quantile: float | None = None
    rate: float = CLIP_RATE

    def allows(self, clip: float) -> bool:
        """Return whether a round may have this bound."""
        if self.quantile is None:
            return clip == self.start
        return self.start / CLIP_RANGE <= clip <= self.start * CLIP_RANGE

    def next(self, clip: float, fraction: float) -> float:
        """Return the next round's bound: ``clip * exp(-rate * (fraction - quantile))``, clamped.

        ``fraction`` is the *noised* fraction of updates that were within ``clip``, so bounds are
        post-processing of what was released and accounted. Where more updates than the quantile
        are within the bound it falls; where fewer are, it rises (Andrew et al. 2021, section 2.1).
        """
        if self.quantile is None:
            return clip
        # A factor of e a round is far beyond what an honest count gives; it keeps exp() finite.
        exponent = min(1.0, max(-1.0, -self.rate * (fraction - self.quantile)))
        moved = clip * math.exp(exponent)
        return min(self.start * CLIP_RANGE, max(self.start / CLIP_RANGE, moved))
