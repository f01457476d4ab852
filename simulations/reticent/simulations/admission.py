"""Which codecs a plan may use under which trust, and on which engine."""

from __future__ import annotations

from reticent.compression.codec import build_codec
from reticent.core.errors import PlanError
from reticent.core.plan import Plan

_FINE = {"identity", "int8", "int8:shared", "dither8", "dither8:blocks"}
"""Quantizers whose error is a small share of the update, whatever scale they take from it."""


def check_codecs(plan: Plan) -> None:
    """Refuse codecs that would break the plan's guarantee.

    Under ``local`` trust an update is private before it is encoded, so every codec is
    post-processing. Under ``aggregator`` trust only the *sum* of the noised shares is private: what
    is released is the sum of the encoded shares, and that is a function of the sum plus independent
    noise only if the codec's error is independent of the value for a reader of the models.

    With unit ``client`` every codec is admitted: the server bounds what it *decoded* and adds the
    noise afterwards, so encoding and decoding are part of what one client contributes.

    Raises:
        PlanError: If a codec is unknown, or not admitted under the plan's trust or with the plan's
            error feedback or control variates.
    """
    codec = build_codec(plan.updates.codec)
    build_codec(plan.updates.broadcast)
    if plan.updates.delta:
        build_codec(plan.updates.delta)
    if plan.updates.error_feedback and not codec.contracts:
        raise PlanError(
            f"updates.error_feedback=true: must be false with updates.codec="
            f"{list(plan.updates.codec)}: only a codec whose error is shorter than the update "
            "converges with it: topk, sign or lowrank; an unbiased codec needs no feedback"
        )
    privacy = plan.private
    fixed = privacy is not None and codec.error == "independent"
    if plan.federation.local.scaffold and not (fixed or _FINE & set(codec.names)):
        raise PlanError(
            f"federation.local.scaffold=true: must be false with updates.codec="
            f"{list(plan.updates.codec)}: its error grows with the update, and control variates "
            "feed it back into the next one; use identity or 8 bits"
            + (" or, with one public step, dither2 to dither8" if privacy else "")
        )
    if privacy is None or privacy.trust != "aggregator" or codec.error != "dependent":
        return
    if privacy.unit == "client":
        return
    raise PlanError(
        f"updates.codec={list(plan.updates.codec)}: not admitted when privacy.trust is "
        '"aggregator": its error depends on the value it encodes, so a sum of encoded noise shares '
        "is not a function of the sum of the shares and the Gaussian guarantee does not hold for "
        'it; use a subtractive dither such as ["dither4", "ans"] or ["identity"], or '
        'privacy.trust="local"'
    )


def check_engine(plan: Plan) -> None:
    """Refuse an engine on which a client would not find what it kept.

    Raises:
        PlanError: If clients keep files and may be played on another machine next time.
    """
    local = plan.federation.local
    kept = {
        "updates.error_feedback": plan.updates.error_feedback,
        "federation.local.scaffold": local.scaffold,
        "federation.local.personal": bool(local.personal),
    }
    if plan.engine.kind == "ray" and any(kept.values()):
        keys = ", ".join(key for key, used in kept.items() if used)
        raise PlanError(
            f'engine.kind="ray": must be "inprocess" with {keys}: what clients keep between rounds '
            "lies in files, and a client may be played on another node next time"
        )
