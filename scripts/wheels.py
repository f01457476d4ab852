"""Which wheels the base install needs on another architecture, from the package index's metadata.

    python scripts/wheels.py [--machine aarch64] [--python 3.11] [--forbid ray pandas ...]

Resolves what `pyproject.toml` depends on for Linux on that machine, wheels only, with pip's own
resolver and without downloading a wheel's content where the index serves its metadata apart. Fails
if something has no wheel, or if a forbidden package is among them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
HEAVY = ("ray", "pandas", "pyarrow", "matplotlib", "torchvision")
GLIBC = ("2_17", "2_27", "2_28", "2_31", "2_34")


def resolve(machine: str, python: str) -> dict[str, str]:
    """Return the file name of every wheel by the name of its package."""
    wanted = tomllib.loads(PROJECT.read_text())["project"]["dependencies"]
    platforms = [f"manylinux_{glibc}_{machine}" for glibc in GLIBC]
    platforms += [f"manylinux2014_{machine}", f"linux_{machine}"]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["--report", "-", "--only-binary=:all:", "--target", "unused"]
    command += ["--implementation", "cp", "--python-version", python]
    command += [word for platform in platforms for word in ("--platform", platform)]
    done = subprocess.run([*command, *wanted], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout)["install"]
    return {p["metadata"]["name"]: p["download_info"]["url"].rpartition("/")[2] for p in found}


def main() -> None:
    """Print the wheels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machine", default="aarch64")
    parser.add_argument("--python", default="3.11")
    parser.add_argument("--forbid", nargs="*", default=HEAVY)
    given = parser.parse_args()
    wheels = resolve(given.machine, given.python)
    for name in sorted(wheels, key=str.lower):
        print(f"{name:24} {wheels[name]}")
    native = sum("none-any" not in wheel for wheel in wheels.values())
    print(f"{len(wheels)} wheels, {native} of them for {given.machine}")
    if heavy := sorted({name.lower() for name in wheels} & set(given.forbid)):
        raise SystemExit(f"forbidden: {', '.join(heavy)}")


if __name__ == "__main__":
    main()
