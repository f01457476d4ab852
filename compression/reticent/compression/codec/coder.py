"""Which coder of asymmetric numeral systems is used: both give the same words and indices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import rans
from .histogram import Probabilities
from .rans import Indices, Words


@dataclass(frozen=True)
class Coder:
    """A coder of asymmetric numeral systems (Duda 2013).

    Attributes:
        name: What it is.
        push: ``(indices, probabilities) -> words``, as :func:`.rans.push`.
        pop: ``(words, count, probabilities) -> (indices, used up)``, as :func:`.rans.pop`.
    """

    name: str
    push: Callable[[Indices, Probabilities], Words]
    pop: Callable[[Words, int, Probabilities], tuple[Indices, bool]]


def constriction_coder() -> Coder | None:
    """Return the coder in Rust, or None where constriction cannot be imported."""
    try:
        import constriction
    except ImportError:
        return None
    stream: Any = constriction.stream  # pyright: ignore[reportAttributeAccessIssue]

    def model(probabilities: Probabilities) -> Any:
        return stream.model.Categorical(probabilities, perfect=False)

    def push(indices: Indices, probabilities: Probabilities) -> Words:
        coder = stream.stack.AnsCoder()
        coder.encode_reverse(indices, model(probabilities))
        return coder.get_compressed()

    def pop(words: Words, count: int, probabilities: Probabilities) -> tuple[Indices, bool]:
        coder = stream.stack.AnsCoder(words)
        return coder.decode(model(probabilities), count), coder.is_empty()

    return Coder("constriction", push, pop)


PYTHON = Coder("python", rans.push, rans.pop)
CODER = constriction_coder() or PYTHON
