"""Run something on an emulated aarch64: Debian's Python, wheels of the index, qemu's user mode.

    python scripts/aarch64.py FOLDER -m pytest -q tests/test_codec_rans.py
    python scripts/aarch64.py FOLDER -c 'import torch; print(torch.__version__)'

Needs Debian or Ubuntu, with ``qemu-user-static`` installed. The first time it fetches some 16 MB of
Debian packages and 280 MB of wheels into FOLDER; nothing is installed on this machine. What follows
is given to the emulated Python, which sees this work tree. It is slow: some ten times and more.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from wheels import options, resolve

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("core", "compression", "privacy", "client", "server", "simulations", "cli", "tests")
DEBIAN = ("python3.11", "libpython3.11-stdlib", "libstdc++6", "libgomp1")
EXTRA = ["torch<2.11", "pytest>=8.2", "hypothesis>=6.100"]


def unpack(folder: Path) -> None:
    """Fetch Debian's Python for arm64 with its libraries, and unpack it into ``folder/root``."""
    state, cache = folder / "apt" / "state", folder / "apt" / "cache"
    (state / "lists" / "partial").mkdir(parents=True)
    (cache / "archives" / "partial").mkdir(parents=True)
    (state / "status").touch()
    settings = {"APT::Architecture": "arm64", "APT::Architectures": "arm64"}
    settings |= {"APT::Install-Recommends": "false", "Dir::State": str(state)}
    settings |= {"Dir::State::status": str(state / "status"), "Dir::Cache": str(cache)}
    apt = ["apt-get", *(f"-o{key}={value}" for key, value in settings.items())]
    subprocess.run([*apt, "update"], check=True)
    subprocess.run([*apt, "install", "--yes", "--download-only", *DEBIAN], check=True)
    for package in sorted((cache / "archives").glob("*.deb")):
        subprocess.run(["dpkg", "-x", package, folder / "root"], check=True)


def install(folder: Path) -> None:
    """Put the wheels of the base install and of the tests into ``folder/site``."""
    wheels, missing = resolve("aarch64", "3.11", EXTRA)
    if missing:
        raise SystemExit(f"no wheel for aarch64: {', '.join(missing)}")
    command = [word for word in options("aarch64", "3.11") if word not in ("--dry-run", "unused")]
    at = command.index("--target") + 1
    command[at:at] = [str(folder / "site"), "--no-deps", "--no-compile"]
    subprocess.run([*command, *wheels.values()], check=True)


def main() -> None:
    """Make what is missing in FOLDER, and run its Python."""
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    folder = Path(sys.argv[1]).resolve()
    if not (folder / "root").exists():
        unpack(folder)
    if not (folder / "site").exists():
        install(folder)
    path = os.pathsep.join(map(str, (folder / "site", *(ROOT / source for source in SOURCES))))
    settings = {"PYTHONPATH": path, "PYTHONPYCACHEPREFIX": str(folder / "pyc")}
    python = folder / "root" / "usr" / "bin" / "python3.11"
    emulator = ["qemu-aarch64-static", "-L", str(folder / "root"), str(python)]
    os.execvpe(emulator[0], [*emulator, *sys.argv[2:]], os.environ | settings)


if __name__ == "__main__":
    main()
