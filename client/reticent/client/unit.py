"""The systemd unit that keeps a device's agent running."""

from __future__ import annotations

from pathlib import Path

from reticent.core.systemd import quoted

UNIT = "reticent-device.service"
MEMORY_MAX = "1G"


def device_unit(folder: Path, command: Path) -> str:
    """Return the unit; ``command`` is the absolute path of the ``reticent`` command.

    The service sees the system read-only and may write to ``folder`` alone. A round that is killed
    for its memory does not take the agent with it, and exit statuses that no restart mends (usage,
    policy, keys) stop it.

    Raises:
        ProvisionError: If a path holds what a unit file cannot.
    """
    where, runs = quoted(folder), quoted(command)
    return f"""[Unit]
Description=reticent device ({folder.name})
Wants=network-online.target
After=network-online.target

[Service]
ExecStart={runs} device run --dir {where}
Restart=on-failure
RestartSec=30
RestartPreventExitStatus=2 8 11 12
KillMode=mixed
TimeoutStopSec=30
OOMPolicy=continue
MemoryMax={MEMORY_MAX}
TasksMax=256
Nice=10
CPUSchedulingPolicy=batch
IOSchedulingClass=idle
UMask=0077
NoNewPrivileges=true
PrivateTmp=true
ProtectSystem=strict
ProtectHome=read-only
ProtectKernelTunables=true
ProtectKernelModules=true
ProtectControlGroups=true
RestrictSUIDSGID=true
RestrictRealtime=true
LockPersonality=true
CapabilityBoundingSet=
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
ReadWritePaths={where}

[Install]
WantedBy=multi-user.target
"""
