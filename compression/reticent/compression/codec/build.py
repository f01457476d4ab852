"""From the names in a plan to a codec."""

from __future__ import annotations

import difflib

from reticent.core.errors import PlanError

from .base import Quantizer
from .codec import Codec
from .dither import SubtractiveDither
from .entropy import ANS, PLAIN, ZSTD, Entropy
from .plain import Identity, TopK
from .rounding import StochasticInt

QUANTIZERS: dict[str, Quantizer] = {
    "identity": Identity(),
    "int8": StochasticInt(levels=127, code=1, alphabet=256),
    "int4": StochasticInt(levels=7, code=2, alphabet=16),
    "topk": TopK(),
    "dither8": SubtractiveDither(levels=127, code=4, alphabet=256),
    "dither4": SubtractiveDither(levels=7, code=5, alphabet=16),
}
ENTROPIES: dict[str, Entropy] = {"ans": ANS, "zstd": ZSTD}


def build_codec(names: tuple[str, ...]) -> Codec:
    """Return the codec of ``names``: a quantizer, then at most one entropy stage.

    Quantizers are ``identity``, ``int8``, ``int4``, ``dither8``, ``dither4`` and ``topk``, which
    takes the fraction to keep as ``topk:0.1`` (the default). Entropy stages are ``ans`` and
    ``zstd``; a second one is refused, because it would find nothing left to remove.

    >>> build_codec(("dither4", "ans")).error
    'independent'

    Raises:
        PlanError: If a name is unknown or the order is not quantizer, entropy stage.
    """
    shown = f"codec={list(names)}"
    for name in names:
        _known(name, shown)
    first = names[0] if names else "nothing"
    if first.partition(":")[0] not in QUANTIZERS:
        raise PlanError(f"{shown}: must start with one of {', '.join(QUANTIZERS)}")
    if len(names) > 2 or any(name not in ENTROPIES for name in names[1:]):
        raise PlanError(
            f"{shown}: must be one quantizer and at most one of {', '.join(ENTROPIES)} after it"
        )
    entropy = ENTROPIES[names[1]] if len(names) == 2 else PLAIN
    return Codec(tuple(names), _quantizer(first, shown), entropy)


def _known(name: str, shown: str) -> None:
    stem = name.partition(":")[0]
    known = [*QUANTIZERS, *ENTROPIES]
    if stem not in known:
        close = difflib.get_close_matches(stem, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known stages: {', '.join(known)}"
        raise PlanError(f"{shown}: unknown stage {name!r} ({hint})")
    if stem != name and stem != "topk":
        raise PlanError(f"{shown}: {name!r}: only topk takes a parameter, as in topk:0.1")


def _quantizer(name: str, shown: str) -> Quantizer:
    stem, colon, text = name.partition(":")
    return TopK(_fraction(text, shown)) if colon else QUANTIZERS[stem]


def _fraction(text: str, shown: str) -> float:
    try:
        fraction = float(text)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise PlanError(f"{shown}: topk:{text}: must be a fraction above 0 and at most 1")
    return fraction
