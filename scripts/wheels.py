"""Which wheels the base install needs on another architecture, from the package index's metadata.

    python scripts/wheels.py [--machine aarch64] [--python 3.11] [--forbid ray pandas ...]

Resolves what `pyproject.toml` depends on for Linux on that machine, wheels only, with pip's own
resolver and without downloading a wheel's content where the index serves its metadata apart. What
has no wheel is named and left out. Fails if there is such a package, or if a forbidden one is among
those that are needed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
HEAVY = ("ray", "pandas", "pyarrow", "matplotlib", "torchvision")
GLIBC = ("2_17", "2_27", "2_28", "2_31", "2_34")


def resolve(machine: str, python: str) -> tuple[dict[str, str], list[str]]:
    """Return the file name of every wheel by its package's name, and what has no wheel."""
    wanted: list[str] = tomllib.loads(PROJECT.read_text())["project"]["dependencies"]
    missing: list[str] = []
    while True:
        done = subprocess.run(
            [*options(machine, python), *wanted], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            found = json.loads(done.stdout)["install"]
            urls = {p["metadata"]["name"]: p["download_info"]["url"] for p in found}
            return {name: url.rpartition("/")[2] for name, url in urls.items()}, missing
        absent = re.search(r"No matching distribution found for ([A-Za-z0-9_.-]+)", done.stderr)
        left = [w for w in wanted if absent is None or not w.startswith(absent.group(1))]
        if absent is None or left == wanted:
            raise SystemExit(done.stderr)
        missing.append(absent.group(1))
        wanted = left


def options(machine: str, python: str) -> list[str]:
    """Return pip's command, without what to install."""
    platforms = [f"manylinux_{glibc}_{machine}" for glibc in GLIBC]
    platforms += [f"manylinux2014_{machine}", f"linux_{machine}"]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["--report", "-", "--only-binary=:all:", "--target", "unused"]
    command += ["--implementation", "cp", "--python-version", python]
    return command + [word for platform in platforms for word in ("--platform", platform)]


def main() -> None:
    """Print the wheels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machine", default="aarch64")
    parser.add_argument("--python", default="3.11")
    parser.add_argument("--forbid", nargs="*", default=HEAVY)
    given = parser.parse_args()
    wheels, missing = resolve(given.machine, given.python)
    for name in sorted(wheels, key=str.lower):
        print(f"{name:24} {wheels[name]}")
    native = sum("none-any" not in wheel for wheel in wheels.values())
    print(f"{len(wheels)} wheels, {native} of them for {given.machine}")
    if heavy := sorted({name.lower() for name in wheels} & set(given.forbid)):
        raise SystemExit(f"forbidden: {', '.join(heavy)}")
    if missing:
        raise SystemExit(f"no wheel for {given.machine}: {', '.join(missing)}")


if __name__ == "__main__":
    main()
