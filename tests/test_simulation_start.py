"""What a simulation does not load: it would take longer than its first rounds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SLOW = ("torch._dynamo", "sqlalchemy", "opacus", "mlflow", "ray")
"""Not needed before the report: torch's compiler, Flower's databases, engines and sinks."""

RUN = f"""
import sys
from pathlib import Path
from reticent.core.plan import parse_plan
from reticent.simulations.simulate import simulate

assert "scipy.stats" not in sys.modules, "scipy.stats"
settings = ["task.name=digits", "task.clients=20", "teacher.epochs=1", "student.epochs=1",
            "federation.rounds=1", "federation.clients_per_round=10", "engine.workers=1"]

def progress(metrics):
    found.extend(name for name in {SLOW!r} if name in sys.modules)

found = []
simulate(parse_plan("", settings), Path(sys.argv[1]), progress=progress)
assert not found, found
"""


def test_public_training_and_rounds_load_nothing_that_they_do_not_need(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN, str(tmp_path / "run")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
