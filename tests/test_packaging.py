"""The wheel and the sdist carry everything that the package needs at run time."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.packaging

NEEDED = {
    "reticent/core/py.typed",
    "reticent/cli/main.py",
    "reticent/core/data/sums.json",
    "reticent/core/data/fashion-train-images.idx.gz",
    "reticent/core/data/digits-images.idx.gz",
    "reticent/core/data/plays-roles.idx.gz",
    "reticent/privacy/report/template.html.j2",
    "reticent/privacy/report/report.md.j2",
    "reticent/privacy/report/compare.html.j2",
    "reticent/privacy/report/compare.md.j2",
    "reticent/privacy/report/report-schema-2.json",
    "reticent/privacy/report/style.css",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    # From the sdist the wheel is built, so what the sdist lacks the wheel lacks too.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return out


def test_the_wheel_carries_data_templates_licences_and_type_markers(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert names >= NEEDED
    assert any("licenses" in n and n.endswith("LICENSE") for n in names)
    assert any("fashion" in n.lower() and "licen" in n.lower() for n in names)
    assert not any(n.startswith(("tests/", "core/")) for n in names)


def test_the_sdist_carries_the_tests_and_the_documentation(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {n.split("/", 1)[-1] for n in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "tests/test_packaging.py"} <= names
    assert {f"core/{n}" for n in NEEDED if n.startswith("reticent/core")} <= names


def test_the_installed_wheel_runs_from_another_folder(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
    subprocess.run([*pip, str(wheel)], check=True, timeout=300)
    code = (
        "import reticent.core.plan as p, reticent.core.tasks as t\n"
        "plan = p.parse_plan('', ['task.clients=5', 'federation.clients_per_round=5'])\n"
        "task = t.load_task(plan.task, 0)\n"
        "print(p.__file__, len(task.test().labels), len(task.client(0).labels))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(target)}
    out = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=120,
    ).stdout
    assert str(target) in out, "the editable install was used instead of the wheel"
    assert out.split()[1:] == ["2000", "1800"]
