"""FedProx, SCAFFOLD and personal layers: each against a loop by hand, and what they may not do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from reticent.client.kept import Kept
from reticent.client.training import student_model
from reticent.core.errors import NetworkError, PlanError
from reticent.core.personal import split_of
from reticent.core.plan import Plan, parse_plan
from reticent.core.run import Run
from reticent.core.tasks import load_task
from reticent.core.update import Layout
from reticent.privacy.ledger import Ledger
from reticent.privacy.randomness import SeededRandomness
from reticent.server.control import ControlVariates
from reticent.server.folding import Folder
from reticent.server.journal import Journal
from reticent.server.optimizer import ServerState
from reticent.server.preparation import Prepared
from reticent.server.strategy import PrivateAveraging
from reticent.simulations.admission import check_codecs
from reticent.simulations.devices import device_name
from reticent.simulations.grid import node_of
from reticent.simulations.simulate import simulate as run_plan

SMALL = [
    "task.name=digits",
    "task.clients=6",
    "task.partition.kind=shards",
    "task.public_examples=200",
    "teacher.epochs=1",
    "student.epochs=2",
    "student.prune.kind=none",
    "student.distill.kind=none",
    "federation.clients_per_round=3",
    "federation.rounds=4",
    "federation.steps_per_round=3",
    "federation.sampling_rate=0.2",
    "federation.learning_rate=0.1",
    "federation.average=0.0",
    "federation.server.kind=sgd",
    "federation.server.momentum=0.0",
    "federation.server.learning_rate=0.1",
    'updates.codec=["identity"]',
    'updates.broadcast=["identity"]',
    "engine.workers=1",
]
OFF = [*SMALL, "privacy=off", "student.quantize.kind=none"]
COHORTS = [[0, 1, 2], [3, 4, 5], [0, 3, 4], [1, 2, 5]]
PREPARED = Prepared()
HEAD = "7"
PROXIMAL, SCAFFOLD = "federation.local.proximal=2.0", "federation.local.scaffold=true"
PERSONAL = f'federation.local.personal=["{HEAD}"]'
LOCAL = ["privacy.trust=local", "privacy.noise_multiplier=1.0"]
CLIENT = ["privacy.unit=client", "privacy.noise_multiplier=1.0"]


@pytest.fixture(autouse=True)
def _fixed_cohorts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds 1 to 4 ask the clients of ``COHORTS``."""
    torch.set_num_threads(1)
    monkeypatch.setattr(
        PrivateAveraging, "cohort", lambda self, number, grid: [node_of(c) for c in cohort(number)]
    )


def simulate(plan: Plan, folder: Path, **given: Any) -> Run:
    """Run a plan; what plans share is made from public data once."""
    return run_plan(plan, folder, prepared=PREPARED, **given)


def cohort(number: int) -> list[int]:
    return COHORTS[(number - 1) % len(COHORTS)]


def state_of(run: Run) -> ServerState:
    journal = Journal(run)
    try:
        state = journal.latest()
        assert state is not None
        return state
    finally:
        journal.close()


def kept(run: Run, what: str, client: int, first: NDArray[np.float32]) -> NDArray[np.float32]:
    store = Kept(run.ledger / what, device_name(client), run.plan().digest[:16])
    return store.before(10**6, first)


def start_of(run: Run) -> tuple[Layout, NDArray[np.float32]]:
    plan = run.plan()
    journal = Journal(run)
    arrays = journal.restore("start")
    journal.close()
    assert arrays is not None
    model = student_model(load_task(plan.task, plan.seed), plan)
    model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in arrays.items()})
    layout = Layout.of(model)
    return layout, layout.read(model)


@dataclass
class ByHand:
    """A federation without privacy, codecs or any of our training code: data and batches only."""

    plan: Plan
    layout: Layout
    model: torch.nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.task = load_task(self.plan.task, self.plan.seed)
        self.model = student_model(self.task, self.plan)

    def gradient(self, at: NDArray[Any], client: int, number: int, step: int) -> NDArray[Any]:
        examples, rate = self.task.client(client), self.plan.federation.sampling_rate
        path = ("batch", self.plan.digest[:16], client, number, step)
        draws = SeededRandomness(self.plan.seed).stream(*path).uniform(len(examples.labels))
        batch = draws < rate
        self.layout.write(self.model, at.astype(np.float32))
        self.model.zero_grad()
        logits = self.model(examples.inputs[batch])
        F.cross_entropy(logits, examples.labels[batch], reduction="sum").backward()
        total = self.layout.gather([p.grad for p in self.model.parameters()])  # type: ignore[misc]
        return total.astype(np.float64) / (rate * self.task.nominal_examples)


