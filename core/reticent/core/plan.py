"""The plan: what to train and under which promises, read from one TOML file and overrides."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from .decoding import parse_json
from .errors import PlanError
from .fleet import Buffered, Fleet
from .population import check_population
from .section import Count, Positive, Probability, Section, Share

DEFAULT_EPSILON = 8.0


def _not_truth(value: object) -> object:
    """Refuse true and false, which Python and so pydantic's literals take for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("must be 8, 4, 3, 2 or 1, not true or false")
    return value


Backend = Literal["qnnpack", "x86"]
Bits = Literal[8, 4, 3, 2, 1]
Granularity = Literal["channel", "tensor"]
Observer = Literal["min-max", "moving-average", "histogram"]


class Partition(Section):
    """How private examples are dealt to clients.

    Attributes:
        kind: ``iid``, ``dirichlet`` (label proportions of each client from Dirichlet(alpha); Hsu et
            al. 2019), ``shards`` (each client holds ``labels_per_client`` labels; McMahan et al.
            2017) or ``natural`` (a client is a person, in tasks whose data belong to people).
        alpha: Concentration of the Dirichlet distribution; smaller is more skewed.
        labels_per_client: Number of label shards a client holds, for ``shards``.
        examples_per_client: When given, every client draws this many examples of its own from the
            pool, so that populations larger than the data can be simulated (clients then overlap).
            When absent, the pool is split into disjoint parts.
    """

    kind: Literal["iid", "dirichlet", "shards", "natural"] = "iid"
    alpha: Positive = 0.5
    labels_per_client: Count = 2
    examples_per_client: Count | None = None

    @model_validator(mode="after")
    def _natural_is_what_it_is(self) -> Self:
        if self.kind == "natural" and self.examples_per_client is not None:
            raise ValueError(
                f"examples_per_client={self.examples_per_client}: leave it out when kind is "
                '"natural", where a client holds what its people have; or use kind="iid"'
            )
        return self


class TaskSection(Section):
    """Which data and models, and how many clients share them.

    Attributes:
        public_labels: How many public examples, the first ones, keep their labels; the others get
            the labels that the teacher, which learns from those, gives them. When absent, all keep
            theirs.
    """

    name: str = "fashion"
    clients: Count = 100
    public_examples: Count = 1000
    public_labels: Count | None = None
    partition: Partition = Partition()


class Trained(Section):
    """How the weights that the task's models bring along learned from the clients' private data.

    A declaration: nobody but whoever trained them can know. Every device charges the event to its
    ledger, once for these weights, before its first release of the run.

    Attributes:
        weights: SHA-256 of the weights, which `reticent plan check` tells.
        sampling_rate: Probability q at which each unit joined a step; 1 is the plain Gaussian
            mechanism.
        noise_multiplier: Standard deviation of the noise over the bound of one unit's contribution.
        steps: Sums taken.
        unit: What the noise was meant for.
        relation: How its neighbour differed.
    """

    weights: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    sampling_rate: Probability
    noise_multiplier: Annotated[float, Field(ge=1e-9, le=1e9)]
    steps: Annotated[int, Field(ge=1, lt=2**63)]
    unit: Literal["example", "client"]
    relation: Literal["add-or-remove-one", "replace-one"]


class Teacher(Section):
    """Training of the teacher on the public split.

    Attributes:
        count: How many teachers are trained, from different initial weights; the student learns
            from the mean of their softened answers.
        precision: ``bf16`` runs the teacher's convolutions and products in bfloat16 (weights,
            optimizer and loss stay float32). It has float32's range, so no loss is scaled.
        offload: ``disk`` keeps weights, gradients and optimizer state of the teacher in files while
            it is trained, for a teacher that is larger than memory.
        trained: What the weights that the task's models begin with cost in privacy; absent: models
            begin at random, or at weights that the task declares public.
    """

    epochs: Count = 30
    learning_rate: Positive = 0.01
    count: Count = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    offload: Literal["none", "disk"] = "none"
    trained: Trained | None = None

    @model_validator(mode="after")
    def _no_half_precision(self) -> Self:
        if self.precision == "fp16":
            raise ValueError(
                'precision="fp16": must be "fp32" or "bf16": training runs on the CPU, and small '
                "gradients vanish in float16 unless the loss is scaled"
            )
        return self


