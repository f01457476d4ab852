"""The ``reticent`` command."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import cast

import click

from reticent.core.errors import ReticentError
from reticent.core.printable import printable

INTERRUPTED = 130
_MODULES = {
    "simulate": "simulations",
    "sweep": "sweeps",
    "runs": "runs",
    "plan": "plans",
    "compress": "compress",
    "report": "reports",
    "audit": "audits",
    "export": "artifacts",
    "bench": "artifacts",
    "predict": "artifacts",
    "data": "data",
    "server": "deliveries",
    "device": "device_policy",
}


class _Commands(click.Group):
    """Loads a command when it is used: an agent on a device must not hold torch in memory."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return every command's name."""
        return sorted(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, or None if there is none of this name."""
        if cmd_name not in _MODULES:
            return None
        module = importlib.import_module(f".{_MODULES[cmd_name]}", __package__)
        return cast(click.Command, getattr(module, cmd_name))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="reticent", message="reticent %(version)s")
def cli() -> None:
    """Federated learning for small devices that says no more than it must.

    Exit status: 0 success, 1 unexpected, 2 usage, 3 plan, 4 data, 5 privacy budget or ledger,
    6 network or too few clients, 7 artifact, 8 run directory, 9 payload, 10 missing extra or GPU,
    11 keys, certificates or devices, 12 the policy of a device's owner, 13 a device's disk,
    130 interrupted, 143 told to end.
    """


def main() -> None:
    """Run the command line and exit with its status."""
    try:
        status = cli.main(standalone_mode=False)
    except ReticentError as error:
        if os.environ.get("RETICENT_DEBUG"):
            traceback.print_exc()
        click.echo("\nerror: " + printable(str(error), keep="\n"), err=True)
        status = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("\ninterrupted", err=True)  # what can be continued says so itself
        status = INTERRUPTED
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as error:
        status = _unexpected(error)
    sys.exit(status if isinstance(status, int) else 0)


def _unexpected(error: Exception) -> int:
    if os.environ.get("RETICENT_DEBUG"):
        traceback.print_exc()
    click.echo(
        f"\nerror: unexpected {type(error).__name__}: {error}\n"
        "This is a fault in reticent. Set RETICENT_DEBUG=1 to see where it happened.",
        err=True,
    )
    return 1
