"""The schedule, the optimizers at both ends, and how updates become one."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ..fleet import Buffered
from ..section import Count, Positive, Probability, Section, Share


class Optimizer(Section):
    """The server's optimizer over the averaged pseudo-gradient (Reddi et al. 2021).

    Attributes:
        kind: ``sgd`` with heavy-ball momentum, ``adam``, ``yogi`` or ``adagrad``.
        learning_rate: Step size.
        momentum: Of ``sgd``; beta1 of the others.
        second_momentum: beta2 of ``adam`` and ``yogi``.
        adaptivity: tau, what is added to the root of the second moment; not of ``sgd``.
    """

    kind: Literal["sgd", "adam", "yogi", "adagrad"] = "adam"
    learning_rate: Positive = 0.004
    momentum: Share = 0.9
    second_momentum: Share = 0.99
    adaptivity: Positive = 1e-8

    @model_validator(mode="after")
    def _moments_have_effect(self) -> Self:
        if self.kind in ("sgd", "adagrad") and self.second_momentum != 0.99:
            raise ValueError(
                f"second_momentum={self.second_momentum}: must be left out when kind is "
                f'"{self.kind}": only "adam" and "yogi" forget squared gradients'
            )
        if self.kind == "sgd" and self.adaptivity != 1e-8:
            raise ValueError(
                f'adaptivity={self.adaptivity}: must be left out when kind is "sgd", which divides '
                "by no second moment"
            )
        return self


class Local(Section):
    """What local steps do besides following the gradient, and which layers stay on the device.

    Attributes:
        proximal: mu of FedProx (Li et al. 2020): every local step adds ``mu * (w - w0)``, a pull
            back to the broadcast model.
        scaffold: Control variates (Karimireddy et al. 2020): every local step adds ``c - c_i``, the
            federation's mean gradient less the device's own, each as of its last round.
        personal: Layers, or parameters, that every device keeps and trains for itself and that
            never leave it (Arivazhagan et al. 2019).
    """

    proximal: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    scaffold: bool = False
    personal: tuple[str, ...] = ()

    @property
    def terms(self) -> int:
        """How many terms as long as a gradient a local step can have."""
        return 3 if self.scaffold else 1

    @model_validator(mode="after")
    def _one_remedy(self) -> Self:
        if self.proximal and self.scaffold:
            raise ValueError(
                f"proximal={self.proximal}: must be 0 when scaffold is true: the pull would be "
                "taken for the device's gradient in its control variate"
            )
        return self


class Robust(Section):
    """How the updates of a round become one, where some clients may send what they like.

    Guarantees and sources are those of :mod:`reticent.server.robust`.

    Attributes:
        kind: ``mean``: the plain average, which one client can move anywhere. ``trimmed-mean``: of
            every coordinate without its ``attackers`` largest and smallest values (Yin et al.
            2018). ``median``: of every coordinate. ``multi-krum``: the mean of the updates that are
            nearest to others (Blanchard et al. 2017).
        attackers: f, the most clients of a round that may send anything; of ``trimmed-mean`` and
            ``multi-krum``. A median takes whatever is less than half.
    """

    kind: Literal["mean", "trimmed-mean", "median", "multi-krum"] = "mean"
    attackers: Annotated[int, Field(ge=0)] = 0

    @property
    def fewest(self) -> int:
        """Fewest updates with which the rule holds what it promises."""
        return {"multi-krum": 2 * self.attackers + 3}.get(self.kind, 2 * self.attackers + 1)

    @model_validator(mode="after")
    def _attackers_have_effect(self) -> Self:
        counted = self.kind in ("trimmed-mean", "multi-krum")
        if counted and not self.attackers:
            raise ValueError(
                f'robust.attackers=0: must be at least 1 when robust.kind is "{self.kind}"'
            )
        if self.attackers and not counted:
            raise ValueError(
                f'robust.attackers={self.attackers}: must be left out when robust.kind is "'
                f'{self.kind}": only "trimmed-mean" and "multi-krum" depend on it'
            )
        return self


class Federation(Section):
    """The schedule. Everything here is a public constant.

    Attributes:
        rounds: Number of applied rounds.
        clients_per_round: Clients sampled uniformly without replacement in each round.
        min_replies: Fewest valid replies for a round to be applied; default nine tenths of
            ``clients_per_round``, rounded up. Under ``aggregator`` trust each client's noise share
            is sized for this number.
        enough: Replies at which a round is closed without waiting for more; default all that were
            asked. Asking more clients than this is over-selection: the slowest are left out.
        steps_per_round: Local steps of a client in a round; 1 under ``aggregator`` trust.
        sampling_rate: Poisson rate q at which each example joins a step's batch.
        learning_rate: Step size of the local steps (it has no effect on a single step).
        retries: How often a round with too few replies is asked again before the run ends.
        timeout: Seconds to wait for the replies of a round.
        eval_every: The server tests the model after every so many rounds, and after the last.
        server: The server's optimizer.
        local: What local steps do besides following the gradient.
        robust: How the updates of a round become one.
        average: Decay of an exponential moving average of the models (a function of released
            models, so it costs no privacy); the average is what is deployed. 0 deploys the last
            model.
        sampling: Who is asked: ``passes``: shuffled passes over all clients; ``fixed``:
            ``clients_per_round`` clients, drawn anew in each round; ``poisson``: each client by
            its own coin, ``clients_per_round`` of them on average.
        limit: With ``fixed`` and ``poisson``, most rounds of one client in any ``window`` rounds.
        window: The rounds that ``limit`` is about.
        buffered: Semi-asynchronous aggregation; absent: rounds are synchronous.
    """

    rounds: Count = 60
    clients_per_round: Count = 100
    min_replies: Count | None = None
    enough: Count | None = None
    steps_per_round: Count = 1
    sampling_rate: Probability = 0.1
    learning_rate: Positive = 0.5
    retries: Annotated[int, Field(ge=0)] = 2
    timeout: Positive = 600.0
    eval_every: Count = 5
    server: Optimizer = Optimizer()
    local: Local = Local()
    robust: Robust = Robust()
    average: Annotated[float, Field(ge=0, lt=1)] = 0.9
    sampling: Literal["passes", "fixed", "poisson"] = "passes"
    limit: Count | None = None
    window: Count = 1
    buffered: Buffered | None = None

    @property
    def quorum(self) -> int:
        """Fewest valid replies for a round to be applied; a Poisson cohort may even be empty."""
        if self.sampling == "poisson":
            return 0
        return self.min_replies or -(-9 * self.clients_per_round // 10)

    @property
    def wanted(self) -> int:
        """Replies at which a round closes without waiting for more."""
        return self.enough or self.clients_per_round

    @model_validator(mode="after")
    def _robust_rule_holds(self) -> Self:
        rule = self.robust
        if rule.kind != "mean" and self.quorum < rule.fewest:
            raise ValueError(
                f"robust.attackers={rule.attackers}: federation.min_replies (here {self.quorum}) "
                f'must be at least {rule.fewest} for "{rule.kind}" to hold against so many'
            )
        if rule.kind != "mean" and self.local.scaffold:
            raise ValueError(
                f'robust.kind="{rule.kind}": must be "mean" when local.scaffold is true: the '
                "server's control variate is the mean of all devices' variates"
            )
        if rule.kind != "mean" and self.buffered and self.buffered.weight != "uniform":
            raise ValueError(
                f'buffered.weight="{self.buffered.weight}": must be "uniform" when robust.kind is '
                f'"{rule.kind}": weights would move updates towards zero before the rule sees '
                "them, and what it promises is about updates as they were sent"
            )
        return self

    @model_validator(mode="after")
    def _proximal_term_has_effect(self) -> Self:
        pull, rate = self.local.proximal, self.learning_rate
        if pull and self.steps_per_round == 1:
            raise ValueError(
                f"local.proximal={pull}: must be 0 when steps_per_round is 1: the only step starts "
                "at the broadcast model, where the proximal term is zero"
            )
        if pull * rate > 1:
            raise ValueError(
                f"local.proximal={pull}: must be at most 1 / learning_rate = {1 / rate:g}: a step "
                "would leap over the broadcast model"
            )
        return self

    @model_validator(mode="after")
    def _sampling_fits(self) -> Self:
        if self.limit is None and self.window != 1:
            raise ValueError(f"window={self.window}: has no effect without limit")
        if self.limit is not None and self.sampling == "passes":
            raise ValueError(
                f'limit={self.limit}: must be absent when sampling is "passes", which ask nobody '
                'twice in a pass; use sampling="fixed" or "poisson"'
            )
        if self.limit is not None and self.limit > self.window:
            raise ValueError(f"limit={self.limit}: must be at most window={self.window}")
        if self.min_replies is not None and self.sampling == "poisson":
            raise ValueError(
                f'min_replies={self.min_replies}: must be absent when sampling is "poisson": '
                "cohorts have random sizes, and a round is applied whatever came"
            )
        if self.buffered is not None and self.sampling != "passes":
            raise ValueError(
                f'sampling="{self.sampling}": must be "passes" with buffered: clients are asked '
                "one by one as others finish"
            )
        return self