class Distill(Section):
    """Distillation from a teacher, on public data; see :mod:`reticent.compression.distill`.

    Attributes:
        kind: What is imitated: softened answers (``response``; Hinton, Vinyals and Dean 2015), a
            hidden layer (``feature``; Romero et al. 2015), distances and angles between the
            examples of a batch (``relation``; Park et al. 2019), two of them, or nothing.
        mode: Who teaches. ``offline``: a trained teacher. ``online``: teacher and student learn
            from each other (Zhang et al. 2018). ``self``: the teacher has the student's own
            architecture (Furlanello et al. 2018). ``reverse``: a model of the student's
            architecture teaches the teacher first (Yuan et al. 2020).
        temperature: Softens both distributions; the loss is scaled by its square.
        weight: Share of the distillation loss while the student trains on public data.
        local_weight: Share of the distillation loss on the devices, where the teacher's answer for
            an example is its mean softened response to public examples of the same label (a table
            of classes x classes, public, so that no teacher travels and no device runs one).
    """

    kind: Literal[
        "response", "feature", "relation", "response+feature", "response+relation", "none"
    ] = "response"
    mode: Literal["offline", "online", "self", "reverse"] = "offline"
    temperature: Positive = 2.0
    weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    local_weight: Annotated[float, Field(ge=0, le=1)] = 0.0

    @property
    def terms(self) -> tuple[str, ...]:
        """The parts of ``kind``: of response, feature and relation; empty for ``none``."""
        return () if self.kind == "none" else tuple(self.kind.split("+"))

    @property
    def tuning(self) -> Distill:
        """What guides a student that is already trained: the same without the hidden layer.

        A hint leads to a good start (Romero et al. 2015, section 2.3); its projection begins at
        random and would first pull a trained student away from there.
        """
        kind = {"feature": "none", "response+feature": "response"}.get(self.kind, self.kind)
        return self.model_copy(update={"kind": kind})

    @model_validator(mode="after")
    def _devices_have_answers_only(self) -> Self:
        if self.local_weight == 0 or "response" in self.terms or self.kind == "none":
            return self
        why = (
            "a relation between examples is not a sum over examples, so clipping each example's "
            "gradient would not bound what one example changes"
            if self.kind == "relation"
            else "devices hold the teacher's mean answers, and not its hidden layers"
        )
        raise ValueError(
            f'local_weight={self.local_weight}: must be 0 when kind is "{self.kind}": {why}; use '
            f'kind="response+{self.kind}" for the public data with "response" on the devices'
        )

    @model_validator(mode="after")
    def _mode_fits(self) -> Self:
        if self.mode != "offline" and self.kind == "none":
            raise ValueError(f'mode="{self.mode}": nothing is distilled when kind is "none"')
        if self.mode == "online" and self.kind != "response":
            raise ValueError(
                f'kind="{self.kind}": must be "response" when mode is "online", because hidden '
                "layers of a teacher that still changes are no target"
            )
        return self


class Prune(Section):
    """Pruning of single weights of the public-data student, before any private data are used.

    Attributes:
        kind: How weights are scored, on public data: ``magnitude``, ``taylor`` (weight times
            gradient) or ``random``; ``none`` drops nothing.
        sparsity: Share of the prunable weights that is dropped.
        schedule: ``one-shot``: once, then tuned. ``gradual``: in steps along a cubic curve (Zhu and
            Gupta 2017). ``weight-rewind`` and ``rate-rewind``: in steps, after each of which
            training resumes at ``rewind`` with the weights that it had there (Frankle et al. 2020),
            or with its learning rates alone (Renda et al. 2020).
        steps: Steps of every schedule but ``one-shot``.
        rewind: Share of the training on public data that is not repeated.
    """

    kind: Literal["magnitude", "taylor", "random", "none"] = "magnitude"
    sparsity: Share = 0.5
    schedule: Literal["one-shot", "gradual", "weight-rewind", "rate-rewind"] = "one-shot"
    steps: Count = 4
    rewind: Share = 0.25


