"""From the names in a plan to a codec."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from reticent.core.errors import PlanError
from reticent.core.update import Layout

from .base import Quantizer
from .codec import Codec
from .dither import BlockDither, SubtractiveDither
from .entropy import ANS, PLAIN, ZSTD, Entropy
from .grid import levels_of
from .hadamard import Rotated
from .lloyd import NormalLevels
from .low_rank import LowRank
from .plain import Identity, TopK
from .random_k import RandomK
from .rounding import SharedInt, StochasticInt
from .sign import ScaledSign

_INT_CODES = {1: 6, 2: 7, 3: 8, 4: 2, 5: 9, 6: 10, 7: 11, 8: 1}
_DITHER_CODES = {1: 24, 2: 12, 3: 13, 4: 5, 5: 14, 6: 15, 7: 16, 8: 4}


def _shared_dither(bits: int) -> SubtractiveDither:
    return SubtractiveDither(levels_of(bits), _DITHER_CODES[bits], 2**bits)


QUANTIZERS: dict[str, Quantizer] = {
    "identity": Identity(),
    **{f"int{b}": StochasticInt(levels_of(b), code, 2**b) for b, code in _INT_CODES.items()},
    **{
        f"int{b}:shared": SharedInt(levels_of(b), _INT_CODES[b], 2**b)
        for b in _INT_CODES
        if b > 1  # of two symbols, none would be left to announce a value outside
    },
    **{f"dither{b}": _shared_dither(b) for b in _DITHER_CODES if b > 1},
    **{f"dither{b}:blocks": BlockDither(code, 2**b) for b, code in _DITHER_CODES.items()},
    "sign": ScaledSign(),
    "drive": Rotated(NormalLevels(bits=1, code=20)),
    **{f"eden{b}": Rotated(NormalLevels(bits=b, code=19 + b)) for b in (2, 3, 4)},
}
"""Quantizers without a parameter, by name."""

PARAMETERS = {"topk": "0.1", "randk": "0.1", "lowrank": "2"}
"""Quantizers with a parameter, and the one they have when none is given."""

ENTROPIES: dict[str, Entropy] = {"ans": ANS, "zstd": ZSTD}

_ROTATION = "hadamard"
_KNOWN = (_ROTATION, *QUANTIZERS, *PARAMETERS, *ENTROPIES)


def build_codec(names: tuple[str, ...], layout: Layout | None = None) -> Codec:
    """Return the codec of ``names``: a quantizer, then at most one entropy stage.

    Quantizers are ``identity``; ``int1`` to ``int8`` (one scale per parameter) and ``int2:shared``
    to ``int8:shared`` (one step); ``dither2`` to ``dither8`` (one step) and ``dither1:blocks`` to
    ``dither8:blocks``; ``sign``; ``drive``; ``eden2`` to ``eden4``; and, with a parameter,
    ``topk:0.1`` and ``randk:0.1`` (the fraction to keep) and ``lowrank:2`` (the rank). ``hadamard``
    before an ``int`` or a ``dither`` rotates the vector first. Entropy stages are ``ans`` and
    ``zstd``; a second one is refused, because it would find nothing left to remove.

    Args:
        names: The stages.
        layout: Shapes of the parameters; only ``lowrank`` uses them. Without one, a ``lowrank``
            codec can be asked about its properties but takes empty vectors only.

    >>> build_codec(("dither4", "ans")).error
    'independent'

    Raises:
        PlanError: If a name is unknown or the order is not quantizer, entropy stage.
    """
    shown = f"codec={list(names)}"
    for name in names:
        _known(name, shown)
    rotated = names[:1] == (_ROTATION,)
    first, *rest = names[rotated:] or ("nothing",)
    if first in (*ENTROPIES, _ROTATION, "nothing"):
        raise PlanError(
            f"{shown}: must start with one of {', '.join((*QUANTIZERS, *PARAMETERS))}, or with "
            "hadamard and then an int or a dither"
        )
    if len(rest) > 1 or any(name not in ENTROPIES for name in rest):
        raise PlanError(
            f"{shown}: must be one quantizer and at most one of {', '.join(ENTROPIES)} after it"
        )
    quantizer = _quantizer(first, shown, layout or Layout((), ()))
    if rotated:
        quantizer = _rotated(quantizer, first, shown)
    return Codec(tuple(names), quantizer, ENTROPIES[rest[0]] if rest else PLAIN)


def _known(name: str, shown: str) -> None:
    stem = name.partition(":")[0]
    if name in _KNOWN or stem in PARAMETERS:
        return
    if stem in _KNOWN and stem != name:
        raise PlanError(f"{shown}: {name!r}: {stem} takes no such parameter")
    close = difflib.get_close_matches(name, _KNOWN, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known stages: {', '.join(_KNOWN)}"
    raise PlanError(f"{shown}: unknown stage {name!r} ({hint})")


def _rotated(quantizer: Quantizer, name: str, shown: str) -> Rotated:
    if not name.startswith(("int", "dither")):
        raise PlanError(
            f"{shown}: hadamard must come before an int or a dither: {name} gains nothing by it, "
            "or rotates by itself"
        )
    return Rotated(quantizer)


def _quantizer(name: str, shown: str, layout: Layout) -> Quantizer:
    if name in QUANTIZERS:
        return QUANTIZERS[name]
    stem, colon, text = name.partition(":")
    makers: dict[str, Callable[[str], Quantizer]] = {
        "topk": lambda text: TopK(_fraction(stem, text, shown)),
        "randk": lambda text: RandomK(_fraction(stem, text, shown)),
        "lowrank": lambda text: LowRank(_rank(text, shown), layout),
    }
    return makers[stem](text if colon else PARAMETERS[stem])


def _fraction(stem: str, text: str, shown: str) -> float:
    try:
        fraction = float(text) if text.isascii() else 0.0
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise PlanError(f"{shown}: {stem}:{text}: must be a fraction above 0 and at most 1")
    return fraction


def _rank(text: str, shown: str) -> int:
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text[:6]) <= 4096:
        raise PlanError(f"{shown}: lowrank:{text}: must be a whole number from 1 to 4096")
    return int(text[:6])
