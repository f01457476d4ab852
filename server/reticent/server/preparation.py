"""Before the first round: teacher, student, mask and the public constants, from public data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from reticent.compression.fold import folded
from reticent.compression.structure import student_of
from reticent.core.errors import DataError
from reticent.core.plan import Plan
from reticent.core.protocol import Constants
from reticent.core.seeds import derive_key
from reticent.core.tasks import Task
from reticent.core.update import Layout, Vector

from .journal import Journal
from .pruning import Stretch, Train, pruned
from .public_training import accuracy, soft_labels, train_public
from .shrinking import constants_of, reshaped, sketch, with_adapters

# Fixed, because the order of float32 additions, and so the model, depends on it; one, because two
# threads that wait for each other on a busy machine are many times slower than one.
_THREADS = 1

Say = Callable[[str], None]


@dataclass(frozen=True)
class Start:
    """What the federation begins with.

    Attributes:
        teacher: Trained on the public split.
        public_only: The dense student trained on the public split: the baseline to beat.
        student: The student that is trained federatedly, folded, reshaped and pruned.
        layout: Its layout, with the mask.
        weights: Its parameters, float32 ``(layout.size,)``.
        constants: Encoded :class:`Constants`.
    """

    teacher: nn.Module
    public_only: nn.Module
    student: nn.Module
    layout: Layout
    weights: Vector
    constants: bytes

    @property
    def constants_digest(self) -> str:
        """SHA-256 of ``constants``."""
        return hashlib.sha256(self.constants).hexdigest()


def prepare(plan: Plan, task: Task, journal: Journal, say: Say) -> Start:
    """Return the run's starting point: read from the journal, or made from public data and stored.

    The same plan on the same machine gives the same bits.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(_THREADS)
    try:
        return _restored(plan, task, journal) or _made(plan, task, journal, say)
    finally:
        torch.set_num_threads(threads)


def _made(plan: Plan, task: Task, journal: Journal, say: Say) -> Start:
    public = task.public()
    if not len(public.labels):
        raise DataError(f"task {task.name}: public() has no examples: the student starts from them")
    if plan.student.reshaped:
        # What cannot be done is refused now rather than after training.
        constants_of(plan, task, sketch(plan, task), b"", np.zeros((0, 0), dtype=np.float32))
    teacher = _seeded(plan, "teacher", task.teacher)
    section = plan.teacher
    train_public(teacher, public, section.epochs, section.learning_rate, plan.seed, "teacher")
    say(f"teacher trained on {len(public.labels)} public examples")
    dense = _train_student(plan, task, teacher, _raw_student(plan, task), "student")
    public_only = folded(dense)
    train = _trainer(plan, task, teacher)
    student = reshaped(plan, public_only, public, train, say)
    student, mask = pruned(plan, student, lambda: _raw_student(plan, task), public, train)
    # A copy even when nothing is changed: the rounds write into the student, not into the baseline.
    student = with_adapters(plan, deepcopy(student))
    layout = Layout.of(student, mask)
    soft = _soft_labels(plan, task, teacher)
    constants = constants_of(plan, task, student, layout.kept, soft).encode()
    say(f"student trained: {layout.size:,} of {layout.total:,} parameters kept")
    _store(journal, teacher, public_only, student, constants)
    return Start(teacher, public_only, student, layout, layout.read(student), constants)


def _raw_student(plan: Plan, task: Task) -> nn.Module:
    return _seeded(plan, "student", lambda: task.student(plan.student.model))


def _seeded(plan: Plan, name: str, make: Callable[[], nn.Module]) -> nn.Module:
    """Call ``make`` with torch's global generator seeded, as layer initialisers draw from it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(derive_key(plan.seed, "init", name)[:8], "big") >> 1)
        return make()


def _train_student(
    plan: Plan, task: Task, teacher: nn.Module, student: nn.Module, name: str
) -> nn.Module:
    section = plan.student
    distill = section.distill if section.distill.kind == "response" else None
    return train_public(
        student,
        task.public(),
        section.epochs,
        section.learning_rate,
        plan.seed,
        name,
        teacher if distill else None,
        distill,
    )


def _trainer(plan: Plan, task: Task, teacher: nn.Module) -> Train:
    """Return what trains a changed student on public data."""
    section = plan.student
    distill = section.distill if section.distill.kind == "response" else None

    def train(model: nn.Module, name: str, stretch: Stretch) -> object:
        return train_public(
            model,
            task.public(),
            stretch.epochs,
            stretch.learning_rate,
            plan.seed,
            name,
            teacher if distill else None,
            distill,
            stretch.span,
        )

    return train


def _structure(plan: Plan, task: Task) -> nn.Module:
    return folded(_raw_student(plan, task).eval())


def _soft_labels(plan: Plan, task: Task, teacher: nn.Module) -> np.ndarray:
    distill = plan.student.distill
    if distill.kind == "none" or distill.local_weight == 0:
        return np.zeros((0, 0), dtype=np.float32)
    return soft_labels(teacher, task.public(), task.classes, distill.temperature).numpy()


def _store(
    journal: Journal, teacher: nn.Module, public_only: nn.Module, student: nn.Module, data: bytes
) -> None:
    for name, model in (("teacher", teacher), ("public-only", public_only), ("start", student)):
        journal.store(name, {k: v.numpy().copy() for k, v in model.state_dict().items()})
    journal.store("constants", {"bytes": np.frombuffer(data, dtype=np.uint8)})


def _restored(plan: Plan, task: Task, journal: Journal) -> Start | None:
    encoded = journal.restore("constants")
    if encoded is None:
        return None
    teacher = _loaded(task.teacher(), journal, "teacher")
    public_only = _loaded(_structure(plan, task), journal, "public-only")
    data = encoded["bytes"].tobytes()
    constants = Constants.decode(data)
    student = _loaded(student_of(task, plan, constants), journal, "start")
    bare = Layout.of(student)
    layout = Layout(bare.names, bare.shapes, constants.kept)
    return Start(teacher, public_only, student, layout, layout.read(student), data)


def _loaded(model: nn.Module, journal: Journal, name: str) -> nn.Module:
    arrays = journal.restore(name) or {}
    model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in arrays.items()})
    return model.eval()


def start_accuracies(start: Start, task: Task) -> dict[str, float]:
    """Return test accuracies of the teacher and of the public-only students."""
    test = task.test()
    return {
        "teacher": accuracy(start.teacher, test),
        "public_only": accuracy(start.public_only, test),
        "public_only_pruned": accuracy(start.student, test),
    }
