"""The full list of what a privacy report must state.

The fields follow NIST SP 800-226 (2025) and Ponomareva et al. 2023 (How to DP-fy ML), section 5.3;
what is not done is said to be not done.
"""

from __future__ import annotations

from typing import Any

from .audited import NOT_DONE
from .tuning import tuning_text
from .weights import weights_text
from .words import (
    bound_text,
    certainty_text,
    count_text,
    delta_text,
    epsilon_text,
    number_text,
    relation_text,
)

NO_USER_LEVEL = "none possible: no bound on examples per user is given"
_NONE = "none: ε = ∞"


def checklist(data: dict[str, Any]) -> list[dict[str, str]]:
    """Return ``{"field", "answer"}`` rows from the other sections of a report."""
    private = data["promise"]["trust"] != "off"
    rows = {
        **_scope(data, private),
        **(_mechanism(data) if private else _no_mechanism()),
        **_clients(data, private),
        **_records(data),
        "Worst-case inference odds": _odds(data),
    }
    return [{"field": field, "answer": answer} for field, answer in rows.items()]


def _scope(data: dict[str, Any], private: bool) -> dict[str, str]:
    promise = data["promise"]
    names = "; ".join(
        f"{row['name']}: ε = {epsilon_text(row['epsilon'])}" for row in data["adversaries"]
    )
    sent = "every update of a client, " if promise["trust"] == "local" else ""
    covered = (
        f"{sent}every model of every round, the deployed model and all that is computed from them"
    )
    if private and promise["clip_quantile"] is not None:
        covered += "; the noised counts that move the bound, and the bounds"
    return {
        "Adversaries and trust model": f"{promise['trust']} trust. {names}",
        "Privacy unit and largest contribution": _unit(promise) if private else _NONE,
        "Neighbouring relation": relation_text(promise) if private else _NONE,
        "Outputs covered": covered if private else _NONE,
        "Data accesses not covered": "; ".join(
            f"{row['what'][0].lower()}{row['what'][1:]} ({row['remark']})"
            for row in data["not_covered"]
        ),
    }


def _unit(promise: dict[str, Any]) -> str:
    clip = number_text(promise["clip"])
    if promise["unit"] == "client":
        start = "" if promise["clip_quantile"] is None else ", at first,"
        often = "is drawn for" if promise["sampling_rate"] < 1 else "takes part in"
        return (
            f"all that one client contributes; its update in a round is bounded{start} to L2 norm "
            f"{clip}, and it {often} at most {promise['participations']} rounds"
        )
    how = "" if promise["clipping"] == "flat" else ", split over the parameter tensors,"
    return (
        f"one example of one client; its gradient is clipped{how} to L2 norm {clip} in every step"
    )


def _mechanism(data: dict[str, Any]) -> dict[str, str]:
    a = data["accounting"]
    deltas = ", ".join(
        f"{epsilon_text(row['epsilon'])} at δ = {delta_text(row['delta'])}" for row in a["by_delta"]
    )
    relations = ", ".join(
        f"{row['relation']}: {epsilon_text(row['epsilon'])}" for row in a["by_relation"]
    )
    prv = a["prv"]["epsilon"]
    prv_text = "out of its reach" if prv is None else epsilon_text(prv)
    return {
        "Mechanism": _gaussian(data),
        **_sampling(data),
        "Accountant, version, discretisation": a["accountant"],
        "ε at several δ": deltas,
        "ε under each neighbouring relation": relations,
        "μ-GDP and its regret": gdp_text(a["gdp"]),
        "ε by other accountants": (
            f"PRV {prv_text} ({a['prv']['how']}); RDP "
            f"{epsilon_text(a['rdp']['epsilon'])} ({a['rdp']['how']})"
        ),
        "ε without amplification by sampling": f"{epsilon_text(a['unamplified'])} (q = 1)",
    }


def gdp_text(gdp: dict[str, Any] | None) -> str:
    """Return mu and its regret in a few words."""
    if gdp is None or gdp["mu"] is None:
        return "none: no finite μ was found"
    if gdp["mu"] == "infinity":
        return "μ = ∞"
    return (
        f"μ = {epsilon_text(gdp['mu'])}, regret {_regret(gdp['regret'])} (by how much error rates "
        "differ from those that μ alone says; 0 is exact; error rates below 1e-10 are left out; "
        "Gomez et al. 2025)"
    )


