"""The systemd unit that keeps a server's SuperLink running."""

from __future__ import annotations

from pathlib import Path

from reticent.core.systemd import quoted

NAME = "reticent-server.service"


def server_unit(folder: Path, command: Path) -> str:
    """Return the unit; ``command`` is the absolute path of the ``reticent`` command.

    The service sees the system read-only and may write to ``folder`` alone. Exit statuses that no
    restart mends (usage, a folder in use, keys) stop it.

    Raises:
        ProvisionError: If a path holds what a unit file cannot.
    """
    where, runs = quoted(folder), quoted(command)
    return f"""[Unit]
Description=reticent server ({folder.name})
Wants=network-online.target
After=network-online.target

[Service]
ExecStart={runs} server start --dir {where}
Restart=on-failure
RestartSec=5
RestartPreventExitStatus=2 8 11
KillMode=mixed
UMask=0077
NoNewPrivileges=true
PrivateTmp=true
ProtectSystem=strict
ProtectKernelTunables=true
ProtectControlGroups=true
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
ReadWritePaths={where}

[Install]
WantedBy=multi-user.target
"""
