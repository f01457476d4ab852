"""Empirical audits: what data say about a privacy claim, as statements at 99 % confidence."""

from .counts import CONFIDENCE, Guesses, accuracy_interval, clopper_pearson, guess
from .family import FamilyBound, family_bound
from .fdp import fdp_rejects
from .fit import gaussian_fit_epsilon
from .one_run import one_run_epsilon, one_run_p_value
from .randomness import RandomnessCheck, check_randomness
from .scores import (
    CanaryGame,
    Detector,
    any_rejects,
    choose_shares,
    detectors,
    likelihood_scores,
)
from .tradeoff import TradeOff, trade_off
from .two_populations import Errors, errors_epsilon, errors_reject, two_population_epsilon

__all__ = [
    "CONFIDENCE",
    "CanaryGame",
    "Detector",
    "Errors",
    "FamilyBound",
    "Guesses",
    "RandomnessCheck",
    "TradeOff",
    "accuracy_interval",
    "any_rejects",
    "check_randomness",
    "choose_shares",
    "clopper_pearson",
    "detectors",
    "errors_epsilon",
    "errors_reject",
    "family_bound",
    "fdp_rejects",
    "gaussian_fit_epsilon",
    "guess",
    "likelihood_scores",
    "one_run_epsilon",
    "one_run_p_value",
    "trade_off",
    "two_population_epsilon",
]
