"""Partial sums: folding in shares gives the bits of folding one by one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from torch import nn

from reticent.client.records import pack, unpack
from reticent.compression.codec import build_codec
from reticent.core.errors import LedgerError, PayloadError
from reticent.core.protocol import Refusal
from reticent.core.seeds import numpy_generator
from reticent.core.update import Layout
from reticent.privacy.events import PoissonGaussian
from reticent.privacy.ledger import Budget, BudgetExceeded, Grants, Ledger
from reticent.server.folding import Folder, Kept, Rules
from reticent.server.optimizer import Accumulator
from reticent.server.partial import decode_tally, encode_tally
from reticent.server.rounds import Tally
from reticent.simulations.grid import enter_task, node_of, numbered
from reticent.simulations.packets import Packer, Work, messages_in
from reticent.simulations.teams import shares
from reticent.simulations.workers import BLOCK

LAYOUT = Layout.of(nn.Linear(8, 4))
CODEC = build_codec(("identity",), LAYOUT)
EVENT = PoissonGaussian(0.1, 1.0, 1, "add-or-remove-one", "example")
BUDGET = Budget(1e6, 1e-5)


def replies(count: int, group: str = "1") -> list[Message]:
    """Return replies of ``count`` nodes: updates of all magnitudes, and each seventh an error."""
    enter_task()
    made = []
    for client in range(count):
        order = Message(RecordDict(), node_of(client), "train", group_id=group)
        numbered(order, client + 1)
        draws = numpy_generator(client, "update")
        scale = 10.0 ** draws.integers(-12, 12)
        vector = (scale * draws.standard_normal(LAYOUT.size)).astype(np.float32)
        payload = CODEC.encode(vector, LAYOUT.blocks, draws)
        good = Message(RecordDict({"update": pack(payload)}), reply_to=order)
        bad = Message(Error(int(Refusal.NO_DATA), "?"), reply_to=order)
        made.append(bad if client % 7 == 3 else good)
    return made


def folded(some: list[Message], rules: Rules) -> Tally:
    tally, folder = Tally(Accumulator(LAYOUT.size)), Folder(CODEC, rules)
    for reply in some:
        folder.take(reply, tally)
    return tally


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("parts", [1, 2, 5, 17])
def test_partial_sums_in_any_order_are_the_streamed_sum_bit_for_bit(
    parts: int, clip: float | None
) -> None:
    rules, all_ = Rules(1, LAYOUT, 1e30, clip), replies(50)
    streamed, merged = folded(all_, rules), Tally(Accumulator(LAYOUT.size))
    for part in numpy_generator(parts, "order").permutation(parts):
        data = encode_tally(folded(all_[part::parts], rules))
        merged.merge(decode_tally(data, LAYOUT.size))
    assert (merged.sum.total() == streamed.sum.total()).all()
    assert merged.sum.count == streamed.sum.count == 43
    assert merged.accepted == streamed.accepted and merged.failed == streamed.failed
    assert merged.dropped == streamed.dropped == {Refusal.NO_DATA.text: 7}
    assert merged.bytes_up == streamed.bytes_up > 0


def test_kept_updates_cross_with_the_partial_sums_and_merge_by_node() -> None:
    rules, all_ = Rules(1, LAYOUT, 1e30, keep=True), replies(20)
    folder, whole, merged = Folder(CODEC, rules), *(Tally.begin(LAYOUT.size, True) for _ in "ab")
    for reply in all_:
        folder.take(reply, whole)
    for part in (2, 0, 1):
        own = Tally.begin(LAYOUT.size, True)
        for reply in all_[part::3]:
            folder.take(reply, own)
        data = encode_tally(own)
        merged.merge(decode_tally(data, LAYOUT.size, keep=True))
    assert whole.vectors is not None and merged.vectors is not None
    assert set(merged.vectors) == merged.accepted == set(whole.vectors)
    assert all((merged.vectors[n] == whole.vectors[n]).all() for n in whole.vectors)
    bare = encode_tally(folded(all_, rules))
    with pytest.raises(PayloadError, match="without its updates"):
        decode_tally(bare, LAYOUT.size, keep=True)
    assert own.vectors is not None
    own.vectors[min(own.vectors)] = np.full(LAYOUT.size, np.nan)
    with pytest.raises(PayloadError, match="not finite"):
        decode_tally(encode_tally(own), LAYOUT.size, keep=True)


def test_naive_sums_would_depend_on_the_parts() -> None:
    vectors = [
        CODEC.decode(unpack(r.content, "update"), LAYOUT.blocks)
        for r in replies(50)
        if r.has_content()
    ]
    one = np.sum([v.astype(np.float64) for v in vectors], axis=0)
    two = sum(np.sum([v.astype(np.float64) for v in vectors[k::2]], axis=0) for k in (0, 1))
    assert (one != two).any()


def test_a_reply_of_another_round_or_a_second_one_is_passed_over() -> None:
    rules = Rules(1, LAYOUT, 1e30)
    tally = folded([*replies(3), *replies(3), *replies(3, group="2")], rules)
    assert tally.sum.count == 3 and not tally.dropped


def test_a_node_that_failed_and_then_answered_has_not_failed() -> None:
    failed = replies(4)[3]
    tally = folded([failed], Rules(1, LAYOUT, 1e30))
    assert tally.failed == {node_of(3)}
    later = Tally(Accumulator(LAYOUT.size), accepted={node_of(3)})
    tally.merge(later)
    assert tally.accepted == {node_of(3)} and not tally.failed


def test_a_partial_sum_that_is_broken_is_refused() -> None:
    data = encode_tally(folded(replies(9), Rules(1, LAYOUT, 1e30)))
    with pytest.raises(PayloadError, match="cannot be decoded"):
        decode_tally(data[:-1], LAYOUT.size)
    with pytest.raises(PayloadError, match=r"not finite float64 \(7,\)"):
        decode_tally(data, 7)
    twice = Tally(Accumulator(LAYOUT.size), accepted={2}, failed={2}, dropped=Counter())
    with pytest.raises(PayloadError, match="twice"):
        decode_tally(encode_tally(twice), LAYOUT.size)
    infinite = Accumulator.of(np.full(3, np.inf), np.zeros(3), 0)
    with pytest.raises(PayloadError, match="finite"):
        decode_tally(encode_tally(Tally(infinite)), 3)


@pytest.mark.parametrize("count", [1, 9, 10, 11, 60, 250, 499])
@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_shares_are_whole_blocks_and_cover_the_window_once(count: int, workers: int) -> None:
    window = replies(count)
    dealt = list(shares(window, workers))
    assert [m for share in dealt for m in share] == window
    assert len(dealt) <= workers and all(dealt)
    assert all(len(share) % BLOCK == 0 for share in dealt[:-1])
    assert max(map(len, dealt)) - min(map(len, dealt[:-1] or dealt)) <= BLOCK


def test_a_worker_gets_the_messages_that_the_strategy_made(tmp_path: Path) -> None:
    enter_task()
    order = ConfigRecord({"round": 3, "clip": 0.1, "run": "r"})
    model, constants = pack(b"model"), pack(b"constants")
    sent = [
        Message(
            RecordDict(
                {"order": order, "broadcast": model} | ({"constants": constants} if n else {})
            ),
            node_of(n),
            "train",
            group_id="3",
        )
        for n in range(3)
    ]
    mask = np.arange(LAYOUT.total) % 3 > 0
    rules = Rules(3, Layout(LAYOUT.names, LAYOUT.shapes, np.packbits(mask).tobytes()), float("inf"))
    packer = Packer(rules, Kept(b"constants", np.ones(3, dtype=np.float32)))
    data = packer.work(sent)
    assert packer.work(sent) is data, "the same records must not be sent again"
    work = Work.decode(data)
    assert work.rules == rules and work.kept.constants == b"constants"
    assert (work.kept.model == np.ones(3)).all()  # type: ignore[union-attr]
    grants = Grants(tmp_path, "r", 3, EVENT, {"client-0": 1, "client-1": 2}, {"client-2": 4.0})
    got, found = messages_in(packer.share(sent, grants), work, tmp_path)
    assert found == grants
    for ours, theirs in zip(sent, got, strict=True):
        assert theirs.metadata.dst_node_id == ours.metadata.dst_node_id
        assert theirs.metadata.group_id == "3" and theirs.metadata.message_type == "train"
        assert theirs.content == ours.content
    _, alone = messages_in(packer.share(sent[:1], grants), work, tmp_path)
    assert set(alone.charged) == {"client-0"} and not alone.refused


def test_only_the_very_charges_that_were_made_are_granted(tmp_path: Path) -> None:
    with Ledger.open(tmp_path) as ledger:
        made = ledger.charge("a", "run", 1, EVENT, BUDGET)
    grants = Grants(tmp_path, "run", 1, EVENT, {"a": made.sequence}, {"b": 2.5})
    again = grants.charge("a", "run", 1, EVENT, BUDGET)
    assert again.sequence == made.sequence and again.repeated
    with pytest.raises(BudgetExceeded, match=r"2\.5 is spent"):
        grants.charge("b", "run", 1, EVENT, BUDGET)
    other = PoissonGaussian(0.1, 0.5, 1, "add-or-remove-one", "example")
    for device, run, number, event in [
        ("c", "run", 1, EVENT),
        ("a", "other", 1, EVENT),
        ("a", "run", 2, EVENT),
        ("a", "run", 1, other),
        ("b", "run", 2, EVENT),
    ]:
        with pytest.raises(LedgerError, match="was not charged"):
            grants.charge(device, run, number, event, BUDGET)
    outcomes = grants.charge_many(["b", "a"], "run", 1, EVENT, BUDGET)
    assert isinstance(outcomes[0], BudgetExceeded) and outcomes[1] == again
    assert Grants.from_json(tmp_path, grants.to_json()) == grants
    assert Grants.from_json(tmp_path, Grants(tmp_path).to_json()) == Grants(tmp_path)
