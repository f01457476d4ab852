"""The page for a reader without a background in differential privacy, as sentences.

Nothing is promised here that the technical part does not: every number comes from it, and bounds
are rounded up.

What delta means is said exactly. Any set of outcomes has at most e^epsilon times the other
probability *plus* delta; that is not "e^epsilon, except with probability delta" for each outcome.
For single outcomes, and so for what one of them makes somebody believe, the privacy loss L has
``Pr[L > epsilon + t] <= delta / (1 - e^-t)``, because ``delta >= E[max(0, 1 - e^(epsilon - L))]``.
With t = log 2: odds of more than twice e^epsilon times the prior ones have a probability of at
most 2 delta.
"""

from __future__ import annotations

from typing import Any

from .drawn import drawn_in_secret
from .weights import UNCHECKED
from .words import as_float, certainty_text, chance_text, count_text, epsilon_text, odds_text

_CHOICE = ("Choice of settings", "runs made to choose them are not counted here")
_TIMING = (
    "Timing and dropouts",
    "a reply takes longer when a client's batches are larger; neither that nor its absence is "
    "noised",
)
UNPROTECTED = (
    ("What is true of people in general", "a model learns it, also about someone who took no part"),
    ("Public examples", "teacher, start, mask, calibration: open to anyone by the plan"),
    ("The test set", "read for every accuracy shown here; it belongs to no client"),
    _CHOICE,
    ("Who took part, and when", "the server and the network see it"),
    _TIMING,
    (
        "Clients and servers that do not follow the protocol",
        "a client that omits its noise or sends what it likes weakens others; a device cannot see "
        "what a server does with its update",
    ),
)
_SIZE = "The size of single updates"
_SHOWN = (
    "so the promise to readers does not cover it; sizes are shown here rounded up to two figures, "
    "and the number against someone on the network stands for those who see lengths"
)
_ROUNDED = " (under aggregator trust shown here rounded up to two figures)"
_EXPOSED = (
    "Every update",
    "sent without noise: the server sees what each client computed, and how large it is encoded",
)
_DRAWN = (
    "How many clients were drawn",
    "replies, bytes and times follow from the secret draws, so this report leaves them out; the "
    "run's own files have them, and the number against readers of the models is for those who do "
    "not see these",
)
_PERSON = "A person with several examples"
_FIRST_COME = (
    "; a round is closed at its first {} replies, so who is in its sum follows from these times, "
    "and the models show it: what their readers learn by that is in no number"
)
_SIMULATED = (
    "The simulation's seed",
    "whoever knows it knows the noise: a simulation shows the mechanism, it protects nobody",
)


def not_covered(data: dict[str, Any]) -> list[dict[str, str]]:
    """Return what the promise does not cover, each with a remark."""
    promise = data["promise"]
    noised = promise["trust"] != "off" and promise["unit"] == "example"
    rows = [*UNPROTECTED]
    if not noised:
        shown = "" if drawn_in_secret(promise) else _ROUNDED
        rows.append((_EXPOSED[0], _EXPOSED[1] + shown))
    elif promise["trust"] == "aggregator":
        rows.append((_SIZE, _size_remark(data["run"])))
    # Under local trust an update is private by itself, and so is its length.
    tuning = data.get("tuning")
    if tuning is not None and tuning["runs"] > 1:
        rows[rows.index(_CHOICE)] = (_CHOICE[0], _chosen(tuning))
    enough = data["run"].get("enough")
    if enough is not None:
        rows[rows.index(_TIMING)] = (_TIMING[0], _TIMING[1] + _FIRST_COME.format(enough))
    if drawn_in_secret(promise):
        rows.append(_DRAWN)
    if "weights" in data:
        rows.append(UNCHECKED)
    if noised:
        rows.insert(1, (_PERSON, _person_remark(data["accounting"])))
    if data["run"]["simulated"]:
        rows.append(_SIMULATED)
    return [{"what": what, "remark": remark} for what, remark in rows]


def _size_remark(run: dict[str, Any]) -> str:
    if run.get("padded"):
        return (
            "updates are padded to one length, but whether one needs more than that follows from "
            f"that single update, {_SHOWN}"
        )
    return f"a length is not padded and follows from that single update, {_SHOWN}"


def _person_remark(accounting: dict[str, Any]) -> str:
    level = accounting["user_level"]
    if level is None:
        return (
            "is protected less than one example is; how much less cannot be said, because the plan "
            "gives no bound on the examples of one person"
        )
    return (
        f"is protected less than one example is: with at most {level['examples']} examples of one "
        f"client, ε = {epsilon_text(level['epsilon'])}"
    )


def _chosen(tuning: dict[str, Any]) -> str:
    return (
        f"the numbers of the promise are of this run by itself, which is one of {tuning['runs']:,} "
        "that were planned together: whoever picks the best of them spends up to ε = "
        f"{epsilon_text(tuning['epsilon'])} against readers of the models"
    )


