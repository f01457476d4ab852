"""The server's arithmetic: against torch's optimizers, and independent of order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reticent.core.plan import Optimizer
from reticent.server.optimizer import Accumulator, ServerState, apply_round


@pytest.mark.parametrize(
    ("section", "make"),
    [
        (
            Optimizer(kind="sgd", learning_rate=0.3, momentum=0.9),
            lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),
        ),
        (
            Optimizer(kind="sgd", learning_rate=0.3, momentum=0.0),
            lambda p: torch.optim.SGD(p, lr=0.3),
        ),
        (
            Optimizer(kind="adam", learning_rate=0.01, momentum=0.9),
            lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.99), eps=1e-8),
        ),
        (
            Optimizer(kind="adam", momentum=0.5, second_momentum=0.9, adaptivity=0.1),
            lambda p: torch.optim.Adam(p, lr=0.004, betas=(0.5, 0.9), eps=0.1),
        ),
        (
            Optimizer(kind="adagrad", learning_rate=0.1, momentum=0.0, adaptivity=0.01),
            lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=1e-4, eps=0.01),
        ),
    ],
)
def test_steps_are_those_of_torch(section: Optimizer, make: object) -> None:
    generator = np.random.default_rng(0)
    weights = generator.standard_normal(50).astype(np.float32)
    parameter = torch.nn.Parameter(torch.from_numpy(weights.copy()))
    optimizer = make([parameter])  # type: ignore[operator]
    state = ServerState.begin(weights)
    for _ in range(20):
        gradient = generator.standard_normal(50)
        parameter.grad = torch.from_numpy(gradient.astype(np.float32))
        optimizer.step()
        state = apply_round(state, gradient, section, decay=0.0)
    np.testing.assert_allclose(state.weights, parameter.detach().numpy(), atol=2e-5)
    assert state.round == 20
    assert (state.average == state.weights).all()


@pytest.mark.parametrize("kind", ["adagrad", "yogi"])
def test_steps_are_those_of_reddi_et_al(kind: str) -> None:
    """Algorithm 2 of the paper, written out; its x moves by +delta, ours by -gradient."""
    rate, beta, beta2, tau = 0.03, 0.8, 0.95, 1e-3
    given = {} if kind == "adagrad" else {"second_momentum": beta2}
    section = Optimizer(kind=kind, learning_rate=rate, momentum=beta, adaptivity=tau, **given)
    generator = np.random.default_rng(3)
    x = generator.standard_normal(50)
    state = ServerState.begin(x.astype(np.float32))
    m, v, scale = np.zeros(50), np.full(50, tau**2), 10.0 ** generator.integers(-4, 2, 50)
    for _ in range(30):
        delta = scale * generator.standard_normal(50)
        m = beta * m + (1 - beta) * delta
        v = (
            v + delta**2
            if kind == "adagrad"
            else v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
        )
        x = x + rate * m / (np.sqrt(v) + tau)
        state = apply_round(state, -delta, section, decay=0.0)
    np.testing.assert_allclose(state.weights, x, atol=1e-5)
    np.testing.assert_allclose(state.second, v, rtol=1e-12)
    other = apply_round(ServerState.begin(state.weights), delta, section, decay=0.0)
    assert abs(other.second - tau**2).max() > 0, "the second moment starts at tau squared and moves"


def test_the_average_follows_the_models() -> None:
    state = ServerState.begin(np.zeros(3, dtype=np.float32))
    section = Optimizer(kind="sgd", learning_rate=1.0, momentum=0.0)
    for _ in range(200):
        state = apply_round(state, np.full(3, -0.01), section, decay=0.9)
    assert state.weights == pytest.approx(2.0, rel=1e-4)
    # An average with decay 0.9 of a line trails it by 9 steps.
    assert state.average == pytest.approx(2.0 - 0.09, rel=1e-3)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 40), st.integers(0, 10_000))
def test_the_sum_does_not_depend_on_the_order_of_replies(count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    scales = 10.0 ** generator.integers(-12, 6, (count, 1))
    vectors = (generator.standard_normal((count, 30)) * scales).astype(np.float32)
    sums = []
    for order in (np.arange(count), generator.permutation(count)):
        accumulator = Accumulator(30)
        for index in order:
            accumulator.add(vectors[index])
        sums.append(accumulator.mean())
    assert (sums[0] == sums[1]).all()


def test_a_plain_sum_does_depend_on_the_order() -> None:
    """What the accumulator is for is not a matter of course."""
    generator = np.random.default_rng(0)
    scales = 10.0 ** generator.integers(-12, 6, (200, 1))
    vectors = generator.standard_normal((200, 30)) * scales
    assert (vectors.cumsum(0)[-1] != vectors[::-1].cumsum(0)[-1]).any()


def test_the_accumulator_is_exact_where_floats_are_not() -> None:
    accumulator = Accumulator(1)
    for value in (1e8, 1e-8, -1e8):
        accumulator.add(np.array([value], dtype=np.float32))
    assert accumulator.mean()[0] == float(np.float32(1e-8)) / 3
