"""Plans: what is accepted, and what an error says."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from reticent.core.errors import PlanError
from reticent.core.plan import Plan, load_plan, parse_plan, plan_from_json
from reticent.core.run import without_none


def test_the_default_plan_is_valid_and_private() -> None:
    plan = parse_plan("")
    assert plan.private is not None
    assert plan.private.epsilon == 8
    assert plan.task.name == "fashion"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("federation.round=3", ["unknown key federation.round", "did you mean federation.rounds"]),
        ("federaton.rounds=3", ["unknown key federaton", "did you mean federation"]),
        ("student.zzz=1", ["unknown key student.zzz", "known keys here", "prune"]),
        ("privacy.epsilonn=1", ["unknown key privacy.epsilonn", "did you mean privacy.epsilon"]),
        ("federation.rounds=0", ["federation.rounds=0", "greater than or equal to 1"]),
        ("federation.rounds=two", ['federation.rounds="two"', "integer"]),
        ("federation.rounds=2.5", ["federation.rounds=2.5", "integer"]),
        ("federation.sampling_rate=1.5", ["federation.sampling_rate=1.5", "less than or equal"]),
        ("privacy.clip=-1", ["privacy.clip=-1", "greater than or equal to"]),
        ("privacy.clip=nan", ["privacy.clip"]),
        ("privacy.clip=1e-13", ["privacy.clip=1e-13", "greater than or equal to"]),
        ("privacy.clip=1e13", ["privacy.clip", "less than or equal to"]),
        ("privacy.delta=1", ["privacy.delta=1", "less than 1"]),
        ("privacy.trust=nobody", ['privacy.trust="nobody"', "'local' or 'aggregator'"]),
        ("privacy=on", ['privacy="on"', 'a section or "off"']),
        (
            "task.partition.kind=sorted",
            ["partition.kind", "'dirichlet', 'shards' or 'natural'"],
        ),
        ("federation.clients_per_round=101", ["clients_per_round=101", "task.clients=100"]),
        ("federation.min_replies=101", ["min_replies=101", "clients_per_round=100"]),
        ("federation.steps_per_round=2", ["steps_per_round=2", "must be 1", "noise share"]),
        ("privacy.unit=person", ['privacy.unit="person"', "'example' or 'client'"]),
        ("privacy.relation=swap", ["privacy.relation", "'add-or-remove-one' or 'replace-one'"]),
        ("privacy.clip_quantile=0.5", ["clip_quantile=0.5", 'unit="client"']),
        ("teacher.device=tpu", ['device="tpu"', "'cpu' or 'cuda'"]),
        ("teacher.precision=fp8", ['precision="fp8"', "'fp32', 'bf16' or 'fp16'"]),
        ("teacher.offload=cpu", ['teacher: offload="cpu"', "teacher.device", 'use "disk"']),
        ("teacher.offload=zero", ['teacher: offload="zero"', "teacher.device", 'use "disk"']),
        ("engine.kind=cloud", ["engine.kind", "'inprocess', 'ray' or 'flower-ray'"]),
        ("engine.workers=0", ["engine.workers=0", '"auto", or an integer of at least 1']),
        ("engine.workers=2.0", ["engine.workers=2.0", '"auto", or an integer of at least 1']),
        ("engine.address=auto", ['address="auto"', 'engine.kind is "ray"', '"inprocess"']),
        ("engine.prefetch=1", ["engine.prefetch=1", "valid boolean"]),
        ("seed=-1", ["seed=-1"]),
        ("seed=2026-01-01", ["seed=2026-01-01", "must not be a date"]),
        ("updates.codec=[2026-01-01]", ["updates.codec=2026-01-01", "must not be a date"]),
        ("federation.rounds=100000000000000000000", ["federation.rounds=1000", "2147483648"]),
        ("fleet.availability.slot=1e-300", ["fleet.availability.slot=1e-300", "equal to 1"]),
        ("fleet.step_seconds=1e308", ["fleet.step_seconds=1e+308", "3600"]),
        ("rounds", ["--set rounds", "section.key=value"]),
        ("seed.x=1", ["seed=a section", "integer"]),
    ],
)
def test_an_error_names_the_key_the_value_and_what_is_allowed(
    override: str, words: list[str]
) -> None:
    with pytest.raises(PlanError) as caught:
        parse_plan("", [override])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["kind=relation", "local_weight=0.5"], ["local_weight=0.5", "sum over examples"]),
        (["kind=feature", "local_weight=0.5"], ["local_weight=0.5", "hidden layers"]),
        (["kind=none", "mode=self"], ['mode="self"', "nothing is distilled"]),
        (["kind=feature", "mode=online"], ['kind="feature"', 'must be "response"']),
        (["kind=relation", "teacher.count=2"], ["teacher.count=2", "must be 1", "relation"]),
        (["mode=online", "teacher.count=2"], ["teacher.count=2", "must be 1", "online"]),
        (["mode=online", "task.public_labels=5"], ["task.public_labels=5", "online"]),
        (["task.public_labels=1001"], ["task.public_labels=1001", "task.public_examples=1000"]),
        (["mode=twice"], ["student.distill.mode", "'online', 'self' or 'reverse'"]),
    ],
)
def test_what_cannot_be_distilled_together_is_refused(
    overrides: list[str], words: list[str]
) -> None:
    whole = [o if "." in o.split("=")[0] else f"student.distill.{o}" for o in overrides]
    with pytest.raises(PlanError) as caught:
        parse_plan("", whole)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("kind", ["response", "response+feature", "response+relation", "none"])
def test_devices_may_imitate_answers_whatever_else_is_imitated_before(kind: str) -> None:
    plan = parse_plan("", [f"student.distill.kind={kind}", "student.distill.local_weight=0.5"])
    assert "feature" not in plan.student.distill.tuning.terms


def test_epsilon_and_noise_together_are_refused() -> None:
    with pytest.raises(PlanError, match="both"):
        parse_plan("[privacy]\nepsilon = 1.0\nnoise_multiplier = 1.0")


def test_a_privacy_section_without_a_target_is_refused() -> None:
    with pytest.raises(PlanError, match='privacy = "off"'):
        parse_plan("[privacy]\nclip = 1.0")


def test_overrides_of_the_default_promise_start_from_it() -> None:
    assert (
        parse_plan("", ["privacy.delta=1e-6"]).private
        == parse_plan("[privacy]\nepsilon = 8.0\ndelta = 1e-6").private
    )
    noise = parse_plan("", ["privacy.noise_multiplier=1.0"]).private
    assert noise is not None
    assert noise.epsilon is None


def test_local_trust_allows_several_steps() -> None:
    plan = parse_plan(
        "", ["privacy.trust=local", "privacy.epsilon=4", "federation.steps_per_round=5"]
    )
    assert plan.federation.steps_per_round == 5


CLIENT = "privacy.unit=client"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["privacy.trust=local"], ['trust="local"', 'must be "aggregator"', "adds the noise"]),
        (["privacy.clipping=per-layer"], ["per-layer", "single examples"]),
        (["privacy.examples_per_user=3"], ["examples_per_user", "single examples"]),
        (["privacy.clip_quantile=1.0"], ["privacy.clip_quantile=1.0", "less than 1"]),
        (["privacy.clip_quantile=0"], ["privacy.clip_quantile=0", "greater than 0"]),
    ],
)
def test_what_client_level_privacy_cannot_be_joined_with_is_refused(
    overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(PlanError) as caught:
        parse_plan("", [CLIENT, *overrides])
    for word in words:
        assert word in str(caught.value)


def test_client_level_privacy_allows_several_steps_because_no_share_is_sent() -> None:
    plan = parse_plan("", [CLIENT, "federation.steps_per_round=5", "privacy.clip_quantile=0.5"])
    assert plan.federation.steps_per_round == 5
    assert plan.private is not None and plan.private.clip_quantile == 0.5


def test_unit_relation_and_quantile_are_part_of_the_digest() -> None:
    plans = [
        parse_plan("", [CLIENT, *more])
        for more in ([], ["privacy.clip_quantile=0.5"], ["privacy.relation=replace-one"])
    ]
    assert len({parse_plan("").digest, *(p.digest for p in plans)}) == 4


def test_privacy_can_be_off_and_stays_off_when_written_and_read() -> None:
    plan = parse_plan('privacy = "off"')
    assert plan.private is None
    text = tomli_w.dumps(without_none(plan.model_dump(mode="json")))
    assert parse_plan(text).private is None


def test_a_plan_survives_toml_and_json() -> None:
    plan = parse_plan("", ["privacy.epsilon=3.5", "updates.codec=['identity']", "seed=7"])
    again = parse_plan(tomli_w.dumps(without_none(plan.model_dump(mode="json"))))
    assert again == plan
    assert plan_from_json(plan.canonical()) == plan
    assert again.digest == plan.digest


def test_the_engine_cannot_change_the_digest_and_the_rest_can() -> None:
    base = parse_plan("")
    assert parse_plan("", ["engine.workers=7"]).digest == base.digest
    assert parse_plan("", ["engine.prefetch=false"]).digest == base.digest
    assert parse_plan("", ["seed=1"]).digest != base.digest
    assert parse_plan("", ["privacy.delta=1e-6"]).digest != base.digest


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["teacher.offload=disk"], ['offload="disk"', '"none", "cpu" or "zero"', "GPU"]),
        (
            ["teacher.offload=zero", "teacher.precision=fp16"],
            ['precision="fp16"', '"fp32" or "bf16"', "teacher.offload"],
        ),
    ],
)
def test_what_a_teacher_on_a_gpu_cannot_have(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        parse_plan("", ["teacher.device=cuda", *overrides])
    for word in words:
        assert word in str(caught.value)


def test_keys_that_came_later_leave_the_digest_of_a_plan_without_them_alone() -> None:
    """As it was before ``teacher.device`` came."""
    before = "9d53b955c592c6da41e630df618eab17fa1c04aaec01969adba843b33fdfed39"
    assert parse_plan("").digest == before
    assert parse_plan("", ["teacher.device=cpu"]).digest == before
    assert parse_plan("", ["teacher.device=cuda"]).digest != before


def test_the_quorum_is_nine_tenths_unless_given() -> None:
    assert parse_plan("").federation.quorum == 90
    assert parse_plan("", ["federation.clients_per_round=11"]).federation.quorum == 10
    assert parse_plan("", ["federation.min_replies=5"]).federation.quorum == 5


def test_files_that_are_not_plans(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        load_plan(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[task\n")
    with pytest.raises(PlanError, match="not TOML"):
        load_plan(broken)
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="not UTF-8"):
        load_plan(broken)
    with pytest.raises(PlanError, match="not JSON"):
        plan_from_json("{")


@given(st.text(max_size=40))
def test_any_override_is_a_plan_or_a_plan_error(text: str) -> None:
    try:
        assert isinstance(parse_plan("", [text]), Plan)
    except PlanError as error:
        assert str(error)


@given(st.dictionaries(st.sampled_from(sorted(Plan.model_fields)), st.integers() | st.text()))
def test_any_values_are_a_plan_or_a_plan_error(data: dict) -> None:
    try:
        text = tomli_w.dumps(data)
        tomllib.loads(text)
    except (ValueError, TypeError):
        return
    try:
        parse_plan(text)
    except PlanError as error:
        assert str(error)


def test_bits_are_a_number() -> None:
    with pytest.raises(PlanError, match=r"student\.quantize\.bits: must be 8, 4, 3, 2 or 1"):
        parse_plan("[student.quantize]\nbits = true")


@pytest.mark.parametrize(("step", "bits"), [(0.25, 6), (0.5, 5), (1.0, 4), (2.0, 3), (4.0, 2)])
def test_auto_is_written_out_as_the_narrowest_dither_that_holds_the_noise(step, bits) -> None:
    plan = parse_plan("", [f"updates.step={step}", 'updates.codec=["auto"]'])
    assert plan.updates.codec == (f"dither{bits}", "ans")
    assert (2 ** (bits - 1) - 1) * step >= 4 > (2 ** (bits - 2) - 1) * step
    written = parse_plan("", [f"updates.step={step}", f'updates.codec=["dither{bits}", "ans"]'])
    assert plan.digest == written.digest
    assert plan_from_json(plan.canonical()) == plan


@pytest.mark.parametrize("step", ["0", "17", '"wide"'])
def test_a_step_out_of_range_is_named_whatever_the_codec(step) -> None:
    with pytest.raises(PlanError, match=r"updates\.step"):
        parse_plan("", [f"updates.step={step}", 'updates.codec=["auto"]'])


@pytest.mark.parametrize("key", ['student.distill.mode="online"', 'student.distill.kind="feature"'])
def test_rewinding_needs_a_training_whose_beginning_can_be_repeated(key: str) -> None:
    with pytest.raises(PlanError, match="weight-rewind"):
        parse_plan("", ['student.prune.schedule="weight-rewind"', key])
    parse_plan("", ['student.prune.schedule="weight-rewind"', 'student.distill.mode="self"'])
