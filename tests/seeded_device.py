"""The ClientApp of a real device with a seed that everyone knows: only for comparing models."""

from __future__ import annotations

from dataclasses import replace

from flwr.app import Context

from reticent.client import deployment as device
from reticent.client.app import build_client_app
from reticent.client.environment import Environment
from reticent.core.plan import parse_plan
from reticent.privacy.randomness import SeededRandomness


def _environment(context: Context) -> Environment:
    plan = parse_plan(str(context.run_config["plan"]))
    return replace(device._environment(context), randomness=SeededRandomness(plan.seed))


app = build_client_app(_environment, device._plan, device._tell_owner)