def _regret(regret: Any) -> str:
    return "not known" if regret is None else number_text(regret, 2)


def _gaussian(data: dict[str, Any]) -> str:
    p, run = data["promise"], data["run"]
    clip, sigma = number_text(p["clip"]), number_text(p["noise_multiplier"])
    most = (
        f"{number_text(run['rounds'])} rounds, at most {p['participations']} of them with the same "
        "client"
    )
    if p["unit"] == "client":
        bound = f"bound {clip}"
        if p["clip_quantile"] is not None:
            bound = (
                f"a bound that begins at {clip} and follows the {number_text(p['clip_quantile'])} "
                "quantile of the norms by noised counts, which are charged (Andrew et al. 2021)"
            )
        return (
            f"Gaussian noise of the server on sums of bounded client updates (DP-FedAvg; McMahan "
            f"et al. 2018): {bound}, noise multiplier σ = {sigma}, a fixed denominator of "
            f"{number_text(run['clients_per_round'])} clients, {run['steps_per_round']} local "
            f"step(s) a round, {most}"
        )
    return (
        f"Gaussian noise on sums of clipped gradients (DP-SGD; Abadi et al. 2016): clip {clip}, "
        f"noise multiplier σ = {sigma} ({number_text(p['share_multiplier'])} per client), "
        f"sampling rate q = {number_text(p['sampling_rate'])}, {p['steps_per_round']} step(s) a "
        f"round, {most}"
    )


_COHORTS = {
    "passes": "clients are dealt from shuffled passes over all of them",
    "fixed": "a fixed number of clients is drawn for each round, uniformly",
    "poisson": "each client joins a round by a coin of its own (Poisson sampling)",
}


def _sampling(data: dict[str, Any]) -> dict[str, str]:
    p, run = data["promise"], data["run"]
    rate = number_text(run["sampling_rate"])
    drawn = "batches come" if p["unit"] == "client" else "batches and noise come"
    cohorts = _COHORTS[run.get("client_sampling", "passes")]
    performed = f"{cohorts}; each client draws its own Poisson batches at rate q = {rate}; {drawn}"
    return {
        "Sampling performed": f"{performed} from: {run['randomness']}",
        "Sampling accounted": _accounted(p, rate),
    }


def _accounted(p: dict[str, Any], rate: str) -> str:
    seen = (
        "Sampling of clients is not counted, because the server and the network see who takes part"
    )
    if p["unit"] != "client":
        return f"Poisson sampling of examples at rate q = {rate}. {seen}"
    if p["sampling_rate"] == 1:
        return f"none: a client of a round counts in full (q = 1). {seen}"
    return (
        f"Poisson sampling of clients at rate q = {number_text(p['sampling_rate'])}, in every "
        "round in which a client may be drawn, against readers of the models and other clients "
        "only, and only if they do not learn who took part, as the plan says. The server and the "
        "network see it; against them nothing is counted, and nothing promised"
    )


def _no_mechanism() -> dict[str, str]:
    return {
        "Mechanism": _NONE,
        "Sampling performed": "each client draws its own Poisson batch",
        "Sampling accounted": _NONE,
        "Accountant, version, discretisation": _NONE,
        "ε at several δ": "∞ at every δ",
        "ε under each neighbouring relation": "∞ under both",
        "μ-GDP and its regret": "μ = ∞",
        "ε by other accountants": "∞",
        "ε without amplification by sampling": "∞",
    }


def _clients(data: dict[str, Any], private: bool) -> dict[str, str]:
    spent = data["spent"]
    quantiles = ", ".join(f"{q}: {epsilon_text(v)}" for q, v in spent["quantiles"].items())
    refusals = spent["refusals"]
    told = "refusals not shown" if refusals is None else count_text(refusals, "refusal")
    stopped = f"{told} at the hard stop"
    return {
        "Per-client spending": (
            f"maximum {epsilon_text(spent['maximum'])}; quantiles {quantiles or 'none'}; {stopped}"
        ),
        "User-level ε": _user_level(data) if private else _NONE,
        "Composition window and renewal": (
            "this run only. A device's ledger counts all runs of that device, for every server, "
            "and is renewed only where its owner set a budget with a window; this report does not "
            "see other runs"
        ),
    }


