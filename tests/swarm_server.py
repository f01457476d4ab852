"""A ServerApp that asks every node once a round, as ours does, and notes how long that takes."""

from __future__ import annotations

import json
import time
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from reticent.client.records import pack
from reticent.server.nodes import polled

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Hold so many rounds with so many nodes; the figures go to ``out``, a line a round."""
    config = context.run_config
    nodes, rounds, size = (int(config[key]) for key in ("nodes", "rounds", "size"))
    while len(known := sorted(grid.get_node_ids())) < nodes:
        time.sleep(0.5)
    for number in range(1, rounds + 1):
        content = RecordDict({"broadcast": pack(bytes([number]) * size)})
        messages = [Message(content, n, "train", group_id=str(number)) for n in known]
        began = time.monotonic()
        found = polled(grid, messages, 600.0, lambda: False, 2**29)
        replies = [reply for reply in found if reply.has_content()]
        authors = sorted(reply.metadata.src_node_id for reply in replies)
        seconds = time.monotonic() - began
        line = {"round": number, "seconds": seconds, "asked": known, "authors": authors}
        with Path(str(config["out"])).open("a") as file:
            file.write(json.dumps({**line, "replies": len(replies)}) + "\n")
