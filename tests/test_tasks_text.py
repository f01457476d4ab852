"""The next character of a role: windows, owners, and the file that travels with the package."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from reticent.core.errors import DataError
from reticent.core.plan import Partition, TaskSection
from reticent.core.tasks import OwnedTask, Task, load_task, text
from reticent.core.tasks.sources import EMBEDDED, read_embedded

NATURAL = TaskSection(
    name="text", clients=191, public_examples=5000, partition=Partition(kind="natural")
)


def test_examples_are_windows_of_a_role_and_the_next_character() -> None:
    codes = np.arange(2 * 5000).reshape(2, 5000) % 251
    contexts, following = text._windows(codes.astype(np.uint8))
    assert contexts.shape == (2 * text.EXAMPLES, 40)
    for row in range(2):
        for k in (0, 1, 300, text.EXAMPLES - 1):
            start, i = k * 8, row * text.EXAMPLES + k
            assert contexts[i].tolist() == codes[row, start : start + 40].tolist()
            assert following[i] == codes[row, start + 40]
    assert (text.EXAMPLES - 1) * 8 + 40 < 5000 <= text.EXAMPLES * 8 + 40


def test_a_client_is_a_role() -> None:
    task = load_task(NATURAL, 0)
    assert isinstance(task, Task)
    assert isinstance(task, OwnedTask)
    assert (task.classes, task.input_shape, task.nominal_examples) == (36, (40,), 620)
    one, public, test = task.client(7), task.public(), task.test()
    assert [len(e.labels) for e in (one, public, test)] == [620, 5000, 60 * 620]
    assert one.inputs.dtype == torch.float32
    assert float(one.inputs.min()) >= 0 and float(test.inputs.max()) <= 35
    # Consecutive windows of one role, so each holds the character that the one before predicts.
    assert torch.equal(one.inputs[1:, 32].long(), one.labels[:-1])
    assert not torch.equal(one.inputs[1:, 33].long(), one.labels[:-1])


def test_the_test_roles_are_the_same_for_every_seed_and_the_public_ones_are_not() -> None:
    first, other = load_task(NATURAL, 0), load_task(NATURAL, 1)
    assert torch.equal(first.test().inputs, other.test().inputs)
    assert not torch.equal(first.public().inputs, other.public().inputs)


def test_the_text_is_readable() -> None:
    codes = read_embedded("plays-roles.idx.gz")
    assert codes.shape == (text.ROLES, text.LENGTH)
    letters = "".join(text.ALPHABET[c] for c in codes.flatten())
    assert "good day to you, gentle lord archbishop;\nand so to you, lord hast" in letters
    assert letters.count("romeo") > 10
    assert set(letters) == set(text.ALPHABET)


def test_the_notice_travels_with_the_file() -> None:
    notice = (EMBEDDED / "LICENSE-plays.txt").read_text(encoding="utf-8")
    assert "public domain" in notice
    assert "Copyright 2019 Sean Stewart" in notice


def test_construction_reads_nothing_and_pickles_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OwnedTask, "_arrays", property(lambda _: pytest.fail("data were read")))
    assert len(pickle.dumps(load_task(NATURAL, 0))) < 3000


def test_sections_that_roles_cannot_serve_are_refused() -> None:
    with pytest.raises(DataError, match=r"public_examples=123381: must be at most 123380"):
        load_task(TaskSection(name="text", public_examples=123_381), 0)
    with pytest.raises(DataError, match=r"task\.clients=123381 must be at most 123380"):
        load_task(TaskSection(name="text", public_examples=1, clients=123_381), 0)


def _script() -> ModuleType:
    path = Path(__file__).parent.parent / "scripts" / "embed_data.py"
    spec = importlib.util.spec_from_file_location("embed_data", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_keeps_what_is_spoken_and_nothing_else() -> None:
    script = _script()
    play = (
        "# Hamlet\n\n## ACT I\n\n_Enter GHOST_\n\n**HAMLET**  \nWhere wilt thou lead me?  \n"
        "_Exit_\nSpeak_ [Aside]_—I'll go!\n\n### SCENE II\nA room.\n**GHOST**  \nMark me.\n"
    )
    said = script.lines(play)
    assert said == [
        ("HAMLET", "Where wilt thou lead me?"),
        ("HAMLET", "Speak_ [Aside]_—I'll go!"),
        ("GHOST", "Mark me."),
    ]
    assert script.plain(said[1][1]) == "speak-i'll go!"
    assert script.plain("§ 42 Ünd & $\n") == " nd  \n".replace(" nd", "  nd")