def _user_level(data: dict[str, Any]) -> str:
    if data["promise"]["unit"] == "client":
        return "the ε of this report, for a user with one client; nothing bounds one with several"
    level = data["accounting"]["user_level"]
    if level is None:
        return NO_USER_LEVEL
    return (
        f"ε = {epsilon_text(level['epsilon'])} at δ = {delta_text(data['promise']['delta'])}, for "
        f"someone who owns at most {number_text(level['examples'])} examples of one client (the "
        "plan's bound; nothing checks it)"
    )


def _records(data: dict[str, Any]) -> dict[str, str]:
    ledger, writer = data["spent"]["ledger"], data["writer"]
    elsewhere = "on the devices, not with the server"
    return {
        "Randomness": _randomness(data["run"]),
        "Floating point": _floating_point(data),
        "Secure aggregation": "not used: nothing technical keeps the server from single updates",
        "Charge for tuning": tuning_text(data.get("tuning")),
        "Charge for the teacher": weights_text(data.get("weights")),
        "Audit (empirical lower bound on ε)": audit_text(data["audit"]),
        "Ledger head": _head(ledger) if ledger else elsewhere,
        "Ledger integrity": (
            "verified when this report was written: every entry's MAC, in order"
            if ledger
            else elsewhere
        ),
        "Code": (
            f"reticent {writer['version']}, sources SHA-256 {writer['sources']} (of this report's "
            "writer)"
        ),
    }


def _head(ledger: dict[str, Any]) -> str:
    number = ledger["sequence"]
    return ledger["head"] if number is None else f"{ledger['head']} (entry {number})"


def _randomness(run: dict[str, Any]) -> str:
    server = run["server_randomness"]
    return f"devices: {run['randomness']}" + (f"; the server's noise: {server}" if server else "")


def _floating_point(data: dict[str, Any]) -> str:
    """Return the precision of the noise of who draws it: the server with unit ``client``."""
    run, summed = data["run"], data["promise"].get("unit") == "client"  # to a float64 sum
    source = (run["server_randomness"] if summed else None) or run["randomness"]
    drawn = "float32" if "float32" in source else "float64"
    added = "float64" if summed else drawn
    rounded = " and rounded to float32" if added == "float64" else ""
    return (
        f"noise is drawn in {drawn}, added in {added}{rounded}; it is not a discrete mechanism, so "
        "attacks on the representation (Mironov 2012) are not excluded"
    )


def audit_text(audit: dict[str, Any] | None) -> str:
    """Return the outcome of an audit in a sentence."""
    if audit is None:
        return NOT_DONE
    held = randomness_text(audit["randomness"]).partition(":")[0]
    verdict = "consistent with" if audit["verdict"] == "consistent" else "VIOLATES"
    return (
        f"{verdict} the claim: at least ε = {bound_text(audit['lower_bound'])} with "
        f"{100 * audit['confidence']:g} % confidence, against a claim of "
        f"{epsilon_text(audit['claimed']['epsilon'])} at δ = "
        f"{delta_text(audit['claimed']['delta'])} for the {number_text(audit['rounds'])} rounds "
        f"audited ({audit['method']}, "
        f"{number_text(audit['canaries'])} canaries); direct test of the randomness {held}"
    )


def randomness_text(found: dict[str, Any]) -> str:
    """Return the outcome of a direct test of the noise: what was compared, if anything."""
    parts: list[str] = []
    if found["largest_correlation"] is not None:
        parts.append(
            f"the largest correlation of {count_text(found['pairs'], 'pair')} of releases is "
            f"{number_text(found['largest_correlation'], 3)}, at most "
            f"{number_text(found['limit'], 3)} is allowed"
        )
    if found["variance_ratio"] is not None and found["variance_interval"] is not None:
        low, high = found["variance_interval"]
        parts.append(
            f"the variance is {number_text(found['variance_ratio'])} of the promised, "
            f"{number_text(low)} to {number_text(high)} is allowed"
        )
    if not parts:
        return "not possible: there was one release, and its codec hides the variance of the noise"
    return f"{'passed' if found['passed'] else 'FAILED'}: {'; '.join(parts)}"


def _odds(data: dict[str, Any]) -> str:
    return "; ".join(
        f"{row['name']}: a suspicion of 50 % becomes at most "
        f"{certainty_text(row['certainty_from_half'])}"
        for row in data["adversaries"]
    )
