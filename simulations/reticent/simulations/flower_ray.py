"""Flower's own Ray engine, as it is: for comparison, and to show that the apps are portable."""

from __future__ import annotations

from flwr.serverapp import ServerApp

from reticent.client.app import build_client_app
from reticent.core.plan import Plan

from .cores import usable_cores
from .devices import Devices
from .teams import require_ray, worker_count


def serve_with_flower_ray(app: ServerApp, plan: Plan, devices: Devices) -> None:
    """Run the apps through ``flwr.simulation.run_simulation``.

    Flower gives nodes random ids, so which clients a round samples differs from run to run unless
    every client takes part in every round; then the result is that of the in-process engine, up to
    float32 rounding of updates before they are encoded: here every client is trained alone. A
    student that draws in training (dropout) draws otherwise, too: for each client, and there once
    for each common pass.

    Raises:
        DependencyError: If Ray is not installed.
    """
    require_ray(plan)
    from flwr.simulation import run_simulation

    text = plan.canonical()
    client = build_client_app(devices.of_context, lambda _: text)
    run_simulation(
        app,
        client,
        num_supernodes=plan.task.clients,
        backend_config={
            "init_args": {
                "num_cpus": worker_count(plan, usable_cores()),
                "include_dashboard": False,
            },
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