class Thin(Section):
    """Structured pruning of the public-data student: whole filters and neurons are removed.

    Attributes:
        kind: How units are scored, on public data or weights: ``l1``, ``l2``, ``taylor``,
            ``shapley`` or ``random``; ``none`` removes nothing.
        share: Share of the units of every layer but the last that is removed.
        shares: One share for each layer but the last, in order, instead of ``share``.
        permutations: Sampled orders of the units of a layer, for ``shapley``.
    """

    kind: Literal["none", "l1", "l2", "taylor", "shapley", "random"] = "none"
    share: Share = 0.5
    shares: tuple[Share, ...] = ()
    permutations: Count = 8


class Factorize(Section):
    """Low-rank factorization of the public-data student, after thinning and before pruning.

    Attributes:
        kind: ``svd``: layers become two factors by truncated singular value decomposition, where
            that makes them smaller. ``none``: they stay.
        rule: ``energy``: the rank keeps a share of the squared singular values; ``size``: of the
            layer's parameters.
        keep: That share.
    """

    kind: Literal["none", "svd"] = "none"
    rule: Literal["energy", "size"] = "energy"
    keep: Probability = 0.9


class Adapt(Section):
    """Low-rank adapters (Hu et al. 2021): the public student is frozen, clients train factors.

    Attributes:
        kind: ``lora`` or ``none``.
        rank: Rank of the change of every adapted layer.
        layers: Names of the adapted layers; empty for all whose factors are smaller than they are.
    """

    kind: Literal["none", "lora"] = "none"
    rank: Count = 4
    layers: tuple[str, ...] = ()


class Quantize(Section):
    """Integer weights and activations, and the engine that computes with them.

    Attributes:
        kind: ``qat``: weights are fake-quantized during the rounds and the model is quantized after
            them; ``static``: only after them; ``dynamic``: only weights, to 8 bits after them, and
            activations on the device as they come (Linear, LSTM and GRU); ``none``: as
            ``static``, and models are tested in float during the rounds.
        backend: The int8 engine: ``qnnpack`` for ARM, ``x86`` for servers and laptops.
        bits: Bits of the weights; activations have 8.
        edges: Which layers keep 8 bits whatever ``bits`` says: none, the first, or first and last.
        granularity: One step for each output ``channel`` of a weight, or for the whole ``tensor``.
        observer: How activation ranges are found on public data: the extremes (``min-max``), a
            moving average of each batch's extremes, or the ``histogram`` range of least squared
            error.
    """

    kind: Literal["qat", "static", "dynamic", "none"] = "qat"
    backend: Backend = "qnnpack"
    bits: Annotated[Bits, BeforeValidator(_not_truth)] = 8
    edges: Literal["none", "first", "both"] = "first"
    granularity: Granularity = "channel"
    observer: Observer = "min-max"

    @model_validator(mode="after")
    def _choices_have_effect(self) -> Self:
        if self.kind in ("none", "dynamic") and (self.bits, self.observer) != (8, "min-max"):
            raise ValueError(
                f'kind="{self.kind}" with bits={self.bits} and observer="{self.observer}": must be '
                '8 and "min-max"; kind="static" quantizes after training as they say'
            )
        if self.kind == "none" and self.granularity != "channel":
            raise ValueError(
                f'kind="none" with granularity="{self.granularity}": must be "channel"; '
                'kind="static" quantizes after training as it says'
            )
        return self