def plain(data: dict[str, Any]) -> dict[str, Any]:
    """Return ``promise``, ``odds`` and ``budget``: paragraphs for the first page."""
    return {
        "promise": promise_paragraph(data),
        "odds": odds(data),
        "budget": budget_paragraphs(data),
    }


def promise_paragraph(data: dict[str, Any]) -> str:
    """Return the promise against readers of the models, in one paragraph."""
    promise, readers = data["promise"], data["adversaries"][0]
    if promise["trust"] == "off":
        return (
            "Nothing is promised. Privacy was off: clients sent exact updates, and no statement is "
            "made about what the models or the updates reveal about a client's examples."
        )
    if as_float(readers["epsilon"]) == float("inf"):
        return "Nothing is promised: something was released without protection, so ε = ∞."
    value = epsilon_text(readers["epsilon"])
    return (
        f"{_unit(promise)} Whatever someone may conclude who has only the models of this run, the "
        f"chance of it is at most {odds_text(readers['epsilon'])} times (e to the power ε = "
        f"{value}) what it would have been {_otherwise(promise)}, plus δ, a chance of "
        f"{chance_text(promise['delta'])}; and the other way round. This holds for every single "
        "one, also for the client that took part most often, whatever else is known and whatever "
        "is computed from the models later."
    )


def _unit(promise: dict[str, Any]) -> str:
    if promise["unit"] == "client":
        return "Take any single client, with everything that it contributed to this run."
    return "Take any single training example of any single client."


def _otherwise(promise: dict[str, Any]) -> str:
    what = "client" if promise["unit"] == "client" else "example"
    if promise["relation"] == "replace-one":
        return f"if another {what} had been in its place"
    if what == "client":
        return "if that client had contributed nothing"
    return "if that example had not been there"


def odds(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a sentence for each adversary, about two suspicions that it may begin with."""
    promise = data["promise"]
    what = "your example was used"
    if promise["trust"] != "off" and promise["unit"] == "client":
        what = "you contributed"
    return [
        {
            "name": row["name"],
            "from_half": row["certainty_from_half"],
            "from_thousandth": row["certainty_from_thousandth"],
            "text": _odds_sentence(row, what),
        }
        for row in data["adversaries"]
    ]


def _odds_sentence(row: dict[str, Any], what: str) -> str:
    start = f"someone who already suspects with probability ½ that {what}"
    if row["epsilon"] == "infinity":
        return f"{start} may become certain of it."
    half, thousandth = (
        certainty_text(row[key]) for key in ("certainty_from_half", "certainty_from_thousandth")
    )
    if thousandth == "100 %":
        return f"{start}, or 1 in 1,000, may become as good as certain of it."
    first = "as good as certain of it" if half == "100 %" else f"at most {half} sure"
    return (
        f"{start} can become {first}; someone who begins with 1 in 1,000 can become at most "
        f"{thousandth} sure."
    )


def budget_paragraphs(data: dict[str, Any]) -> list[str]:
    """Return what happens when a budget is spent, and what happened in this run."""
    promise, spent = data["promise"], data["spent"]
    if promise["trust"] == "off":
        return ["There is no budget: privacy was off, so nothing was counted and nothing stopped."]
    stop = spent["hard_stop"]
    limit = {
        None: "a budget that its owner sets",
        "infinity": "a budget; in this run it was unlimited, so nothing would have stopped it",
    }.get(stop, f"a budget; in this run ε = {epsilon_text(stop)}")
    return [
        f"Each device keeps a ledger of what it has spent, and has {limit}. Before a round begins "
        "the device writes the whole cost of the round into the ledger. A round that does not fit "
        "is refused: the device then trains on nothing and sends nothing but a fixed refusal code, "
        "whatever the server asks. What is written is never taken back, even if the round fails.",
        "The other devices go on. When too few of them answer, the training ends by itself; the "
        "model of the last completed round stays as it is. What was spent does not come back with "
        "time, unless a device's owner has set a budget that renews; the promise then holds for "
        "each such period, and lifetime spending is still counted.",
        _happened(spent, data["run"].get("stopped")),
    ]


def delta_note(promise: dict[str, Any]) -> str:
    """Return what "at most" leaves out, for an adversary against whom something is promised.

    See the top of this module for the reason of the two twos.
    """
    return (
        "“At most” leaves out δ: odds of more than twice those behind these figures have a "
        f"probability of at most 2δ, {chance_text(min(1.0, 2 * promise['delta']))}."
    )


def _happened(spent: dict[str, Any], stopped: int | None) -> str:
    if spent["refusals"] is None:
        return "How often devices refused is left out: it follows from the secret draws of clients."
    if spent["refusals"]:
        end = "" if stopped is None else f" That ended the training before its round {stopped}."
        return (
            f"In this run devices refused {count_text(spent['refusals'], 'time')}, in "
            f"{count_text(spent['rounds_with_refusals'], 'round')}, because their budget was spent."
            f"{end}"
        )
    return "In this run no device had to refuse for its budget."
