"""``reticent server deliver``: a run's model for devices."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .numbers import Within
from .output import human_bytes
from .server_runs import server
from .servers import directory_option

if TYPE_CHECKING:
    from reticent.server.home import Home
    from reticent.server.shipping import How

_KB = 1024


@server.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@directory_option
@click.option("--device", "names", multiple=True, metavar="NAME", help="One device; or several.")
@click.option("--version", type=click.IntRange(min=1), help="Give the model this number.")
@click.option("--timeout", type=Within(min=1), default=600.0, show_default=True, help="Seconds.")
@click.option(
    "--chunk-kb",
    type=click.IntRange(1, 1024),
    default=256,
    show_default=True,
    help="Most of the model in one message; small for slow networks.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object at the end.")
def deliver(
    run: Path,
    folder: Path,
    names: tuple[str, ...],
    version: int | None,
    timeout: float,
    chunk_kb: int,
    as_json: bool,
) -> None:
    """Bring the artifact of RUN to the enrolled devices, which verify, test and install it.

    Without --version a model that was offered before keeps its number, and another gets the next
    one. Devices take no number that is not above what they had: to go back to an older model, give
    it a new one. The exit status is 0 only if the model is installed on every device.
    """
    from reticent.server.home import open_home
    from reticent.server.shipping import How

    how = How(version, timeout, chunk_kb * _KB)
    deliver_run(open_home(folder), run, names, how, as_json)


def deliver_run(
    home: Home,
    run: Path,
    names: tuple[str, ...] = (),
    how: How | None = None,
    as_json: bool = False,
) -> None:
    """Deliver the artifact of a run and show how far it came.

    Raises:
        NetworkError: If it is not installed everywhere in the end.
    """
    from reticent.core.run import open_run
    from reticent.server.offers import prepare_shipment
    from reticent.server.shipping import Delivery, How, receivers, require_delivered

    def say(line: str) -> None:
        click.echo(line, err=as_json)

    opened, how = open_run(run), how or How()
    devices, shipment = receivers(home, names), prepare_shipment(home, opened, how.version)
    offer = shipment.offer
    what = f"model {offer.version}: {human_bytes(offer.size)}, plan {offer.plan[:12]}"
    say(f"{what}, to {', '.join(devices)}")
    parcels = Delivery(home, shipment, opened.plan(), devices, say, how).deliver()
    if as_json:
        shown = {name: asdict(parcel) for name, parcel in parcels.items()}
        told = {"version": offer.version, "bytes": offer.size, "devices": shown}
        click.echo(json.dumps(told))
    require_delivered(shipment, parcels)