class Student(Section):
    """The model that is trained federatedly and deployed, and what is done to make it small."""

    model: str = "tiny"
    epochs: Count = 60
    learning_rate: Positive = 0.01
    distill: Distill = Distill()
    thin: Thin = Thin()
    factorize: Factorize = Factorize()
    prune: Prune = Prune()
    adapt: Adapt = Adapt()
    quantize: Quantize = Quantize()

    @model_validator(mode="after")
    def _adapts_layers_that_are_known(self) -> Self:
        pruned = self.prune.kind != "none" and self.prune.sparsity > 0
        if self.adapt.kind != "none" and pruned:
            raise ValueError(
                f'adapt.kind="{self.adapt.kind}": the factors would fill again what is pruned: '
                'use prune.kind="none", and thin or factorize to make the student smaller'
            )
        by_energy = self.factorize.kind != "none" and self.factorize.rule == "energy"
        if self.adapt.kind != "none" and by_energy:
            raise ValueError(
                f'adapt.kind="{self.adapt.kind}": which layers there are must be known before '
                'training: use factorize.rule="size"'
            )
        return self

    @model_validator(mode="after")
    def _rewinds_to_its_own_layers(self) -> Self:
        if self.prune.kind != "none" and self.prune.schedule == "weight-rewind" and self.reshaped:
            raise ValueError(
                'prune.schedule="weight-rewind" goes back to weights of the student\'s own layers, '
                'which thin and factorize change: use "rate-rewind", or leave them off'
            )
        return self

    @property
    def reshaped(self) -> bool:
        """Whether the trained student has other layers than ``model``, which clients must get."""
        return {self.thin.kind, self.factorize.kind, self.adapt.kind} != {"none"}

    @property
    def unshaped(self) -> Student:
        """The same student without anything that changes its layers."""
        return self.model_copy(update={"thin": Thin(), "factorize": Factorize(), "adapt": Adapt()})


class Privacy(Section):
    """The promise: unit, adversary, and either a target epsilon or a noise multiplier.

    Attributes:
        unit: What one neighbour differs in: one ``example`` of one client, or all that one
            ``client`` contributes. With ``client`` the server bounds every decoded update and adds
            the noise itself, so ``trust`` must be ``aggregator``.
        trust: ``local``: every client adds the full noise, the promise holds against the server.
            ``aggregator``: every client adds a share, the promise holds against everyone who sees
            the models, and the server is trusted to look only at the sum.
        epsilon: Target; the noise multiplier is calibrated over the whole schedule.
        noise_multiplier: Given instead of ``epsilon``, which is then reported.
        relation: How the neighbour differs: one unit added or removed (its contribution becomes
            zero), or replaced by another one.
        delta: The delta at which epsilon is stated.
        clip: L2 bound of one example's gradient, or of one client's update (``unit = "client"``),
            between 1e-12 and 1e12: float32 could not keep another.
        clipping: ``flat``: one norm over all parameters; ``per-layer``: every parameter tensor has
            its own bound, and the squares of the bounds sum to ``clip`` squared.
        clip_quantile: Adaptive clipping of clients' updates (Andrew et al. 2021): ``clip`` is then
            the first bound, and later bounds follow this quantile of the updates' norms by noised
            counts, which are charged. Only with ``unit = "client"``.
        examples_per_user: Most examples of one client that belong to one person, when such a bound
            is known; the report then states a user-level epsilon.
        budget: The hard stop of each simulated device's ledger; ``epsilon`` when absent, and
            unlimited when only ``noise_multiplier`` is given.
        secret_cohort: Nobody who sees the models learns who takes part: epsilon against them then
            counts the sampling of clients. Only with ``unit = "client"`` and
            ``federation.sampling = "poisson"``.
    """

    unit: Literal["example", "client"] = "example"
    trust: Literal["local", "aggregator"] = "aggregator"
    epsilon: Positive | None = None
    noise_multiplier: Positive | None = None
    relation: Literal["add-or-remove-one", "replace-one"] = "add-or-remove-one"
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    clip: Annotated[float, Field(ge=1e-12, le=1e12)] = 0.5
    clipping: Literal["flat", "per-layer"] = "flat"
    clip_quantile: Annotated[float, Field(gt=0, lt=1)] | None = None
    examples_per_user: Count | None = None
    budget: Positive | None = None
    secret_cohort: bool = False

    @model_validator(mode="after")
    def _unit_fits(self) -> Self:
        if self.unit == "client":
            if self.trust != "aggregator":
                raise ValueError(
                    f'trust="{self.trust}": must be "aggregator" when unit is "client", because '
                    "the server bounds the updates and adds the noise"
                )
            if self.clipping != "flat" or self.examples_per_user is not None:
                raise ValueError(
                    'clipping="per-layer" and examples_per_user are about single examples: leave '
                    'them out when unit is "client"'
                )
        elif self.clip_quantile is not None:
            raise ValueError(
                f"clip_quantile={self.clip_quantile}: adaptive clipping is of clients' updates: "
                'give unit="client", or leave it out'
            )
        return self

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.epsilon is not None and self.noise_multiplier is not None:
            raise ValueError(
                f"epsilon={self.epsilon} and noise_multiplier={self.noise_multiplier} are both "
                "given: give epsilon (the noise is calibrated) or noise_multiplier (epsilon is "
                "reported), not both"
            )
        if self.epsilon is None and self.noise_multiplier is None:
            raise ValueError(
                'neither epsilon nor noise_multiplier is given: give one, or write privacy = "off"'
            )
        return self


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


