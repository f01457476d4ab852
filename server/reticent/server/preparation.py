"""Before the first round: teacher, student, mask and the public constants, from public data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from reticent.compression.fold import folded
from reticent.compression.structure import student_of
from reticent.core.errors import DataError
from reticent.core.plan import Plan, Student
from reticent.core.protocol import Constants
from reticent.core.tasks import Examples, Task
from reticent.core.update import Layout, Vector

from .distillation import Lesson, Teachers, lesson, new_student, untrained_teacher
from .journal import Journal
from .possible import require_possible
from .pruning import Stretch, Train, pruned
from .public_training import accuracy, soft_labels, train_public
from .shrinking import constants_of, parameters_of, reshaped, sketch, with_adapters

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
        tested: Test accuracies of its models, once they are known: those of runs that begin alike
            are the same, and a large teacher takes seconds to test.
    """

    teacher: nn.Module
    public_only: nn.Module
    student: nn.Module
    layout: Layout
    weights: Vector
    constants: bytes
    tested: dict[str, float] = field(default_factory=dict)

    @property
    def constants_digest(self) -> str:
        """SHA-256 of ``constants``."""
        return hashlib.sha256(self.constants).hexdigest()


@dataclass(frozen=True)
class Prepared:
    """What was made from public data before, for many plans of the same tasks in one process.

    Attributes:
        teachers: Trained teachers.
        lessons: Teachers with dense students, and
        starts: starting points, each by everything of a plan that decides it.
    """

    teachers: Teachers = field(default_factory=dict)
    lessons: dict[str, Lesson] = field(default_factory=dict)
    starts: dict[str, Start] = field(default_factory=dict)


def prepare(
    plan: Plan, task: Task, journal: Journal, say: Say, prepared: Prepared | None = None
) -> Start:
    """Return the run's starting point: read from the journal, or made from public data and stored.

    The same plan on the same machine gives the same bits, with ``prepared`` too: plans that differ
    in what their rounds do only (promise, codec, strategy) then begin with the same models, which
    are trained once; so are the teacher and the dense student of plans that differ in what is then
    done to the student.

    Raises:
        PlanError: If the student cannot be what the plan says.
        DataError: If a model that the task makes was trained before, or the task has no public or
            no test examples.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(_THREADS)
    try:
        return _restored(plan, task, journal) or _stored(plan, task, journal, say, prepared)
    finally:
        torch.set_num_threads(threads)


def _stored(plan: Plan, task: Task, journal: Journal, say: Say, prepared: Prepared | None) -> Start:
    require_possible(plan, task)
    if prepared is None:
        start = _made(plan, task, say, None)
    else:
        # How weights are quantized, which is after all of this, decides nothing.
        key = _deciding(plan, set(Student.model_fields) - {"quantize"})
        key += f" {plan.federation.local.personal}"
        if key not in prepared.starts:
            prepared.starts[key] = _made(plan, task, say, prepared)
        known = prepared.starts[key]
        # The rounds write into these.
        start = replace(known, student=deepcopy(known.student), weights=known.weights.copy())
    _store(journal, start.teacher, start.public_only, start.student, start.constants)
    return start


def _deciding(plan: Plan, student: set[str]) -> str:
    """Return the parts of a plan that decide what is made of public data, with these of student."""
    parts = {"seed": True, "task": True, "teacher": True, "student": student}
    return json.dumps(plan.model_dump(mode="json", include=parts), sort_keys=True)


def _taught(plan: Plan, task: Task, public: Examples, prepared: Prepared | None) -> Lesson:
    if prepared is None:
        return lesson(plan, task, public)
    key = _deciding(plan, {"model", "epochs", "learning_rate", "distill"})
    if key not in prepared.lessons:
        prepared.lessons[key] = lesson(plan, task, public, prepared.teachers)
    taught = prepared.lessons[key]
    return Lesson(taught.teacher, deepcopy(taught.student), taught.examples)


def _made(plan: Plan, task: Task, say: Say, prepared: Prepared | None) -> Start:
    public = task.public()
    if not len(public.labels):
        raise DataError(f"task {task.name}: public() has no examples: the student starts from them")
    if not len(task.test().labels):
        raise DataError(f"task {task.name}: test() has no examples: accuracy is counted on them")
    if plan.student.reshaped:
        # What cannot be done is refused now rather than after training.
        constants_of(plan, task, sketch(plan, task), b"", np.zeros((0, 0), dtype=np.float32))
    taught = _taught(plan, task, public, prepared)
    teacher, examples = taught.teacher, taught.examples
    count = plan.task.public_labels or len(public.labels)
    say(f"teacher trained on {count} public examples")
    public_only = folded(taught.student)
    train = _trainer(plan, teacher, examples)
    student = reshaped(plan, public_only, examples, train, say)
    student, mask = pruned(plan, student, lambda: new_student(plan, task), examples, train)
    # A copy even when nothing is changed: the rounds write into the student, not into the baseline.
    student = with_adapters(plan, deepcopy(student))
    layout = Layout.of(student, mask)
    soft = _soft_labels(plan, task, teacher, examples)
    constants = constants_of(plan, task, student, layout.kept, soft).encode()
    say(f"student trained: {layout.size:,} of {layout.total:,} parameters kept")
    return Start(teacher, public_only, student, layout, layout.read(student), constants)


def _trainer(plan: Plan, teacher: nn.Module, examples: Examples) -> Train:
    """Return what trains a changed student on public data."""
    distill = plan.student.distill.tuning

    def train(model: nn.Module, name: str, stretch: Stretch) -> object:
        return train_public(
            model,
            examples,
            stretch.epochs,
            stretch.learning_rate,
            plan.seed,
            name,
            teacher,
            distill,
            span=stretch.span,
        )

    return train


def _structure(plan: Plan, task: Task) -> nn.Module:
    return folded(new_student(plan, task).eval())


def _soft_labels(plan: Plan, task: Task, teacher: nn.Module, examples: Examples) -> np.ndarray:
    distill = plan.student.distill
    if distill.kind == "none" or distill.local_weight == 0:
        return np.zeros((0, 0), dtype=np.float32)
    return soft_labels(teacher, examples, task.classes, distill.temperature).numpy()


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
    teacher = _loaded(untrained_teacher(plan, task), journal, "teacher")
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


def parameter_counts(start: Start, final: nn.Module) -> dict[str, int]:
    """Return how many parameters a run trains and sends, and has: here, before, and deployed."""
    return {
        "kept": start.layout.size,
        "total": start.layout.total,
        "before": parameters_of(start.public_only),
        "deployed": parameters_of(final),
    }


def start_accuracies(start: Start, task: Task) -> dict[str, float]:
    """Return test accuracies of the teacher and of the public-only students, before any round."""
    if not start.tested:
        test = task.test()
        start.tested["teacher"] = accuracy(start.teacher, test)
        start.tested["public_only"] = accuracy(start.public_only, test)
        start.tested["public_only_pruned"] = accuracy(start.student, test)
    return dict(start.tested)
