"""The ledger itself: charge, and store what is released."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from reticent.core.errors import LedgerError
from reticent.core.protocol import BEFORE

from ..clock import BootClock, Clock
from ..events import Event
from .account import Account
from .afford import Afford, text_of
from .chain import walk
from .files import connect, mapped, prepare
from .records import Budget, BudgetExceeded, Charge, Head
from .store import Store
from .windows import View

LONGEST_NAME = 256


class Ledger(Account):
    """A ledger in one folder: ``ledger.db`` (SQLite), ``ledger.key`` and ``ledger.tip``.

    Get one from :meth:`open`. Several processes may have the same ledger open; within a process,
    use one instance per thread. Every method raises :class:`LedgerError` when the database is
    damaged, read-only, full, or locked for more than 30 seconds.
    """

    @staticmethod
    def open(folder: Path, verify: bool = True, clock: Clock | None = None) -> Ledger:
        """Open the ledger in ``folder``, creating its files if none exists.

        A ledger of an older version is migrated, all or nothing, after its chain was checked.

        Args:
            folder: Created if absent.
            verify: Also walk the whole chain, in time linear in its length.
            clock: Where device time comes from; by default the kernel's boot clock. Read only for
                budgets with a window, and in ledgers that had one before.

        Raises:
            LedgerError: If one of the files is missing, if the ledger is damaged or has lost its
                end, or if it was written by a version that this one does not know.
        """
        with mapped(folder):
            folder.mkdir(parents=True, exist_ok=True)
            db = connect(folder / "ledger.db")
            try:
                key = prepare(db, folder, lambda db, key: walk(db, key, folder).end.head)
                store = Store(folder, db, key, clock or BootClock())
                if verify:
                    store.verify()
                else:
                    store.check_tip()
                store.secure()
            except BaseException:
                db.close()
                raise
            return Ledger(store)

    @property
    def folder(self) -> Path:
        """Where the ledger's files are; what else a device keeps may lie beside them."""
        return self._store.folder

    def close(self) -> None:
        """Close the database; calling it again does nothing."""
        self._store.db.close()

    def __enter__(self) -> Ledger:
        """Return the ledger itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the ledger."""
        self.close()

    def charge(self, device: str, run: str, round: int, event: Event, budget: Budget) -> Charge:
        """Record the whole planned round before any of it happens; durable on return.

        A charge is never refunded: a round that fails afterwards stays charged.

        Charging the same ``(device, run, round)`` with the same event again returns the earlier
        charge, marked ``repeated``, without a second one. This is sound because one charge covers
        one release. If a release was stored, :meth:`stored_release` gives its bytes and sending
        those again tells nothing new. If none was stored, nothing left the device, since a release
        is stored before it is sent; so the first training had no observable outcome, and training
        again is the only one. :meth:`store_release` holds the caller to this.

        What fits a budget, and why that holds against a server that chooses as it goes, is said
        with :class:`Budget` and :class:`~.afford.Afford`.

        Raises:
            BudgetExceeded: If the charge does not fit; nothing is charged, and the refusal is
                counted (:meth:`overview`).
            LedgerError: If this round was charged with another event; if it was charged so long
                ago that it has left the budget's window, and was not released; or if the budget
                has a window and there is no clock for it.
        """
        _require_key(device, run, round)
        if budget.window is None:
            with mapped(self._store.folder):
                known = self._store.charge_of(device, run, round)
            if known:  # charges for life never go away, so this needs no lock
                return self._repeat(known, device, run, round, event)
        result = self.charge_many([device], run, round, event, budget)[0]
        if isinstance(result, BudgetExceeded):
            raise result
        return result

    def charge_many(
        self, devices: Sequence[str], run: str, round: int, event: Event, budget: Budget
    ) -> list[Charge | BudgetExceeded]:
        """Charge a cohort as :meth:`charge` does, in one transaction.

        Returns:
            For each device, in order, its charge or (not raised) the reason for its refusal.

        Raises:
            LedgerError: As :meth:`charge`, or if a device is named twice; nothing is recorded.
        """
        for device in devices:
            _require_key(device, run, round)
        if len(set(devices)) != len(devices):
            raise LedgerError(f"{self._store.folder}: a device is named twice in one cohort")
        with self._store.transaction():
            return self._charge(devices, run, round, event, budget)

    def _charge(
        self, devices: Sequence[str], run: str, round: int, event: Event, budget: Budget
    ) -> list[Charge | BudgetExceeded]:
        store, body, afford = self._store, text_of(event), Afford(event, budget)
        now = store.observed(needed=budget.window is not None)
        known = store.charges(devices, run, round)
        view = View.of(store, [d for d in devices if d not in known], budget, now.at)
        results: list[Charge | BudgetExceeded] = []
        new: list[str] = []
        end = store.end().sequence
        for device in devices:
            if device in known:
                self._require_current(known[device][0], view, device, run, round)
                results.append(self._repeat(known[device], device, run, round, event))
                continue
            spent = afford.refusal(view.lifetime(device), view.counted(device))
            if spent is None:
                new.append(device)
                results.append(Charge(device, run, round, event, end + len(new)))
            else:
                results.append(_refusal(device, spent, view, event, afford))
        store.marks.keep(now)
        store.add_charges(new, run, round, body, now.at)
        store.marks.refuse([r.device for r in results if isinstance(r, BudgetExceeded)], run, round)
        return results

    def affords(self, device: str, run: str, round: int, event: Event, budget: Budget) -> bool:
        """Return whether :meth:`charge` would accept this round now; nothing is recorded.

        For a second budget beside the one that is charged. It holds for the charge that follows as
        long as nobody else charges the device in between.

        Raises:
            LedgerError: As :meth:`charge`.
        """
        _require_key(device, run, round)
        with self._store.transaction():
            if self._store.charge_of(device, run, round) is not None:
                return True
            now = self._store.observed(needed=budget.window is not None)
            view = View.of(self._store, [device], budget, now.at)
            spent = Afford(event, budget).refusal(view.lifetime(device), view.counted(device))
            return spent is None

    def is_charged(self, device: str, run: str, round: int) -> bool:
        """Return whether ``device`` was charged for this round."""
        _require_key(device, run, round)
        with mapped(self._store.folder):
            return self._store.charge_of(device, run, round) is not None

    def rounds(self, device: str, run: str, round: int) -> int:
        """Return how many rounds ``device`` was ever charged for, without this one.

        What was released before any round (:data:`~reticent.core.protocol.BEFORE`) is none.
        """
        _require_key(device, run, round)
        with mapped(self._store.folder):
            this = self._store.charge_of(device, run, round) is not None
            return self._store.rounds(device) - this

    def tick(self) -> None:
        """Observe device time, so that what has passed until now counts if power is lost next.

        Only observed time counts, so a device whose budget has a window calls this when it starts
        and now and then; without, its budget renews later than it might, never earlier.

        Raises:
            LedgerError: If there is no clock.
        """
        with self._store.transaction():
            self._store.marks.keep(self._store.observed(needed=True))

    def store_release(self, device: str, run: str, round: int, payload: bytes) -> None:
        """Store what is about to be sent; durable on return, so only then may it be sent.

        Storing the same bytes again does nothing. Only a device's latest payload is kept, but the
        SHA-256 of every release is.

        Raises:
            LedgerError: If the round was not charged, or had another release: that would be two
                releases under one charge.
        """
        _require_key(device, run, round)
        digest, store = hashlib.sha256(payload).hexdigest(), self._store
        with store.transaction():
            if store.charge_of(device, run, round) is None:
                raise LedgerError(f"{self._name(device, run, round)}: must be charged before it")
            earlier = store.digest(device, run, round)
            if earlier == digest:
                return
            if earlier is not None:
                raise LedgerError(
                    f"{self._name(device, run, round)}: already released other bytes; one charge "
                    "covers one release"
                )
            now = store.observed(needed=False)
            store.marks.keep(now)
            store.add_release(device, run, round, payload, digest, now.at)

    def stored_release(self, device: str, run: str, round: int) -> bytes | None:
        """Return the stored bytes of a release, or None if there was none.

        Raises:
            LedgerError: If there was one whose bytes gave way to a later round's; the round must
                not be answered again.
        """
        _require_key(device, run, round)
        with mapped(self._store.folder):
            digest = self._store.digest(device, run, round)
            payload = self._store.payload(device, run, round)
            if payload is not None:
                self._store.secure()
        if digest is None:
            return None
        if payload is None:
            raise LedgerError(
                f"{self._name(device, run, round)}: released before, and its bytes gave way to a "
                "later release; this round must not be answered again"
            )
        if not isinstance(payload, bytes) or hashlib.sha256(payload).hexdigest() != digest:
            raise LedgerError(f"{self._name(device, run, round)}: its stored bytes are damaged")
        return payload

    def verify(self) -> Head:
        """Check the database and the tip, walk the chain and recount what follows from it.

        Raises:
            LedgerError: Naming the first entry that is missing or altered.
        """
        with mapped(self._store.folder):
            return self._store.verify()

    def _require_current(
        self, sequence: int, view: View, device: str, run: str, round: int
    ) -> None:
        # What is released counts in the window of its charge. A charge that has left the window
        # without a release must not be used any more: its release would fall in a later window,
        # beside others that fill that one. What was released before any run is released already.
        if (
            sequence >= view.oldest
            or run.startswith(BEFORE)
            or self._store.digest(device, run, round) is not None
        ):
            return
        raise LedgerError(
            f"{self._name(device, run, round)}: was charged more than the budget's window ago and "
            "not released; it must not be released now"
        )

    def _repeat(
        self, known: tuple[int, str], device: str, run: str, round: int, event: Event
    ) -> Charge:
        sequence, body = known
        if body != text_of(event):
            raise LedgerError(
                f"{self._name(device, run, round)}: was charged as {body} and cannot be charged "
                f"again as {text_of(event)}"
            )
        return Charge(device, run, round, event, sequence, repeated=True)

    def _name(self, device: str, run: str, round: int) -> str:
        return f"{self._store.folder}: device {device}, run {run}, round {round}"


def _refusal(device: str, spent: float, view: View, event: Event, afford: Afford) -> BudgetExceeded:
    budget, timed = view.budget, view.timed is not None
    now = view.now if timed else None
    return BudgetExceeded(device, spent, budget, event, now, view.renews(device, afford))


def _require_key(device: str, run: str, round: int) -> None:
    for name, value in (("device", device), ("run", run)):
        if not isinstance(value, str) or not value or not value.isprintable():
            raise LedgerError(f"{name}={value!r}: must be a non-empty printable string")
        if len(value) > LONGEST_NAME:  # servers choose the run's: it must not fill the disk
            raise LedgerError(
                f"{name}={value[:20]!r}…: has {len(value)} characters: at most {LONGEST_NAME}"
            )
    if isinstance(round, bool) or not isinstance(round, int) or not 0 <= round < 2**63:
        raise LedgerError(f"round={round!r}: must be a whole number >= 0")