class Updates(Section):
    """Codecs of what travels: ``codec`` up, ``broadcast`` down.

    Attributes:
        codec: Stages of updates. ``("auto",)`` becomes the narrowest dither whose alphabet holds
            four standard deviations of the noise at ``step``, and ``ans``.
        broadcast: Stages of models.
        step: The quantizer's public step as a share of the standard deviation of the noise in a
            coordinate of an update; with unit ``client`` as a share of an average coordinate at the
            bound. A dither adds ``step``² / 12 to the variance of one client's noise. Without
            privacy steps are taken from the data.
        pad: With privacy, updates are padded to a length that no private data decide (more, in
            public steps, if one is longer), so that lengths do not tell clients apart.
        delta: When given, a device that holds the last model is sent the change since, in these
            stages, and any other device the whole model in float32; ``broadcast`` is then not
            used. Only where more than half of the clients are asked in a round.
        error_feedback: Devices add what the codec left out to their next update (Seide et al.
            2014); only for ``topk``, ``sign`` and ``lowrank``, and not with unit ``client``.
    """

    step: Annotated[float, Field(ge=0.01, le=16)] = 0.5
    codec: tuple[str, ...] = ("dither4", "ans")
    broadcast: tuple[str, ...] = ("int8", "ans")
    pad: bool = True
    error_feedback: bool = False
    delta: tuple[str, ...] = ()

    @property
    def whole(self) -> tuple[str, ...]:
        """Stages of a whole model on its way down.

        With ``delta`` a whole model must be exactly what a chain of changes leads to.
        """
        return ("identity",) if self.delta else self.broadcast

    @field_validator("codec")
    @classmethod
    def _choose(cls, codec: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        """Write out ``auto``, so that a resolved plan says what it does."""
        if codec != ("auto",) or "step" not in info.data:
            return codec
        fits = (b for b in range(2, 8) if (2 ** (b - 1) - 1) * info.data["step"] >= 4)
        return (f"dither{next(fits, 8)}", "ans")


def _workers(value: object) -> object:
    if value != "auto" and (type(value) is not int or value < 1):
        raise PydanticCustomError("workers", 'must be "auto", or an integer of at least 1')
    return value


Workers = Annotated[int | Literal["auto"], PlainValidator(_workers)]


class Engine(Section):
    """Where the clients of a simulation run; no choice changes a result.

    Attributes:
        kind: ``inprocess``: processes of this machine. ``ray``: actors of ours on Ray.
            ``flower-ray``: Flower's own engine.
        workers: How many processes or actors, of one thread each; ``auto`` is one a core.
        address: The Ray cluster to connect to; by default that of the environment
            (``RAY_ADDRESS``, as ``ray job submit`` sets it), else one is started on this machine.
    """

    kind: Literal["inprocess", "ray", "flower-ray"] = "inprocess"
    workers: Workers = "auto"
    address: str | None = None

    @model_validator(mode="after")
    def _address_is_of_ray(self) -> Self:
        if self.address is not None and self.kind != "ray":
            raise ValueError(
                f'engine.address="{self.address}": must be absent unless engine.kind is "ray"; '
                f'it is "{self.kind}"'
            )
        return self


class Plan(Section):
    """A whole plan. Frozen; build one with :func:`parse_plan` or :func:`load_plan`."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    task: TaskSection = TaskSection()
    teacher: Teacher = Teacher()
    student: Student = Student()
    privacy: Privacy | Literal["off"] = Privacy(epsilon=DEFAULT_EPSILON)
    federation: Federation = Federation()
    updates: Updates = Updates()
    engine: Engine = Engine()
    fleet: Fleet | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        f, p = self.federation, self.privacy
        if f.clients_per_round > self.task.clients:
            raise ValueError(
                f"federation.clients_per_round={f.clients_per_round}: must be at most "
                f"task.clients={self.task.clients}"
            )
        if self.updates.delta and self.task.clients >= 2 * f.clients_per_round:
            raise ValueError(
                f"updates.delta={list(self.updates.delta)}: must be absent when "
                f"federation.clients_per_round={f.clients_per_round} is at most half of "
                f"task.clients={self.task.clients}: hardly any client would hold the last model, "
                "and whole models in float32 cost more than updates.broadcast"
            )
        if f.quorum > f.clients_per_round:
            raise ValueError(
                f"federation.min_replies={f.min_replies}: must be at most "
                f"federation.clients_per_round={f.clients_per_round}"
            )
        self._teachers_fit()
        self._trained_fits()
        if self.updates.error_feedback and p != "off" and p.unit == "client":
            raise ValueError(
                'updates.error_feedback=true: must be false when privacy.unit is "client", because '
                "what is left out of an update without noise would count in a later round, whose "
                "noise is not meant for it"
            )
        shares = p != "off" and p.trust == "aggregator" and p.unit == "example"
        if shares and f.steps_per_round != 1:
            raise ValueError(
                f"federation.steps_per_round={f.steps_per_round}: must be 1 when privacy.trust is "
                '"aggregator", because a noise share protects only a gradient sum taken at the '
                'broadcast model; use privacy.trust="local" for several local steps'
            )
        if shares:
            _only_the_broadcast_model(f.local)
        check_population(self)
        self._closes_late_enough()
        if p != "off" and p.trust == "aggregator":
            _only_the_sum(f.robust, p)
        return self

    @property
    def asked_per_round(self) -> int:
        """Clients that a round asks: more than are used where the fleet is over-selected."""
        factor = 1.0 if self.fleet is None else self.fleet.over_selection
        return math.ceil(self.federation.clients_per_round * factor)

    def _closes_late_enough(self) -> None:
        f, p = self.federation, self.privacy
        if f.enough is None:
            return
        if not f.quorum <= f.enough <= f.clients_per_round:
            raise ValueError(
                f"federation.enough={f.enough}: must be from the fewest replies of a round, "
                f"{f.quorum}, to federation.clients_per_round={f.clients_per_round}"
            )
        if p != "off" and p.unit == "client":
            raise ValueError(
                f'federation.enough={f.enough}: must be absent when privacy.unit is "client", '
                "because the sum is divided by clients_per_round whoever replied"
            )

    def _teachers_fit(self) -> None:
        task, teacher, distill = self.task, self.teacher, self.student.distill
        if task.public_labels is not None and task.public_labels > task.public_examples:
            raise ValueError(
                f"task.public_labels={task.public_labels}: must be at most "
                f"task.public_examples={task.public_examples}"
            )
        if distill.mode == "online" and task.public_labels is not None:
            raise ValueError(
                f"task.public_labels={task.public_labels}: must be left out when "
                'student.distill.mode is "online", because a teacher that learns together with the '
                "student labels nothing before it"
            )
        single = distill.mode == "online" or {"feature", "relation"} & set(distill.terms)
        rewinds = (
            self.student.prune.kind != "none" and self.student.prune.schedule == "weight-rewind"
        )
        if rewinds and (distill.mode == "online" or "feature" in distill.terms):
            raise ValueError(
                'student.prune.schedule="weight-rewind": must be another schedule when '
                'student.distill.mode is "online" or student.distill.kind compares hidden layers, '
                "because the beginning of that training cannot be repeated without the rest"
            )
        if teacher.count > 1 and single:
            raise ValueError(
                f"teacher.count={teacher.count}: must be 1 when student.distill.mode is "
                f'"online" or student.distill.kind (here "{distill.kind}") compares hidden '
                "layers; several teachers give one answer, but no one layer"
            )

    def _trained_fits(self) -> None:
        trained, p = self.teacher.trained, self.privacy
        if trained is None:
            return
        if p == "off":
            raise ValueError(
                'teacher.trained: must be absent when privacy is "off", because nothing is '
                "promised then that it could count towards"
            )
        for key, given, other in (
            ("unit", trained.unit, p.unit),
            ("relation", trained.relation, p.relation),
        ):
            if given != other:
                raise ValueError(
                    f'teacher.trained.{key}="{given}": must be privacy.{key}, which is "{other}", '
                    "because an epsilon over different ones has no meaning"
                )

    def canonical(self) -> str:
        """Return the plan as canonical JSON: sorted keys, no spaces, every default written out."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """SHA-256 of the plan as hex. ``engine`` is left out: it cannot change any result.

        So is what later versions added, where it has its default: a plan keeps its digest, on
        which a simulation's noise depends.
        """
        data = _without_later(self.model_dump(mode="json", exclude={"engine"}))
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def private(self) -> Privacy | None:
        """The privacy section, or None when privacy is off."""
        return None if self.privacy == "off" else self.privacy


def _only_the_broadcast_model(local: Local) -> None:
    """Refuse what a device keeps between rounds where its updates hold a noise share only.

    Raises:
        ValueError: Naming the key and the reason.
    """
    if local.scaffold:
        raise ValueError(
            "federation.local.scaffold=true: must be false when privacy.trust is "
            '"aggregator" and privacy.unit is "example": a control variate is an update with a '
            "noise share, and cohorts that differ would add different sums of the same shares to "
            'the models; use privacy.trust="local" or privacy.unit="client"'
        )
    if local.personal:
        raise ValueError(
            f"federation.local.personal={list(local.personal)}: must be empty when privacy.trust "
            'is "aggregator" and privacy.unit is "example": a noise share protects only a gradient '
            "sum taken at the broadcast model, and a personal layer is not broadcast; use "
            'privacy.trust="local" or privacy.unit="client"'
        )


_LATER: dict[str, Any] = {
    "fleet": None,
    "federation.sampling": "passes",
    "federation.enough": None,
    "federation.limit": None,
    "federation.window": 1,
    "federation.buffered": None,
    "federation.local": Local().model_dump(mode="json"),
    "federation.robust": Robust().model_dump(mode="json"),
    "federation.server.second_momentum": 0.99,
    "federation.server.adaptivity": 1e-8,
    "privacy.secret_cohort": False,
    "teacher.trained": None,
}
"""Keys that came later, and what a plan without them means: their defaults, for good."""


def _without_later(data: dict[str, Any]) -> dict[str, Any]:
    """Take from a dumped plan the keys that came later and have their defaults."""
    for path, default in _LATER.items():
        *sections, key = path.split(".")
        section: Any = data
        for name in sections:
            section = section[name]
        if isinstance(section, dict) and section[key] == default:
            del section[key]
    return data


def _only_the_sum(robust: Robust, privacy: Privacy) -> None:
    """Refuse what looks at single updates where the noise is meant for their sum.

    Raises:
        ValueError: Naming the key and the reason.
    """
    if robust.kind == "mean":
        return
    why = (
        "a single update holds a noise share only, and what is chosen among updates is no function "
        'of their sum; use privacy.trust="local"'
        if privacy.unit == "example"
        else "the noise is calibrated to how far one client moves a mean of bounded updates, and "
        "it moves a median or a choice among updates further"
    )
    raise ValueError(
        f'federation.robust.kind="{robust.kind}": must be "mean" when privacy.trust is '
        f'"aggregator" and privacy.unit is "{privacy.unit}": {why}'
    )


def load_plan(path: Path, overrides: Iterable[str] = ()) -> Plan:
    """Read a plan from a TOML file and apply ``a.b=value`` overrides.

    Raises:
        PlanError: If the file is missing or not TOML, or the plan is not valid.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: cannot be read: {_reason(error)}") from error
    return parse_plan(text, overrides, where=str(path))


def parse_plan(text: str, overrides: Iterable[str] = (), where: str = "plan") -> Plan:
    """Parse a plan from TOML text and apply ``a.b=value`` overrides.

    >>> parse_plan("", ["federation.rounds=3"]).federation.rounds
    3

    Raises:
        PlanError: Naming the key path, what was given and what is allowed.
    """
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a ValueError also where an integer is too long
        raise PlanError(f"{where}: not TOML: {error}") from error
    overrides = list(overrides)
    if "privacy" not in data and any(o.startswith("privacy.") for o in overrides):
        # Overrides of the default promise start from it; a noise multiplier replaces its epsilon.
        replaced = any(o.startswith("privacy.noise_multiplier=") for o in overrides)
        data["privacy"] = {} if replaced else {"epsilon": DEFAULT_EPSILON}
    for override in overrides:
        _apply(data, override)
    return plan_from(data, where)


def plan_from(data: Mapping[str, Any], where: str = "plan") -> Plan:
    """Build a plan from nested dictionaries, as TOML or JSON gives them."""
    try:
        # JSON mode, so that arrays are accepted where tuples are declared, and nothing else is.
        return Plan.model_validate_json(json.dumps(data))
    except ValidationError as error:
        problems = [e for e in error.errors() if not _other_branch(cast(dict[str, Any], e))]
        lines = [_explain(cast(dict[str, Any], e)) for e in problems]
        raise PlanError(f"{where}: " + "; ".join(dict.fromkeys(lines))) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise PlanError(f"{where}: {error}") from error


def plan_from_json(text: str) -> Plan:
    """Parse a plan from the JSON that :meth:`Plan.canonical` writes.

    Raises:
        PlanError: If it is not JSON, or not a valid plan.
    """
    try:
        data = parse_json(text)
    except ValueError as error:
        raise PlanError(f"plan: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise PlanError("plan: must be a JSON object")
    return plan_from(cast(dict[str, Any], data))


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "not UTF-8 text"


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise PlanError(f"--set {override}: must look like section.key=value")
    for part in path[:-1]:
        inner = data.setdefault(part, {})
        if not isinstance(inner, dict):
            raise PlanError(f"--set {override}: {part} is a value, not a section")
        data = cast(dict[str, Any], inner)
    data[path[-1]] = _value(value.strip())


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except (ValueError, RecursionError):
        return text


def _other_branch(error: dict[str, Any]) -> bool:
    """Return whether an error is about the branch of ``section | "off"`` that was not meant."""
    last = str(error["loc"][-1]) if error["loc"] else ""
    if last.startswith("literal["):
        return isinstance(error["input"], dict)
    return last.startswith("function-after[") and not isinstance(error["input"], dict)


def _explain(error: dict[str, Any]) -> str:
    # A union of a section and "off" inserts the name of the branch into the location.
    branches = ("function-after[", "literal[")
    loc = [str(p) for p in error["loc"] if not str(p).startswith(branches)]
    path = ".".join(loc) or "plan"
    given = error["input"]
    if error["type"] == "extra_forbidden":
        return f"unknown key {path}{_suggestion(loc)}"
    if error["type"] == "value_error":
        return f"{path}: {error['ctx']['error']}" if loc else str(error["ctx"]["error"])
    if path == "privacy":
        return f'privacy={json.dumps(given, default=str)}: must be a section or "off"'
    shown = "a section" if isinstance(given, dict) else json.dumps(given, default=str)
    return f"{path}={shown}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _suggestion(loc: list[str]) -> str:
    known = _keys_at(loc[:-1])
    close = difflib.get_close_matches(loc[-1], known, n=1)
    here = f" (did you mean {'.'.join([*loc[:-1], close[0]])}?)" if close else ""
    return here or f" (known keys here: {', '.join(known)})"


def _keys_at(path: list[str]) -> list[str]:
    section: type[BaseModel] = Plan
    for part in (p for p in path if not p.isdecimal()):  # positions in a list of sections
        section = _section_in(section.model_fields[part].annotation)
    return sorted(section.model_fields)


def _section_in(kind: Any) -> type[BaseModel]:
    """Return the section that an annotation holds, alone, in a union or in a tuple."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    return next(_section_in(k) for k in get_args(kind) if k not in (type(None), Ellipsis))
