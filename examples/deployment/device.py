"""A device with today's means: unpack a bundle, and the command that joins its server.

    python device.py BUNDLE FOLDER

FOLDER gets the files that ``flower-supernode`` takes, and the device's ledger when it runs; it must
outlive the SuperNode, and is one device's alone. The command is printed.
"""

from __future__ import annotations

import shlex
import sys
import tomllib
from pathlib import Path

from reticent.core.bundle import Bundle, is_signed_policy, read_bundle
from reticent.core.signing import read_public_key, write_new


def unpack(path: Path, folder: Path) -> Bundle:
    """Write the bundle's members into ``folder`` and check who signed the proposed policy."""
    bundle = read_bundle(path)
    (folder / "state").mkdir(mode=0o700, parents=True)
    write_new(folder / "node.key", bundle.node_key.encode(), 0o600)
    members = {
        "ca.crt": bundle.ca_certificate,
        "countersign.pub.pem": bundle.countersign_key,
        "plans.pub.pem": bundle.plan_key,
        "policy.toml": bundle.policy,
    }
    for name, text in members.items():
        write_new(folder / name, text.encode(), 0o644)
    key = read_public_key(folder / "plans.pub.pem")
    if not is_signed_policy(key, bundle.policy_signature, bundle.policy):
        raise SystemExit(f"{path}: the policy is not signed by the key beside it")
    return bundle


def supernode(bundle: Bundle, folder: Path, port: int) -> list[str]:
    """Return the command of the device's SuperNode; ``port`` is one of the loopback interface."""
    budget = tomllib.loads(bundle.policy)["budget"]
    settings = (
        f'partition-id={bundle.index} state-dir="{folder / "state"}" '
        f"budget-epsilon={budget['epsilon']} budget-delta={budget['delta']} "
        f'server-key="{folder / "countersign.pub.pem"}"'
    )
    return [
        "flower-supernode",
        *("--root-certificates", str(folder / "ca.crt")),
        *("--superlink", bundle.address),
        *("--auth-supernode-private-key", str(folder / "node.key")),
        *("--port", str(port)),
        *("--node-config", settings),
    ]


def main() -> None:
    """Unpack a bundle and print the command."""
    if len(sys.argv) != 3:
        raise SystemExit("usage: python device.py BUNDLE FOLDER")
    folder = Path(sys.argv[2]).resolve()
    bundle = unpack(Path(sys.argv[1]), folder)
    print(shlex.join(supernode(bundle, folder, 9100 + bundle.index)))


if __name__ == "__main__":
    main()