def test_the_proximal_term_is_fedprox_exactly(tmp_path: Path) -> None:
    """Li et al. 2020: every local step goes down F_k(w) + mu / 2 * ||w - w0||^2."""
    run = simulate(parse_plan("", [*OFF, PROXIMAL]), tmp_path / "run")
    layout, world = start_of(run)
    hand, mu, rate = ByHand(run.plan(), layout), 2.0, 0.1
    for number in range(1, 5):
        moves = np.zeros(layout.size)
        for client in cohort(number):
            w, moved = world, np.zeros(layout.size)
            for step in range(3):
                down = hand.gradient(w, client, number, step)
                down = down + mu * (w.astype(np.float64) - world)
                moved += down
                w = (w - rate * down).astype(np.float32)
            moves += moved.astype(np.float32)
        world = (world - 0.1 * (moves / 3)).astype(np.float32)
    assert (state_of(run).weights == world).all()
    plain = simulate(parse_plan("", OFF), tmp_path / "plain")
    assert (state_of(plain).weights != world).any()


def test_control_variates_are_scaffold(tmp_path: Path) -> None:
    """Karimireddy et al. 2020, algorithm 1, option II, as printed: devices send both changes."""
    run = simulate(parse_plan("", [*OFF, SCAFFOLD]), tmp_path / "run")
    layout, start = start_of(run)
    hand, rate, server_rate, steps, everyone = ByHand(run.plan(), layout), 0.1, 1.0, 3, 6
    x, c = start.astype(np.float64), np.zeros(layout.size)
    own = [np.zeros(layout.size) for _ in range(everyone)]
    for number in range(1, 5):
        model_moves, variate_moves = [], []
        for client in cohort(number):
            y = x.copy()
            for step in range(steps):
                y = y - rate * (hand.gradient(y, client, number, step) - own[client] + c)
            fresh = own[client] - c + (x - y) / (steps * rate)
            model_moves.append(y - x)
            variate_moves.append(fresh - own[client])
            own[client] = fresh
        x = x + server_rate * np.mean(model_moves, axis=0)
        c = c + len(model_moves) / everyone * np.mean(variate_moves, axis=0)
    state = state_of(run)
    assert state.control is not None
    np.testing.assert_allclose(state.weights, x, atol=2e-5)
    np.testing.assert_allclose(state.control, c, atol=2e-5)
    assert np.linalg.norm(c) > 100 * np.linalg.norm(state.control - c)
    for client in range(everyone):
        found = kept(run, "control", client, np.zeros(layout.size, dtype=np.float32))
        np.testing.assert_allclose(found, own[client], atol=2e-5)
    plain = simulate(parse_plan("", OFF), tmp_path / "plain")
    assert np.linalg.norm(state_of(plain).weights - x) > 1e-2
    for with_it, without in zip(run.read_metrics(), plain.read_metrics(), strict=True):
        assert with_it["bytes_up"] == without["bytes_up"]
        assert with_it["bytes_down"] == 2 * without["bytes_down"]


def test_the_first_round_of_scaffold_is_federated_averaging_exactly(tmp_path: Path) -> None:
    one = "federation.rounds=1"
    with_it = simulate(parse_plan("", [*OFF, one, SCAFFOLD]), tmp_path / "with")
    layout, world = start_of(with_it)
    hand, moves = ByHand(with_it.plan(), layout), np.zeros(layout.size)
    for client in cohort(1):
        w, moved = world, np.zeros(layout.size)
        for step in range(3):
            gradient = hand.gradient(w, client, 1, step)
            moved += gradient
            w = (w - 0.1 * gradient).astype(np.float32)
        moves += moved.astype(np.float32)
    assert (state_of(with_it).weights == (world - 0.1 * (moves / 3)).astype(np.float32)).all()


