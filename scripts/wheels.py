"""Which wheels the base install needs on another architecture, and how large they are.

    python scripts/wheels.py [--machine aarch64] [--python 3.11] [--with 'torch<2.11'] [--forbid N…]

Resolves what `pyproject.toml` depends on for Linux on that machine, wheels only, with pip's own
resolver and without downloading a wheel's content where the index serves its metadata apart. What
has no wheel is named and left out. Fails if there is such a package, or if a forbidden one is among
those that are needed.

pip chooses wheels by ``--platform``, but evaluates markers such as ``platform_machine == "x86_64"``
for the machine that it runs on. Its resolver is therefore run with the other machine's environment.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
HEAVY = ("ray", "pandas", "pyarrow", "matplotlib", "torchvision")
GLIBC = ("2_17", "2_24", "2_27", "2_28", "2_31", "2_34")
PIP = """
import json, sys
from pip._vendor.packaging import markers
own, other = markers.default_environment, json.loads(sys.argv.pop(1))
markers.default_environment = lambda: own() | other
from pip._internal.cli.main import main
sys.exit(main())
"""


def resolve(machine: str, python: str, extra: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return the address of every wheel by its package's name, and what has no wheel."""
    project: list[str] = tomllib.loads(PROJECT.read_text())["project"]["dependencies"]
    wanted = [*project, *extra]
    missing: list[str] = []
    while True:
        done = subprocess.run(
            [*options(machine, python), *wanted], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            found = json.loads(done.stdout)["install"]
            return {p["metadata"]["name"]: p["download_info"]["url"] for p in found}, missing
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
    environment = {"platform_machine": machine, "platform_system": "Linux", "sys_platform": "linux"}
    environment |= {"python_version": python, "python_full_version": f"{python}.0"}
    command = [sys.executable, "-c", PIP, json.dumps(environment)]
    command += ["install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["--report", "-", "--only-binary=:all:", "--target", "unused"]
    command += ["--implementation", "cp", "--python-version", python]
    return command + [word for platform in platforms for word in ("--platform", platform)]


def size(url: str) -> int:
    """Return how many bytes a wheel has, without reading it."""
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=60) as answer:
        return int(answer.headers["Content-Length"])


def main() -> None:
    """Print the wheels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machine", default="aarch64")
    parser.add_argument("--python", default="3.11")
    parser.add_argument("--with", dest="extra", nargs="*", default=[], help="more requirements")
    parser.add_argument("--forbid", nargs="+", default=HEAVY, help="must not be there")
    given = parser.parse_args()
    wheels, missing = resolve(given.machine, given.python, given.extra)
    sizes = {name: size(url) for name, url in wheels.items()}
    for name in sorted(wheels, key=str.lower):
        print(f"{name:24} {sizes[name] / 1e6:8.2f} MB  {wheels[name].rpartition('/')[2]}")
    native = sum("none-any" not in url for url in wheels.values())
    total = sum(sizes.values()) / 1e6
    print(f"{len(wheels)} wheels, {native} of them for {given.machine}, {total:.0f} MB")
    if heavy := sorted({name.lower() for name in wheels} & set(given.forbid)):
        raise SystemExit(f"forbidden: {', '.join(heavy)}")
    if missing:
        raise SystemExit(f"no wheel for {given.machine}: {', '.join(missing)}")


if __name__ == "__main__":
    main()
