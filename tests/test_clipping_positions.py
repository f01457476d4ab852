"""Terms of layers used at many positions: as their gradients written out, without these."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reticent.privacy.clipping.bounds import Bounds
from reticent.privacy.clipping.positions import LookedUp, Positions
from reticent.privacy.clipping.terms import Owners, Rows, Term


def same(term: Term, written: Rows, seed: int, masked: tuple[int, ...] | None) -> None:
    """Check both halves of a term against rows."""
    draws = torch.Generator().manual_seed(seed)
    n = len(written.values)
    mask = None if masked is None else (torch.rand(masked, generator=draws) < 0.5).float()
    torch.testing.assert_close(term.squares(mask), written.squares(mask), rtol=2e-5, atol=1e-9)
    kept = (torch.rand(n, generator=draws) < 0.7).nonzero().flatten()
    for which in (None, kept):
        count = n if which is None else len(which)
        factors = torch.rand(count, generator=draws)
        owners = Owners((0, count // 2, count // 2, count))
        before = torch.randn(3, written.values.shape[1] + 2, generator=draws)
        found, expected = before.clone(), before.clone()
        term.add_weighted(found[:, 1:-1], which, factors, owners)
        written.add_weighted(expected[:, 1:-1], which, factors, owners)
        torch.testing.assert_close(found, expected)
        assert torch.equal(found[:, [0, -1]], before[:, [0, -1]])
        if which is None:  # and against a plain loop
            for row, was, span in zip(found[:, 1:-1], before[:, 1:-1], owners.spans, strict=True):
                sums = (factors[span, None] * written.values[span]).sum(dim=0)
                torch.testing.assert_close(row, was + sums, rtol=2e-5, atol=2e-5)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 5),
    positions=st.sampled_from([1, 2, 5]),
    sizes=st.sampled_from([(3, 4), (8, 8), (40, 41), (1, 1)]),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_gradients_at_positions_are_those_written_out(
    n: int, positions: int, sizes: tuple[int, int], masked: bool, seed: int
) -> None:
    draws = torch.Generator().manual_seed(seed)
    back = torch.randn(n, positions, sizes[0], generator=draws)
    inputs = torch.randn(n, positions, sizes[1], generator=draws)
    term = Positions(back, inputs)
    assert term.short == (64 * positions**2 <= sizes[0] * sizes[1])
    written = Rows(torch.einsum("nto,nti->noi", back, inputs).flatten(1))
    same(term, written, seed, sizes if masked else None)
    assert ("rows" in vars(term)) == (masked or not term.short)


@pytest.mark.parametrize("large", [1e3, 1e6, 1e9, 1e15])
def test_positions_that_cancel_do_not_break_the_bound(large: float) -> None:
    """What float32 leaves of a gradient whose positions cancel is within the bound too."""
    draws = torch.Generator().manual_seed(0)
    first = torch.randn(50, 1, 32, generator=draws) * large
    inputs = torch.randn(50, 1, 32, generator=draws)
    noise = 1e-7 * large * torch.randn(50, 1, 32, generator=draws)
    term = Positions(torch.cat([first, -first + noise], dim=1), torch.cat([inputs, inputs], dim=1))
    assert term.short
    bounds = Bounds("flat", torch.ones(1).double().numpy())
    kept, factors = bounds.factors(term.squares(None)[:, None], 1.0)
    assert kept is None
    owners = Owners(tuple(range(51)))
    alone = torch.zeros(50, 32 * 32)
    term.add_weighted(alone, None, factors[:, 0], owners)
    norms = alone.double().norm(dim=1)
    exact = (noise.double().norm(dim=2) * inputs.double().norm(dim=2)).flatten()
    assert norms.max() <= 1 + 1e-5
    assert (norms >= 0.1 * exact.clamp(max=1)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e19])
@pytest.mark.parametrize("positions", [1, 9])
def test_an_example_with_anything_non_finite_has_no_norm(bad: float, positions: int) -> None:
    back, inputs = torch.ones(3, positions, 8), torch.full((3, positions, 8), 1.0)
    for values in (back, inputs):
        spoilt = values.clone()
        spoilt[1, 0, 0] = bad
        term = Positions(spoilt, inputs) if values is back else Positions(back, spoilt)
        assert term.short == (positions == 1)
        found = term.squares(None)
        assert not found[1] <= 1e36
        assert found[[0, 2]].tolist() == pytest.approx([64 * positions**2] * 2, rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 5),
    positions=st.integers(1, 6),
    size=st.integers(1, 5),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_gradients_of_a_table_are_those_written_out(
    n: int, positions: int, size: int, masked: bool, seed: int
) -> None:
    draws = torch.Generator().manual_seed(seed)
    back = torch.randn(n, positions, 3, generator=draws)
    codes = torch.randint(0, size, (n, positions), generator=draws)
    dense = torch.zeros(n, size, 3)
    for one in range(n):
        for place in range(positions):
            dense[one, codes[one, place]] += back[one, place]
    same(LookedUp(back, codes, size), Rows(dense.flatten(1)), seed, (size, 3) if masked else None)


def test_a_row_that_is_looked_up_twice_is_added_before_it_is_squared() -> None:
    term = LookedUp(torch.ones(1, 2, 1), torch.zeros(1, 2, dtype=torch.int64), 3)
    assert term.squares(None).tolist() == [4.0]
    other = LookedUp(torch.ones(1, 2, 1), torch.tensor([[0, 1]]), 3)
    assert other.squares(None).tolist() == [2.0]