def variates_of(run: Run) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the server's control variate, and the mean of all devices' own."""
    control = state_of(run).control
    assert control is not None
    zeros = np.zeros(len(control), dtype=np.float32)
    return control, np.mean([kept(run, "control", c, zeros) for c in range(6)], axis=0, dtype="f8")


def assert_the_mean_is_the_servers(run: Run) -> None:
    control, mean = variates_of(run)
    np.testing.assert_allclose(mean, control, atol=1e-5 * np.linalg.norm(control))


def short_cohort(_: PrivateAveraging, number: int, grid: object) -> list[int]:
    return [node_of(c) for c in cohort(number)[: 3 - number % 2]]


def test_the_mean_of_the_devices_variates_is_the_servers(tmp_path: Path) -> None:
    """With rounding codecs both ways, and with a noise that devices add themselves."""
    codecs = ['updates.codec=["dither4","ans"]', 'updates.broadcast=["int8","ans"]']
    run = simulate(parse_plan("", [*SMALL, *LOCAL, *codecs, SCAFFOLD]), tmp_path / "run")
    assert len({m["bytes_up"] for m in run.read_metrics()}) == 1, "lengths tell something"
    assert_the_mean_is_the_servers(run)


@pytest.mark.parametrize("promise", [["privacy=off"], LOCAL])
def test_the_mean_of_the_devices_variates_is_the_servers_in_poisson_cohorts(
    promise: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates are divided by ``clients_per_round`` there, and variates by how many there were."""
    monkeypatch.undo()  # cohorts are the sampler's
    poisson = [SCAFFOLD, "federation.sampling=poisson", "federation.rounds=8"]
    plan = parse_plan("", [*SMALL, *promise, "student.quantize.kind=none", *poisson])
    run = simulate(plan, tmp_path / "run")
    assert len({m["replies"] for m in run.read_metrics()}) > 2
    assert_the_mean_is_the_servers(run)


def test_the_mean_of_the_devices_variates_is_the_servers_with_fewer_replies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PrivateAveraging, "cohort", short_cohort)
    run = simulate(parse_plan("", [*OFF, SCAFFOLD, "federation.min_replies=2"]), tmp_path / "run")
    assert [m["replies"] for m in run.read_metrics()] == [2, 3, 2, 3]
    assert_the_mean_is_the_servers(run)


