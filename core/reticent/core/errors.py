"""Errors that a user can act on, each with the exit status the command line returns for it."""

from __future__ import annotations


class ReticentError(Exception):
    """Base of every error raised for a reason the user can do something about.

    The message says what was given, what is allowed and where. ``exit_code`` is the exit status
    of the ``reticent`` command; the codes are documented in ``docs/cli.md`` and never reused.
    """

    exit_code = 1


class PlanError(ReticentError):
    """A plan file or a ``--set`` override is not acceptable."""

    exit_code = 3


class DataError(ReticentError):
    """Data or a task is missing, malformed or does not fit the plan."""

    exit_code = 4


class PrivacyError(ReticentError):
    """A privacy budget cannot be met, or a release would overspend it."""

    exit_code = 5


class LedgerError(PrivacyError):
    """A ledger is damaged, or does not belong to what it is used with."""


class NetworkError(ReticentError):
    """Too few clients answered, workers kept ending, or a connection could not be made."""

    exit_code = 6


class ArtifactError(ReticentError):
    """A deployable artifact is damaged, unsigned, signed by another key or cannot be made."""

    exit_code = 7


class RunError(ReticentError):
    """A run directory cannot be used: absent, already used, changed or damaged."""

    exit_code = 8


class PayloadError(ReticentError):
    """An encoded update is malformed; raised by codecs on bytes that they did not make."""

    exit_code = 9


class DependencyError(ReticentError):
    """An extra or a GPU is missing, or a Ray node has other code; the message says what to do."""

    exit_code = 10


class ProvisionError(ReticentError):
    """A device's bundle, or what a server keeps about devices and keys, cannot be used."""

    exit_code = 11


class PolicyError(ReticentError):
    """The policy of a device's owner is absent or not acceptable."""

    exit_code = 12


class StorageError(ReticentError):
    """A device's file cannot be read or written: the disk is full, read-only or fails."""

    exit_code = 13
