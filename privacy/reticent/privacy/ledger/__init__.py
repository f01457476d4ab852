"""The ledger: a durable, append-only record of what every device has spent, and its hard stop.

Charge the whole planned round, fsync, train, store the release, fsync, send. A crash at any point
keeps the charge, so the record never counts less than what left the device.

Three files lie in a ledger's folder, and only together are they a ledger: ``ledger.db`` (the
entries), ``ledger.key`` (made once; every entry carries ``mac_i = HMAC-SHA256(key, mac_{i-1} ||
entry_i)``) and ``ledger.tip`` (the last entry's number and MAC, synchronised after every commit).

=====================================================  ==========================================
what happens to the files                              what :meth:`Ledger.open` does
=====================================================  ==========================================
killed or powered off at any point                     goes on; the last round may be charged and
                                                       not released, and is then trained again
database or its write-ahead log torn, cut, emptied,    refuses (:class:`LedgerError`), or, if the
bits flipped, or put back alone to an older state      damage touches nothing, loses nothing
entries altered, reordered or removed without the key  refuses, and names the first
tip torn in one of its two records, or put back        goes on: the database still holds every
alone to an older state                                charge
tip damaged in both, or missing; key missing, another  refuses
disk full                                              the charge fails, nothing is counted
the whole folder put back to an older state            **not noticed here**: compare with a head
                                                       kept elsewhere (:meth:`Ledger.contains`)
database *and* tip put back or cut to match            **not noticed here**, the same
entries rewritten by someone who has the key           **not noticed here**, the same
disk that acknowledges writes it did not make          noticed unless it loses tip and log alike
=====================================================  ==========================================
"""

from .grants import Grants
from .ledger import Ledger
from .records import Budget, BudgetExceeded, Charge, Head, Overview, Spent

__all__ = ["Budget", "BudgetExceeded", "Charge", "Grants", "Head", "Ledger", "Overview", "Spent"]