def test_with_unit_client_a_missing_reply_moves_the_servers_variate_as_zeros_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noise covers whether a client replied, so the number of replies is not used."""
    befores: list[NDArray[np.float64]] = []
    moved = ControlVariates.moved

    def watched(self: ControlVariates, state: ServerState, *given: Any) -> Any:
        befores.append(np.zeros(len(state.weights)) if state.control is None else state.control)
        return moved(self, state, *given)

    monkeypatch.setattr(ControlVariates, "moved", watched)
    monkeypatch.setattr(PrivateAveraging, "cohort", short_cohort)
    quiet = ["privacy.unit=client", "privacy.noise_multiplier=1e-6", "federation.min_replies=2"]
    run = simulate(parse_plan("", [*SMALL, *quiet, SCAFFOLD]), tmp_path / "run")
    missing = sum((3 - size) / 6 * c for size, c in zip([2, 3, 2, 3], befores, strict=True))
    control, mean = variates_of(run)
    np.testing.assert_allclose(control, mean - missing, atol=1e-4 * np.linalg.norm(control))
    assert np.linalg.norm(missing) > 0.05 * np.linalg.norm(control)


def test_personal_layers_are_fedper_exactly(tmp_path: Path) -> None:
    """Arivazhagan et al. 2019: devices average all layers but their own, which they go on with."""
    run = simulate(parse_plan("", [*OFF, PERSONAL]), tmp_path / "run")
    layout, start = start_of(run)
    hand, rate = ByHand(run.plan(), layout), 0.1
    inner = np.repeat([n.startswith(f"{HEAD}.") for n in layout.names], layout.sizes)
    assert 0 < inner.sum() < layout.size
    world, heads = start.copy(), dict.fromkeys(range(6), start[inner])
    for number in range(1, 5):
        moves = np.zeros(layout.size)
        for client in cohort(number):
            w, moved = world.copy(), np.zeros(layout.size)
            w[inner] = heads[client]
            for step in range(3):
                gradient = hand.gradient(w, client, number, step)
                moved += gradient
                w = (w - rate * gradient).astype(np.float32)
            summed = moved.astype(np.float32)
            moves += summed
            heads[client] = (heads[client] - rate * summed[inner].astype(np.float64)).astype("f4")
        world[~inner] = (world - 0.1 * (moves / 3)).astype(np.float32)[~inner]
    state = state_of(run)
    assert (state.weights == world).all()
    assert (state.weights[inner] == start[inner]).all(), "the server keeps the public layers"
    for client, head in heads.items():
        assert (kept(run, "personal", client, start[inner]) == head).all()
        assert (head != start[inner]).any()


def test_personal_layers_do_not_travel(tmp_path: Path) -> None:
    """Neither way: a payload is as long as the other layers alone are."""
    sizes = []
    for name, extra in (("all", []), ("shared", [PERSONAL])):
        run = simulate(parse_plan("", [*OFF, "federation.rounds=1", *extra]), tmp_path / name)
        metrics = run.read_metrics()[0]
        sizes.append((metrics["bytes_up"], metrics["bytes_down"]))
    layout, _ = start_of(run)
    split = split_of(layout, [HEAD])
    fewer = 3 * 4 * (layout.size - split.travels.size)
    assert [before - after for before, after in zip(*sizes, strict=True)] == [fewer, fewer]


@pytest.mark.parametrize("unit", [LOCAL, CLIENT], ids=["example", "client"])
def test_a_resumed_run_ends_bit_for_bit_like_one_that_was_never_stopped(
    unit: list[str], tmp_path: Path
) -> None:
    given = [*SMALL, *unit, SCAFFOLD, PERSONAL, "federation.server.kind=yogi"]
    plan = parse_plan("", given)
    whole = simulate(plan, tmp_path / "whole")

    class Stopped(Exception):
        pass

    def stop(metrics: dict[str, Any]) -> None:
        if metrics["round"] == 3:
            raise Stopped

    with pytest.raises(Stopped):
        simulate(plan, tmp_path / "stopped", progress=stop)
    resumed = simulate(plan, tmp_path / "stopped", resume=True)
    before, after = (vars(state_of(run)) for run in (whole, resumed))
    for name in ("weights", "first", "second", "control"):
        assert (before[name] == after[name]).all(), name
        assert before[name].any(), name
    layout, start = start_of(whole)
    split = split_of(layout, [HEAD])
    for client in range(6):
        for what, first in (("personal", split.personal(start)), ("control", split.shared(start))):
            found = [kept(run, what, client, first) for run in (whole, resumed)]
            assert (found[0] == found[1]).all()
            assert (found[0] != first).any()


@pytest.mark.parametrize(
    ("unit", "extra"),
    [(LOCAL, [PROXIMAL]), (LOCAL, [SCAFFOLD, PERSONAL]), (CLIENT, [SCAFFOLD, PERSONAL])],
)
def test_the_ledger_counts_what_it_counts_without(
    unit: list[str], extra: list[str], tmp_path: Path
) -> None:
    spent = []
    for name, more in (("without", []), ("with", extra)):
        run = simulate(parse_plan("", [*SMALL, *unit, *more]), tmp_path / name)
        with Ledger.open(run.ledger) as ledger:
            spent.append({d: ledger.spent(d, 1e-5) for d in ledger.devices()})
        assert run.read_summary()["privacy"]["epsilon"] == pytest.approx(max(spent[-1].values()))
    assert spent[0] == spent[1]
    assert len(spent[0]) == 6


def test_with_unit_client_the_servers_variate_is_a_function_of_the_released_models(
    tmp_path: Path,
) -> None:
    """Replayed from models alone, with a reply lost in each round: nobody's silence shows in it."""
    plan = parse_plan("", [*SMALL, *CLIENT, SCAFFOLD, "federation.min_replies=1"])
    states: list[ServerState] = []

    def remember(before: Callable[..., None]) -> Callable[..., None]:
        def commit(self: Journal, state: ServerState, *rest: Any) -> None:
            states.append(state)
            before(self, state, *rest)

        return commit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "commit", remember(Journal.commit))
        patch.setattr(Folder, "read", refuse_one_a_round(Folder.read))
        run = simulate(plan, tmp_path / "run")
    _, x = start_of(run)
    c = np.zeros(len(x))
    for state in states:
        mean = (x.astype(np.float64) - state.weights) / 0.1
        c = c + 3 / 6 * (mean / 3 - c)
        x = state.weights
        assert state.control is not None
        np.testing.assert_allclose(state.control, c, atol=1e-4)
    assert [m["replies"] for m in run.read_metrics()] == [2, 2, 2, 2]


