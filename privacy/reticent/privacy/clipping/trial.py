"""A trial on random inputs, before any data are seen: are the gradients the examples' own?

It looks at a copy of the student whose weights are moved at random, so that a layer that begins at
zero hides nothing. No data are read, so what it finds may be told. A trial is no proof: a student
that does something else with larger batches or other inputs is not found out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from reticent.core.errors import DataError

from .graph import GraphGradients
from .terms import Owners, Term

EXAMPLES = 3
ROUNDING = 1e-3
"""Most of a tensor's gradient by which two ways to compute it may differ."""
SLACK = 1e-5
"""The same, of the whole gradient: some tensors' gradients are nothing but rounding."""
UNCHANGED = 1e-5
"""Most of a gradient that may change while another example changes: the rounding of products."""


class Gradients(Protocol):
    """What gives gradients of single examples."""

    def terms(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> Sequence[Term]:
        """Return the gradients of every parameter, in order."""
        ...


class NotFiniteError(ArithmeticError):
    """Random inputs say nothing about a student: its gradients at them are not finite."""


def require_finite(gradients: torch.Tensor) -> None:
    """Check what plain passes give.

    Raises:
        NotFiniteError: If it is not finite.
    """
    if not gradients.isfinite().all():
        raise NotFiniteError("its gradients at random inputs are not finite")


def misfit(model: nn.Module, shape: tuple[int, ...]) -> str | None:
    """Return why recorded gradients are not those of ``model``; None if they are.

    They are if every parameter is used once by autograd's record, and the gradients of the examples
    of one recorded pass are those that autograd gives for each example alone.

    Args:
        model: One that :func:`~.graph.unsuited` has nothing against.
        shape: Of one example.
    """
    problem = "it takes no random inputs"
    for inputs in draws(shape):
        try:
            with twin_of(model) as twin:
                return _misfit(twin.eval(), inputs[:EXAMPLES])
        except Exception as error:  # a student's own code may raise anything on such inputs
            problem = str(error) or type(error).__name__
    return problem


def require_unmixed(
    model: nn.Module, make: Callable[[nn.Module], Gradients], shape: tuple[int, ...]
) -> None:
    """Check that an example changes nothing in the gradients of the others, nor does its absence.

    Once it changes to another one, and once to NaN, which gets through the faintest mixing; then
    gradients of batches must be the sums of their examples'. A student that takes no random inputs
    is not looked at; it fails later, if it does.

    Args:
        model: The student, as it is trained: dropout draws the same each time.
        make: Makes of a copy of it what computes its gradients.
        shape: Of one example.

    Raises:
        DataError: If it does, or gradients of single examples cannot be had.
    """
    for inputs in draws(shape):
        tried = False
        for instead in (inputs[EXAMPLES], torch.full(shape, torch.nan)):
            try:
                with twin_of(model) as twin:
                    pair = _mixed(twin.train(), make(twin), inputs[:EXAMPLES], instead)
            except DataError:
                raise
            except Exception:  # a student's own code may raise anything on such inputs
                break
            if pair:
                raise DataError(
                    f"the student mixes examples: of {EXAMPLES} random ones, changing number "
                    f"{pair[0]} changes the gradient of number {pair[1]}; every layer must treat "
                    "each example of a batch on its own"
                )
            tried = True
        if tried:
            _require_additive(model, inputs[:EXAMPLES])
            return


def draws_numbers(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Return whether a student draws from torch's global generator in training.

    Of one that takes no random inputs it is supposed.

    Args:
        model: The student, without hooks.
        shape: Of one example.
    """
    for inputs in draws(shape):
        try:
            with twin_of(model) as twin:
                return _draws(twin.train(), inputs)
        except Exception:  # a student's own code may raise anything on such inputs
            continue
    return True


def _misfit(model: nn.Module, inputs: torch.Tensor) -> str | None:
    parameters = dict(model.named_parameters())
    uses = _uses(sum_of_squares(model(inputs)))
    for name, parameter in parameters.items():
        if uses.get(id(parameter)) != 1:
            return f"parameter {name} is used {uses.get(id(parameter), 0)} times, not once"
    terms = GraphGradients(model).terms(inputs, torch.zeros(len(inputs)), sum_of_squares)
    for one in range(len(inputs)):
        own = torch.autograd.grad(
            sum_of_squares(model(inputs[one : one + 1])), list(parameters.values())
        )
        whole = torch.stack([g.norm() for g in own]).norm()
        require_finite(whole)
        rows = _rows(terms, model, one)
        for name, found, expected in zip(parameters, rows, own, strict=True):
            apart = (found - expected.flatten()).norm()
            if not apart <= ROUNDING * expected.norm() + SLACK * whole:
                return f"the gradient of {name} is not that of a pass over one example alone"
    return None


def _mixed(
    model: nn.Module, gradients: Gradients, inputs: torch.Tensor, instead: torch.Tensor
) -> tuple[int, int] | None:
    before = _vectors(model, gradients, inputs)
    require_finite(torch.stack(before))
    for one in range(EXAMPLES):
        changed = inputs.clone()
        changed[one] = instead
        after = _vectors(model, gradients, changed)
        for other in set(range(EXAMPLES)) - {one}:
            was, now = before[other], after[other]
            if not (now - was).norm() <= UNCHANGED * was.norm():
                return one, other
    return None


def _require_additive(model: nn.Module, inputs: torch.Tensor) -> None:
    """Check that batches' gradients are the sums of their examples', whatever a batch's size is.

    As the student is trained, but for dropout. Of one that draws at other times, too, it is found
    out only whether it takes batches of all sizes.
    """
    with twin_of(model) as twin:
        try:
            drawn = _draws(twin.train(), inputs) and _draws(twin.eval(), inputs)
            alone = torch.stack([_gradient(twin, one[None]) for one in inputs])
            for count in range(2, len(inputs) + 1):
                apart = _gradient(twin, inputs[:count]) - alone[:count].sum(dim=0)
                if not drawn and not apart.norm() <= ROUNDING * alone.norm():
                    raise DataError(
                        f"gradients of {count} random examples are not the sum of each one's"
                    )
        except Exception as error:  # a student's own code may raise anything
            said = str(error) or type(error).__name__
            raise DataError(
                "the student depends on how many examples are in the batch, which gives away "
                f"whether one is there: {said}"
            ) from error


def _draws(model: nn.Module, inputs: torch.Tensor) -> bool:
    """Return whether a pass draws from torch's global generator."""
    before = torch.get_rng_state()
    model(inputs)
    return not torch.equal(before, torch.get_rng_state())


def _gradient(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    weights = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(sum_of_squares(model(inputs)), weights, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


def _vectors(model: nn.Module, gradients: Gradients, inputs: torch.Tensor) -> list[torch.Tensor]:
    torch.default_generator.manual_seed(0)  # torch.manual_seed would key every GPU, too
    terms = gradients.terms(inputs, torch.zeros(len(inputs)), sum_of_squares)
    return [torch.cat(_rows(terms, model, one)) for one in range(len(inputs))]


@torch.no_grad()
def _rows(terms: Sequence[Term], model: nn.Module, one: int) -> list[torch.Tensor]:
    """Return the gradient of example ``one``, a row for each parameter."""
    kept, owner = torch.tensor([one]), Owners((0, 1))
    found = [torch.zeros(1, parameter.numel()) for parameter in model.parameters()]
    for term, total in zip(terms, found, strict=True):
        term.add_weighted(total, kept, torch.ones(1), owner)
    return [row[0] for row in found]


def sum_of_squares(outputs: torch.Tensor, _: torch.Tensor | None = None) -> torch.Tensor:
    """A sum over examples, not linear, so that a change of an output changes its gradient."""
    flat = outputs.flatten(1)
    return (flat + torch.linspace(-1.0, 1.0, flat.shape[1], device=flat.device)).square().sum()


def draws(shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """Yield one example more than are tried at once: numbers, then codes for tables."""
    generator = torch.Generator().manual_seed(0)
    yield 2 * torch.randn((EXAMPLES + 1, *shape), generator=generator)
    yield torch.randint(0, 2, (EXAMPLES + 1, *shape), generator=generator).float()


@contextmanager
def twin_of(model: nn.Module) -> Iterator[nn.Module]:
    """Give a copy with other weights, and leave torch's generator as it was."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        twin = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(1)
        for parameter in twin.parameters():
            with torch.no_grad():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        yield twin


def _uses(total: torch.Tensor) -> dict[int, int]:
    """Return how often autograd's record uses each parameter, by the parameter's id."""
    uses: dict[int, int] = {}
    seen, ahead = {total.grad_fn}, [total.grad_fn]
    while ahead:
        node = ahead.pop()
        for following, _ in node.next_functions if node else ():
            if following is None:
                continue
            leaf = getattr(following, "variable", None)
            if leaf is not None:
                uses[id(leaf)] = uses.get(id(leaf), 0) + 1
            if following not in seen:
                seen.add(following)
                ahead.append(following)
    return uses
