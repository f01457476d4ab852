"""What an owner's policy says against an order, and against taking part now, in words for an owner.

Every function returns the reasons, none when nothing is against it. None of them is sent anywhere.
"""

from __future__ import annotations

from datetime import datetime

from reticent.core.plan import Plan
from reticent.core.protocol import Order

from .policy import Limits, Policy, When
from .sensors import Readings

MEGABYTE = 2**20


def against_plan(policy: Policy, plan: Plan, order: Order) -> list[str]:
    """Return what in the plan and the order the policy does not allow."""
    limits, federation = policy.limits, plan.federation
    bounds = (
        ("sampling_rate", federation.sampling_rate, limits.largest_sampling_rate),
        ("steps_per_round", federation.steps_per_round, limits.largest_steps_per_round),
        ("rounds", federation.rounds, limits.largest_rounds),
    )
    said = [
        f"federation.{key}={given:g}: limits.largest_{key} is {most:g}"
        for key, given, most in bounds
        if most is not None and given > most
    ]
    if order.noise_multiplier < limits.least_noise_multiplier:
        least = limits.least_noise_multiplier
        said.append(
            f"noise multiplier {order.noise_multiplier:g}: "
            f"limits.least_noise_multiplier is {least:g}"
        )
    return said + _against_weights(limits, plan) + _against_names(policy, plan)


def _against_weights(limits: Limits, plan: Plan) -> list[str]:
    """Return what the limits do not allow in how the weights were trained that a plan brings."""
    trained, said = plan.teacher.trained, list[str]()
    if trained is None:
        return said
    if trained.sampling_rate > limits.largest_sampling_rate:
        said.append(
            f"teacher.trained.sampling_rate={trained.sampling_rate:g}: "
            f"limits.largest_sampling_rate is {limits.largest_sampling_rate:g}"
        )
    if trained.noise_multiplier < limits.least_noise_multiplier:
        said.append(
            f"teacher.trained.noise_multiplier={trained.noise_multiplier:g}: "
            f"limits.least_noise_multiplier is {limits.least_noise_multiplier:g}"
        )
    return said


def _against_names(policy: Policy, plan: Plan) -> list[str]:
    allow, trust = policy.allow, plan.private.trust if plan.private else "off"
    said = _against_code(policy, plan)
    if trust not in allow.trust:
        said.append(f"trust {trust}: allow.trust is {', '.join(allow.trust) or 'empty'}")
    return said


def _against_code(policy: Policy, plan: Plan) -> list[str]:
    """Return what is against the plan's task and student, of which each can name a module."""
    allow = policy.allow
    named = (
        ("task", plan.task.name, "allow.tasks", allow.tasks),
        ("model", plan.student.model, "allow.models", allow.models),
    )
    said: list[str] = []
    for what, name, key, allowed in named:
        if allowed is None and ":" in name:
            said.append(f"{what} {name}: runs a module of this device, so {key} must name it")
        if allowed is not None and name not in allowed:
            said.append(f"{what} {name}: {key} is {', '.join(allowed) or 'empty'}")
    return said


def against_model(policy: Policy, plan: Plan, size: int) -> list[str]:
    """Return what in an offered model, of ``size`` bytes, the policy does not allow."""
    delivery = policy.delivery
    said = [] if delivery.accept else ["a model is offered: delivery.accept is false"]
    if size > delivery.largest_mb * MEGABYTE:
        said.append(f"a model of {size} bytes: delivery.largest_mb is {delivery.largest_mb}")
    return said + _against_code(policy, plan)


def against_now(when: When, seen: Readings, now: datetime) -> list[str]:
    """Return which of the owner's conditions do not hold; unread ones as ``when.unknown`` says."""
    said = [] if when.includes(now.time()) else [f"{now:%H:%M} is outside {', '.join(when.hours)}"]
    checks = (
        (when.charging, seen.charging, "not charging", "whether it is charging"),
        (when.unmetered, _not(seen.metered), "the connection is metered", "whether it is metered"),
        (
            when.least_battery is not None,
            _at_least(seen.battery, when.least_battery),
            f"battery at {_percent(seen.battery)}: least_battery is {_percent(when.least_battery)}",
            "the battery's charge",
        ),
        (
            when.largest_celsius is not None,
            _at_least(when.largest_celsius, seen.celsius),
            f"{seen.celsius} °C: largest_celsius is {when.largest_celsius}",
            "the temperature",
        ),
        (
            when.largest_pressure is not None,
            _at_least(when.largest_pressure, seen.pressure),
            f"busy {_percent(seen.pressure)} of the time: largest_pressure is "
            f"{_percent(when.largest_pressure)}",
            "how busy it is",
        ),
    )
    for wanted, holds, broken, unread in checks:
        if wanted and holds is False:
            said.append(broken)
        elif wanted and holds is None and when.unknown == "refuse":
            said.append(f"{unread} cannot be read, and when.unknown is refuse")
    return said


def against_room(policy: Policy, memory: int | None, disk: int, needed: int) -> list[str]:
    """Return whether too little memory or disk would be left.

    Args:
        policy: The owner's.
        memory: Bytes that may still be taken; None if that cannot be read.
        disk: Free bytes.
        needed: Memory that is about to be taken.
    """
    spare = policy.resources
    said: list[str] = []
    wanted = needed + spare.spare_memory_mb * MEGABYTE
    if memory is None and policy.when.unknown == "refuse":
        said.append("the free memory cannot be read, and when.unknown is refuse")
    if memory is not None and memory < wanted:
        said.append(f"{memory // MEGABYTE} MB of memory free: {wanted // MEGABYTE} MB are needed")
    if disk < spare.spare_disk_mb * MEGABYTE:
        free = disk // MEGABYTE
        said.append(f"{free} MB of disk free: resources.spare_disk_mb is {spare.spare_disk_mb}")
    return said


def _not(value: bool | None) -> bool | None:
    return None if value is None else not value


def _at_least(value: float | None, least: float | None) -> bool | None:
    return None if value is None or least is None else value >= least


def _percent(value: float | None) -> str:
    return "?" if value is None else f"{value:.0%}"
