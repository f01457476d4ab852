"""Gradients of single examples of layers that are used at many positions of each example."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from .bounds import LIMIT
from .terms import Owners, Rows, add_kernels, add_products

GRAM_SHARE = 64
"""Norms come from Gram matrices where this many times positions^2 is at most the weight's size.

The field's rule, 2 positions^2 < inputs * outputs (Li et al. 2022, "Large language models can be
strong differentially private learners", section 4; Bu et al. 2022, "Scalable and efficient training
of large convolutional neural networks with differential privacy", section 3), counts memory. Here
time decides: a gradient that is written out serves the norm and the sum, and Gram matrices are
taken in float64. Measured for 2 to 784 positions and weights of 9x16 to 1152x128: level at about 32
(``benchmarks/paths.py``).
"""

_AT_ONCE = 2**21
"""Numbers that are taken in float64 at once: 16 MB."""


def shorter(positions: int, inputs: int, outputs: int) -> bool:
    """Return whether Gram matrices are cheaper than gradients of a weight of these sizes."""
    return GRAM_SHARE * positions**2 <= inputs * outputs


@dataclass(frozen=True)
class Positions:
    """Gradients of a linear layer's weight that is used at every position of each example.

    The gradient of one example is G = sum_t g_t a_tT. Its squared norm is the sum over s and t of
    (g_s . g_t)(a_s . a_t), two Gram matrices; or G is written out, whichever is cheaper by the
    sizes (:data:`GRAM_SHARE`), and always under a mask, for which there is no such form.

    Positions may cancel, and a norm must not come out shorter than what is summed. So the Gram
    matrices are float64, and what float32 may round off in the sum is added to the norm: at most
    positions + 1 times 2^-24 of the sum of |g_t| |a_t|.

    A convolution's weight is one, too, of which the columns of its input take the part of g, and
    the gradients of its output that of a.

    Attributes:
        back: Gradients of the layer's output, g, float32 ``(n, positions, outputs)``.
        inputs: The layer's input, a, float32 ``(n, positions, inputs)``.
        shape: Of a convolution's weight, as :class:`~.terms.Rows` has it.
    """

    back: torch.Tensor
    inputs: torch.Tensor
    shape: tuple[int, ...] | None = None

    @property
    def short(self) -> bool:
        """Whether Gram matrices are cheaper than the gradients."""
        return shorter(self.back.shape[1], self.inputs.shape[2], self.back.shape[2])

    @cached_property
    def rows(self) -> Rows:
        """The gradients, written out."""
        return Rows((self.back.transpose(1, 2) @ self.inputs).flatten(1), self.shape)

    def squares(self, mask: torch.Tensor | None) -> torch.Tensor:
        """See :class:`~.terms.Term`; from Gram matrices, also infinite where a factor is."""
        if mask is not None or not self.short:
            return self.rows.squares(mask)
        step = max(1, _AT_ONCE // (self.back[0].numel() + self.inputs[0].numel()))
        parts = zip(self.back.split(step), self.inputs.split(step), strict=True)
        return torch.cat([_squares(back, inputs) for back, inputs in parts])

    def add_weighted(
        self,
        total: torch.Tensor,
        kept: torch.Tensor | None,
        factors: torch.Tensor,
        owners: Owners,
    ) -> None:
        """See :class:`~.terms.Term`."""
        if "rows" in vars(self):
            self.rows.add_weighted(total, kept, factors, owners)
            return
        back, inputs = self.back, self.inputs
        if kept is not None:
            back, inputs = back[kept], inputs[kept]
        if inputs.shape[2] < back.shape[2]:
            inputs = factors[:, None, None] * inputs
        else:
            back = factors[:, None, None] * back
        places = Owners(tuple(back.shape[1] * end for end in owners.ends))
        if self.shape is None:
            add_products(total, back.flatten(0, 1), inputs.flatten(0, 1), places)
            return
        sums = total.new_zeros(total.shape)
        add_products(sums, back.flatten(0, 1), inputs.flatten(0, 1), places)
        add_kernels(total, sums, self.shape)


def _squares(back: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Return bounds on the squared norms of some examples, float64 ``(n,)``, from Gram matrices."""
    g, a = back.double(), inputs.double()
    products = (g @ g.transpose(1, 2)) * (a @ a.transpose(1, 2))
    # Rounding can leave less than nothing of a sum that is zero.
    norms = products.sum(dim=(1, 2)).clamp(min=0).sqrt()
    apart = products.diagonal(dim1=1, dim2=2).sqrt().sum(dim=1)
    norms += (g.shape[1] + 1) * 2.0**-24 * apart
    largest = torch.maximum(back.abs().amax(dim=(1, 2)), inputs.abs().amax(dim=(1, 2)))
    return torch.where(largest <= LIMIT, norms.square(), torch.inf)


@dataclass(frozen=True)
class LookedUp:
    """Gradients of a table of which each example looks up some rows, the others never written out.

    The gradient of one row is the sum over the positions that looked it up: they are added before
    they are squared.

    Attributes:
        back: Gradients of what was looked up, float32 ``(n, positions, width)``.
        codes: Which rows were looked up, int64 ``(n, positions)``.
        size: Rows of the table.
    """

    back: torch.Tensor
    codes: torch.Tensor
    size: int

    @cached_property
    def sums(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Every row that an example looked up: the example, the row, and its gradient."""
        examples = torch.arange(len(self.codes))[:, None]
        pairs, where = torch.unique(examples * self.size + self.codes, return_inverse=True)
        sums = self.back.new_zeros(len(pairs), self.back.shape[2])
        sums.index_add_(0, where.flatten(), self.back.flatten(0, 1))
        return pairs // self.size, pairs % self.size, sums

    def squares(self, mask: torch.Tensor | None) -> torch.Tensor:
        """See :class:`~.terms.Term`."""
        examples, codes, sums = self.sums
        values = sums if mask is None else sums * mask[codes]
        found = torch.zeros(len(self.codes), dtype=torch.float64)
        return found.index_add_(0, examples, values.double().square().sum(dim=1))

    def add_weighted(
        self,
        total: torch.Tensor,
        kept: torch.Tensor | None,
        factors: torch.Tensor,
        owners: Owners,
    ) -> None:
        """See :class:`~.terms.Term`."""
        examples, codes, sums = self.sums
        if kept is not None:
            place = torch.full((len(self.codes),), -1)
            place[kept] = torch.arange(len(kept))
            examples = place[examples]
            chosen = examples >= 0
            examples, codes, sums = examples[chosen], codes[chosen], sums[chosen]
        lengths = torch.tensor([span.stop - span.start for span in owners.spans])
        owner = torch.arange(len(lengths)).repeat_interleave(lengths)
        found = sums.new_zeros(len(lengths) * self.size, sums.shape[1])
        found.index_add_(0, owner[examples] * self.size + codes, factors[examples, None] * sums)
        total += found.view(len(lengths), -1)
