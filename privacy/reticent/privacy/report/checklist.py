"""The full list of what a privacy report must state; what is missing is said to be missing.

The fields follow NIST SP 800-226 (2025) and Ponomareva et al. 2023 (How to DP-fy ML), section 5.3.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import reticent

from .words import (
    NOT_COVERED,
    certainty_text,
    delta_text,
    epsilon_text,
    number_text,
)

UNPROTECTED = (
    ("Public examples", "teacher, start, mask, calibration: open to anyone by the plan"),
    ("The test set", "read for every accuracy shown here; it belongs to no client"),
    ("Choice of settings", "runs made to choose them are not counted here"),
    ("Who took part, and when", "the server and the network see it"),
    (
        "Timing and dropouts",
        "a reply takes longer when a client's batches are larger; neither that nor its absence is "
        "noised",
    ),
    ("Size of an encoded update", "depends on the noised values only, and is not padded"),
)
_EXPOSED = ("Every update", "sent without noise: the server sees what each client computed")
_SIMULATED = (
    "The simulation's seed",
    "whoever knows it knows the noise: a simulation shows the mechanism, it protects nobody",
)


def checklist(data: dict[str, Any]) -> list[dict[str, str]]:
    """Return ``{"field", "answer"}`` rows from the other sections of a report."""
    private = data["promise"]["trust"] != "off"
    mechanism = _mechanism(data) if private else _no_mechanism()
    rows = {
        **_scope(data, private),
        **mechanism,
        **_clients(data),
        **_records(data),
        "Worst-case inference odds": _odds(data),
    }
    return [{"field": field, "answer": answer} for field, answer in rows.items()]


def unprotected(data: dict[str, Any]) -> list[tuple[str, str]]:
    """Return data accesses that no number in the report covers, each with a remark."""
    private = data["promise"]["trust"] != "off"
    known = UNPROTECTED if private else (*UNPROTECTED[:-1], _EXPOSED)
    return [*known, *([_SIMULATED] if data["run"]["simulated"] else [])]


def _scope(data: dict[str, Any], private: bool) -> dict[str, str]:
    names = "; ".join(
        f"{row['name']}: ε = {epsilon_text(row['epsilon'])}" for row in data["adversaries"]
    )
    clip = number_text(data["promise"].get("clip"))
    sent = "every update of a client, " if data["promise"]["trust"] == "local" else ""
    unit = f"one example of one client; its gradient is clipped to L2 norm {clip} in every step"
    return {
        "Adversaries and trust model": f"{data['promise']['trust']} trust. {names}",
        "Privacy unit and largest contribution": unit if private else "none: ε = ∞",
        "Neighbouring relation": "add or remove one example" if private else "none: ε = ∞",
        "Outputs covered": (
            f"{sent}every model of every round, the deployed int8 model and all that is computed "
            "from them"
            if private
            else "none: ε = ∞"
        ),
        "Data accesses not covered": "; ".join(
            f"{what[0].lower()}{what[1:]} ({remark})" for what, remark in unprotected(data)
        ),
    }


def _mechanism(data: dict[str, Any]) -> dict[str, str]:
    p, a, run = data["promise"], data["accounting"], data["run"]
    rate = number_text(p["sampling_rate"])
    deltas = ", ".join(
        f"{epsilon_text(row['epsilon'])} at δ = {delta_text(row['delta'])}" for row in a["by_delta"]
    )
    prv = a["prv"]["epsilon"]
    prv_text = "out of its reach" if prv is None else epsilon_text(prv)
    return {
        "Mechanism": (
            f"Gaussian noise on sums of clipped gradients (DP-SGD; Abadi et al. 2016): clip "
            f"{number_text(p['clip'])}, noise multiplier σ = {number_text(p['noise_multiplier'])} "
            f"({number_text(p['share_multiplier'])} per client), sampling rate q = {rate}, "
            f"{p['steps_per_round']} step(s) a round, {run['rounds']} rounds, at most "
            f"{p['participations']} of them with the same client"
        ),
        "Sampling performed": (
            f"each client draws its own Poisson batch at rate q = {rate}; batches and noise come "
            f"from: {run['randomness']}"
        ),
        "Sampling accounted": (
            f"Poisson sampling of examples at rate q = {rate}. Sampling of clients is not counted, "
            "because the server and the network see who takes part"
        ),
        "Accountant, version, discretisation": a["accountant"],
        "ε at several δ": deltas,
        "μ-GDP and its regret": NOT_COVERED,
        "ε by other accountants": (
            f"PRV {prv_text} ({a['prv']['how']}); RDP "
            f"{epsilon_text(a['rdp']['epsilon'])} ({a['rdp']['how']})"
        ),
        "ε without amplification by sampling": f"{epsilon_text(a['unamplified'])} (q = 1)",
    }


def _no_mechanism() -> dict[str, str]:
    return {
        "Mechanism": "none: ε = ∞",
        "Sampling performed": "each client draws its own Poisson batch",
        "Sampling accounted": "none: ε = ∞",
        "Accountant, version, discretisation": "none: ε = ∞",
        "ε at several δ": "∞ at every δ",
        "μ-GDP and its regret": NOT_COVERED,
        "ε by other accountants": "∞",
        "ε without amplification by sampling": "∞",
    }


def _clients(data: dict[str, Any]) -> dict[str, str]:
    spent = data["spent"]
    quantiles = ", ".join(f"{q}: {epsilon_text(v)}" for q, v in spent["quantiles"].items())
    return {
        "Per-client spending": (
            f"maximum {epsilon_text(spent['maximum'])}; quantiles {quantiles or 'none'}; "
            f"{number_text(spent['refusals'])} refusals at the hard stop"
        ),
        "User-level ε": "none possible: no bound on examples per user is given",
        "Composition window and renewal": (
            "this run only; a device's ledger counts all runs of that device and is never renewed"
        ),
    }


def _records(data: dict[str, Any]) -> dict[str, str]:
    ledger = data["spent"]["ledger"]
    elsewhere = "on the devices, not with the server"
    return {
        "Randomness": data["run"]["randomness"],
        "Floating point": (
            "noise is added in float64 and rounded to float32; it is not a discrete mechanism, so "
            "attacks on the representation (Mironov 2012) are not excluded"
        ),
        "Secure aggregation": NOT_COVERED,
        "Charge for tuning": NOT_COVERED,
        "Charge for the teacher": "none: the teacher is trained on public data only",
        "Audit (empirical lower bound on ε)": NOT_COVERED,
        "Ledger head": f"{ledger['head']} (entry {ledger['sequence']})" if ledger else elsewhere,
        "Ledger integrity": (
            "verified when this report was written: every entry's MAC, in order"
            if ledger
            else elsewhere
        ),
        "Code": f"reticent {_version()}, sources SHA-256 {code_digest()} (of this report's writer)",
    }


def _odds(data: dict[str, Any]) -> str:
    return "; ".join(
        f"{row['name']}: a suspicion of 50 % becomes at most "
        f"{certainty_text(row['certainty_from_half'])}"
        for row in data["adversaries"]
    )


def _version() -> str:
    try:
        return version("reticent")
    except PackageNotFoundError:
        return "(not installed)"


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Return the SHA-256, as hex, of the installed Python sources, in order of their paths."""
    digest = hashlib.sha256()
    sources = [
        (path.relative_to(root).as_posix(), path)
        for root in map(Path, reticent.__path__)
        for path in root.rglob("*.py")
    ]
    for name, path in sorted(sources):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