def refuse_one_a_round(read: Callable[..., Any]) -> Callable[..., Any]:
    from reticent.core.errors import PayloadError

    refused: set[str] = set()

    def reading(self: Folder, reply: Any) -> Any:
        if reply.metadata.group_id not in refused:
            refused.add(reply.metadata.group_id)
            raise PayloadError("stands for a reply that was lost")
        return read(self, reply)

    return reading


def test_a_device_that_lost_its_state_goes_on_and_one_with_a_damaged_file_does_not(
    tmp_path: Path,
) -> None:
    plan = parse_plan("", [*OFF, SCAFFOLD, PERSONAL, "federation.retries=0"])

    def harm(action: Callable[[Path], object], folder: Path) -> Run:
        def between(metrics: dict[str, Any]) -> None:
            if metrics["round"] == 2:
                for path in folder.rglob("*.safetensors"):
                    if path.parent.parent.name in ("control", "personal"):
                        action(path)

        return simulate(plan, folder, progress=between)

    assert len(harm(Path.unlink, tmp_path / "lost").read_metrics()) == 4
    with pytest.raises(NetworkError, match="round 3: 0 of 3"):
        harm(lambda path: path.write_bytes(b"torn"), tmp_path / "torn")


SHARES = ["privacy.noise_multiplier=1.0", "federation.steps_per_round=1"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*LOCAL, PROXIMAL, "federation.steps_per_round=1"], "must be 0 when steps_per_round is 1"),
        ([*SHARES, PROXIMAL], "must be 0 when steps_per_round is 1"),
        ([*LOCAL, "federation.local.proximal=10.1"], r"at most 1 / learning_rate = 10: a step"),
        ([*LOCAL, PROXIMAL, SCAFFOLD], "must be 0 when scaffold is true"),
        ([*SHARES, SCAFFOLD], "different sums of the same shares"),
        (
            [*CLIENT, SCAFFOLD, "federation.sampling=poisson"],
            r"scaffold=true: must be false .*number of replies, which the noise does not cover",
        ),
        (
            [*CLIENT, SCAFFOLD, "federation.sampling=poisson", "privacy.secret_cohort=true"],
            r"scaffold=true: must be false .*number of replies, which the noise does not cover",
        ),
        ([*SHARES, PERSONAL], "a personal layer is not broadcast"),
        (["federation.server.adaptivity=1e-3"], 'left out when kind is "sgd"'),
        (["federation.server.second_momentum=0.9"], "forget squared gradients"),
        (
            ["federation.server.kind=adagrad", "federation.server.second_momentum=0.9"],
            "forget squared gradients",
        ),
    ],
)
def test_what_has_no_effect_or_no_proof_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_plan("", [*SMALL, *overrides])


@pytest.mark.parametrize("codec", ["topk:0.1", "randk", "sign", "drive", "lowrank:2", "int4"])
def test_codecs_whose_error_grows_with_the_update_are_refused_with_control_variates(
    codec: str,
) -> None:
    chosen = [*SMALL, *LOCAL, f'updates.codec=["{codec}"]']
    check_codecs(parse_plan("", chosen))
    with pytest.raises(PlanError, match=r"scaffold=true.*its error grows with the update"):
        check_codecs(parse_plan("", [*chosen, SCAFFOLD]))


def test_a_dither_needs_a_public_step_or_eight_bits_with_control_variates() -> None:
    four, eight = 'updates.codec=["dither4"]', 'updates.codec=["dither8","ans"]'
    with pytest.raises(PlanError, match=r"into the next one; use identity or 8 bits$"):
        check_codecs(parse_plan("", [*OFF, SCAFFOLD, four]))
    for given in ([*OFF, eight], [*SMALL, *CLIENT, four], [*SMALL, *LOCAL, eight]):
        check_codecs(parse_plan("", [*given, SCAFFOLD]))


@pytest.mark.parametrize(
    ("names", "message"),
    [('["head"]', "'head', which is no layer of the student"), ("all", "must leave a layer")],
)
def test_personal_layers_must_be_some_layers_of_the_student(
    names: str, message: str, tmp_path: Path
) -> None:
    plan = parse_plan("", OFF)
    layout = Layout.of(student_model(load_task(plan.task, 0), plan))
    if names == "all":
        names = str([n.partition(".")[0] for n in layout.names]).replace("'", '"')
    with pytest.raises(PlanError, match=message):
        simulate(parse_plan("", [*OFF, f"federation.local.personal={names}"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
