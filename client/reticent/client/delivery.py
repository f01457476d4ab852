"""What a device does with the offer of a model, and with the parts of it that arrive."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from reticent.core.bundle import is_signed_plan
from reticent.core.errors import ArtifactError, PlanError, PolicyError
from reticent.core.offer import MOST_CHUNK, Offer, Receipt, open_offer
from reticent.core.protocol import Refusal
from reticent.privacy.release import Public

from .diary import INSTALLED, Diary
from .folder import Device
from .models import MOST_TRIES, Models, SelfTestFailed
from .order import Refused, plan_of
from .policy import Policy
from .resources import Memory, disk_free
from .rules import against_model, against_now, against_room
from .sensors import Sensors
from .trial import CutShort, needed_of, try_model


@dataclass(frozen=True)
class Part:
    """What one message brings of a model.

    Attributes:
        offer: The signed offer, which every message repeats.
        chunk: Bytes of the model; empty to ask how many have arrived.
        offset: Where they belong.
    """

    offer: bytes
    chunk: bytes = b""
    offset: int = 0


@dataclass(frozen=True)
class Recipient:
    """Takes a model for a device, or refuses it with a fixed code.

    Guarantee: nothing but the signature of the offer is looked at before it is known to be by the
    server's key of artifacts, nothing of the model before its SHA-256 is the offered one, and no
    model is used before it has passed its self-test on this device. What is refused changes
    nothing about the model that is in use.

    Attributes:
        device: The device's folder.
        plan: Returns the plan that the model was trained by, as JSON; called once the offer is
            trusted, as it reads what the sender wrote.
        signature: What came with the plan, in hexadecimal.
        sensors: Where the device's state comes from.
        memory: Where free memory is looked up.
        now: Returns the local time.
        trial: Returns why the model in a folder does not work here, or raises that it cannot be
            told (:func:`.trial.try_model`); another one only in tests.
    """

    device: Device
    plan: Callable[[], str]
    signature: str
    sensors: Sensors = field(default_factory=Sensors)
    memory: Memory = field(default_factory=Memory)
    now: Callable[[], datetime] = datetime.now
    trial: Callable[[Path, Path, str, int], str] = try_model

    def receive(self, part: Part) -> Public[bytes]:
        """Take a part of a model; install it with the last one.

        Raises:
            Refused: With the code; its cause says why, for the owner alone.
        """
        offer = self._trusted(part.offer)
        policy = self.device.owners_policy()
        self._require_allowed(policy, offer)
        models = Models(self.device.models, lambda: self.now().timestamp())
        try:
            with models.alone():
                if not models.holds(offer):
                    self._require_wanted(models, offer)
                    self._require_fit(policy, offer)
                    self._take(models, offer, part)
                receipt = Receipt(models.state().version, models.incoming.offset(offer))
        except SelfTestFailed as error:
            raise Refused(Refusal.SELF_TEST) from error
        except CutShort as error:
            why = f"model {offer.version}: {error}"
            raise Refused(Refusal.NOT_NOW) from PolicyError(why)
        except OSError as error:
            why = f"a model cannot be stored: {error.strerror or type(error).__name__}"
            raise Refused(Refusal.NOT_STORED) from PolicyError(why)
        return Public(receipt.encode(), "receipt")

    def _trusted(self, data: bytes) -> Offer:
        try:
            return open_offer(self.device.key("artifacts"), data)
        except ArtifactError as error:
            raise Refused(Refusal.UNTRUSTED) from error

    def _require_allowed(self, policy: Policy, offer: Offer) -> None:
        try:
            plan = plan_of(self.plan())
        except PlanError as error:
            raise Refused(Refusal.WRONG_PLAN) from error
        if plan.digest != offer.plan:
            raise _refused(Refusal.WRONG_PLAN, [f"model {offer.version}: is of another plan"])
        signers = self.device.signers(policy)
        if not any(is_signed_plan(key, self.signature, plan.digest) for key in signers):
            raise _refused(Refusal.UNSIGNED, [Refusal.UNSIGNED.text])
        _require(Refusal.POLICY, against_model(policy, plan, offer.size))

    def _require_wanted(self, models: Models, offer: Offer) -> None:
        state = models.state()
        if not models.admits(offer):
            said = f"model {offer.version}: {state.highest} was installed"
            raise _refused(Refusal.OLD_MODEL, [said])
        tried = state.tests_of(offer.version)
        if tried.failed >= MOST_TRIES:
            said = f"model {offer.version}: its self-test failed {MOST_TRIES} times"
            raise _refused(Refusal.SELF_TEST, [said])
        if models.waits(offer.version):
            said = (
                f"model {offer.version}: its self-test came to no end, {tried.cut_short} times in "
                f"a row: tried again after {tried.pause / 60:.0f} minutes"
            )
            raise _refused(Refusal.NOT_NOW, [said])

    def _require_fit(self, policy: Policy, offer: Offer) -> None:
        """Refuse a model while the owner's conditions do not hold, or there is no room for it."""
        said = against_now(policy.when, self.sensors.read(), self.now())
        # It is held twice until it is installed: as it arrives, and in files.
        disk = max(0, disk_free(self.device.folder) - 2 * offer.size)
        needed = needed_of(offer.size) + 2 * offer.size
        said += against_room(policy, self.memory.free(), disk, needed)
        _require(Refusal.NOT_NOW, said)

    def _take(self, models: Models, offer: Offer, part: Part) -> None:
        end = part.offset + len(part.chunk)
        if len(part.chunk) > MOST_CHUNK or part.offset < 0 or end > offer.size:
            raise Refused(Refusal.BAD_ORDER)
        if part.chunk:
            models.incoming.add(offer, part.offset, part.chunk)
        if models.incoming.offset(offer) == offer.size:
            self._install(models, offer)

    def _install(self, models: Models, offer: Offer) -> None:
        try:
            files = offer.cut(models.incoming.read(offer))
        except ArtifactError as error:
            models.incoming.clear()
            raise Refused(Refusal.DAMAGED) from error
        key = self.device.key_file("artifacts")
        try:
            models.install(
                offer, files, lambda folder: self.trial(folder, key, offer.plan, offer.size)
            )
        except SelfTestFailed:
            models.incoming.clear()
            raise
        with suppress(OSError):  # it is installed, whether that can be written down or not
            Diary(self.device.state).add(INSTALLED, f"model {offer.version}", offer.plan)


def _require(refusal: Refusal, reasons: list[str]) -> None:
    if reasons:
        raise _refused(refusal, reasons)


def _refused(refusal: Refusal, reasons: list[str]) -> Refused:
    error = Refused(refusal)
    error.__cause__ = PolicyError("; ".join(reasons))
    return error
