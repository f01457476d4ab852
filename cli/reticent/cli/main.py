"""The ``reticent`` command."""

from __future__ import annotations

import os
import sys
import traceback

import click

from reticent.core.errors import ReticentError

from .artifacts import bench, export, predict
from .audits import audit
from .compress import compress
from .data import data
from .device_policy import device
from .plans import plan
from .reports import report
from .server_runs import server
from .simulations import simulate

INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="reticent", message="reticent %(version)s")
def cli() -> None:
    """Federated learning for small devices that says no more than it must.

    Exit status: 0 success, 1 unexpected, 2 usage, 3 plan, 4 data, 5 privacy budget or ledger,
    6 network or too few clients, 7 artifact, 8 run directory, 9 payload, 10 missing extra,
    11 keys, certificates or devices, 12 the policy of a device's owner, 130 interrupted.
    """


for command in (
    simulate,
    plan,
    compress,
    report,
    audit,
    export,
    bench,
    predict,
    data,
    server,
    device,
):
    cli.add_command(command)


def main() -> None:
    """Run the command line and exit with its status."""
    try:
        status = cli.main(standalone_mode=False)
    except ReticentError as error:
        click.echo(f"\nerror: {error}", err=True)
        status = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("\ninterrupted: committed rounds are kept; continue with --resume", err=True)
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
