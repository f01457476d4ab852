"""Before the first round: teacher, student, mask and the public constants, from public data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from reticent.compression.deployable import require_dynamic_form
from reticent.compression.fold import folded
from reticent.compression.prune import magnitude_mask
from reticent.core.errors import DataError
from reticent.core.plan import Plan
from reticent.core.protocol import Constants
from reticent.core.seeds import derive_key
from reticent.core.tasks import Task
from reticent.core.update import Layout, Vector

from .journal import Journal
from .public_training import accuracy, soft_labels, train_public

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
        student: The student that is trained federatedly, folded and pruned.
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

    Raises:
        PlanError: If the student is to be quantized dynamically and cannot be.
    """
    require_dynamic_form(_structure(plan, task), plan.student.quantize)
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
    teacher = _seeded(plan, "teacher", task.teacher)
    section = plan.teacher
    train_public(teacher, public, section.epochs, section.learning_rate, plan.seed, "teacher")
    say(f"teacher trained on {len(public.labels)} public examples")
    dense = _train_student(plan, task, teacher, _raw_student(plan, task), "student")
    public_only = folded(dense)
    mask = _mask(plan, public_only)
    # A copy even when nothing is pruned: the rounds write into the student, not into the baseline.
    student = (
        deepcopy(public_only) if mask is None else _tuned(plan, task, teacher, public_only, mask)
    )
    layout = Layout.of(student, mask)
    constants = Constants(layout.kept, _soft_labels(plan, task, teacher)).encode()
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


def _mask(plan: Plan, student: nn.Module) -> np.ndarray | None:
    prune = plan.student.prune
    if prune.kind == "none" or prune.sparsity == 0:
        return None
    return magnitude_mask(student, prune.sparsity)


def _tuned(
    plan: Plan, task: Task, teacher: nn.Module, dense: nn.Module, mask: np.ndarray
) -> nn.Module:
    """Return the pruned student, tuned on public data with the mask held."""
    student = _structure(plan, task)
    layout = Layout.of(student, mask)
    layout.write(student, layout.read(dense))
    kept = torch.from_numpy(mask).split(list(layout.sizes))
    for parameter, part in zip(student.parameters(), kept, strict=True):
        shaped = part.view_as(parameter).to(torch.float32)
        parameter.register_hook(lambda gradient, shaped=shaped: gradient * shaped)
    section = plan.student
    distill = section.distill if section.distill.kind == "response" else None
    train_public(
        student,
        task.public(),
        max(1, section.epochs // 4),
        section.learning_rate / 10,
        plan.seed,
        "pruned",
        teacher if distill else None,
        distill,
    )
    # Weight decay and the hooks leave pruned coordinates at zero; a fresh copy drops the hooks.
    final = _structure(plan, task)
    layout.write(final, layout.read(student))
    return final.eval()


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
    student = _loaded(_structure(plan, task), journal, "start")
    constants = encoded["bytes"].tobytes()
    bare = Layout.of(student)
    layout = Layout(bare.names, bare.shapes, Constants.decode(constants).kept)
    return Start(teacher, public_only, student, layout, layout.read(student), constants)


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
