"""A box is planned and paid for like a run of one stage; its inputs come from earlier runs; Ctrl-C lets it save."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest

from orchestrator import dev, spend
from orchestrator.errors import BudgetExceeded, UsageError
from orchestrator.handover import environments, machine_env, packages, upload_data
from orchestrator.live import PlainView
from orchestrator.plan import plan_from_dict, plan_to_dict
from orchestrator.provision import Latencies
from orchestrator.provision_local import local_offer
from orchestrator.runner import Runner, Snapshot
from orchestrator.states import State
from orchestrator.testing import fake_offer
from tasks.bucket import Manifest, commit_folder, open_bucket, read_commit
from tasks.contract import (
    BEFORE_PREFIX,
    BOX,
    BOX_READY,
    Architecture,
    BoxSettings,
    DataSource,
    EvaluateSettings,
    Exit,
    ExportSettings,
    LabelSettings,
    Limit,
    ModelSource,
    Progress,
    RehearseSettings,
    Task,
    TrainSettings,
    Watch,
    inputs_of,
)
from tests.plans import make_plan, make_row

TRAIN = TrainSettings(ModelSource(path="Qwen/Qwen2.5-1.5B"), "label")
LABEL = LabelSettings(ModelSource(stage="pretrain"), DataSource("builtin:addition/train"), "exact", 10)
HOUR_S = 3600.0


def plan_of_train(**more):
    plan = make_plan({"label": 100.0, "train": 200.0}, **more)
    label, train = plan.stages
    return replace(
        plan, stages=(replace(label, kind="label", settings=LABEL), replace(train, kind="train", settings=TRAIN))
    )


def planned(plan, **more):
    stage = dev.chosen_stage(plan, None)
    given = {"cap_micros": None, "deadline_s": HOUR_S, "idle_s": 900.0, **more}
    return dev.box_plan(plan, stage, dev.box_settings(stage, None, chat=False), **given)


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_a_box_is_a_run_of_one_stage_with_that_stages_machines() -> None:
    plan = plan_of_train(cap_micros=10_000_000)
    box = planned(plan)
    (stage,) = box.stages
    assert (stage.name, stage.kind, stage.candidates) == ("train", BOX, plan.stages[1].candidates)
    assert stage.settings == BoxSettings("train", TRAIN)
    assert (box.name, box.deadline_s, box.idle_s) == ("dev-test", HOUR_S, 900.0)
    assert box.digest != plan.digest and box.fits
    assert plan_from_dict(json.loads(json.dumps(plan_to_dict(box)))) == box


def test_without_a_cap_of_its_own_it_may_cost_its_hour_and_never_more_than_the_recipe() -> None:
    offer = fake_offer()
    rich, poor = (planned(plan_of_train(cap_micros=cap)) for cap in (10_000_000, 200_000))
    work_s = HOUR_S - offer.latencies.total_s
    assert rich.cap_micros == spend.reserve_micros(offer, work_s)
    assert rich.stages[0].hours.high * 3600 == pytest.approx(work_s)
    assert poor.cap_micros == 200_000
    assert poor.stages[0].hours.high * 3600 == spend.order_lifetime_s(offer, 200_000) < work_s
    assert planned(plan_of_train(), cap_micros=300_000).cap_micros == 300_000


@pytest.mark.parametrize(
    ("more", "word"), [({"cap_micros": 20_000}, "--budget"), ({"deadline_s": 400.0}, "--deadline")]
)
def test_a_box_that_would_hardly_open_is_not_rented(more: dict[str, float], word: str) -> None:
    with pytest.raises(BudgetExceeded) as caught:
        planned(plan_of_train(cap_micros=10_000_000), **more)
    assert word in caught.value.hint and caught.value.exit_code == 3


def test_on_a_machine_that_costs_nothing_the_recipes_cap_stays() -> None:
    box = planned(plan_of_train(cap_micros=70_000, offers=(local_offer(0),)))
    assert box.cap_micros == 70_000 and box.stages[0].cost_micros.high == 0


def test_the_stage_is_the_one_named_or_the_first_that_trains() -> None:
    plan = plan_of_train()
    assert dev.chosen_stage(plan, None).name == "train"
    assert dev.chosen_stage(plan, "label").name == "label"
    assert dev.chosen_stage(make_plan({"a": 1.0, "b": 1.0}), None).name == "a"
    with pytest.raises(UsageError) as caught:
        dev.chosen_stage(plan, "trian")
    assert "label, train" in caught.value.hint


def test_the_question_tells_machine_time_money_and_what_does_not_keep_it() -> None:
    lines = dev.words_of(planned(plan_of_train(cap_micros=10_000_000)), ["brings label of run x"])
    text = "\n".join(lines)
    assert "stage train (train)" in text and "an hour" in text and "cap" in text
    assert "15 min: an open notebook is no work" in text and lines[-1].strip() == "brings label of run x"


# --- what goes to the machine -----------------------------------------------------------------------------------------


def test_settings_of_any_stage_pass_through_a_box_unchanged() -> None:
    for settings in (TRAIN, LABEL, RehearseSettings(3, 0.1), ExportSettings("train")):
        kind = {"TrainSettings": "train", "LabelSettings": "label", "RehearseSettings": "rehearse"}.get(
            type(settings).__name__, "export"
        )
        box = BoxSettings(kind, settings, chat=ModelSource(stage="train"))
        task = Task("r", "s", BOX, 1, 1, "file:/x", box, Watch())
        assert Task.from_json(task.to_json()) == task


def test_a_box_gets_its_stages_environment_with_jupyterlab_in_locked_versions(tmp_path) -> None:
    assert environments(BOX, BoxSettings("train", TRAIN)) == ("train-box",)
    assert environments(BOX, BoxSettings("label", LABEL)) == ("label-box", "train-box")
    assert environments(BOX, BoxSettings("rehearse", RehearseSettings(1, 1.0))) == ()
    bucket = open_bucket(f"file:{tmp_path}").at("run1")
    wheel = tmp_path / "abc.whl"
    wheel.touch()
    env = machine_env(
        bucket, wheel, BoxSettings("train", TRAIN), kind=BOX, infra="slurm/lab", seconds=1.0, allow_account_key=False
    )
    asked = json.loads(env["KDCLOUD_PACKAGES"])
    assert set(asked) == {*packages("train", s3=False), "jupyterlab"}
    assert asked["jupyterlab"].startswith("jupyterlab==4.")


def test_prompts_of_the_stage_are_uploaded_for_its_box(tmp_path) -> None:
    bucket = open_bucket(f"file:{tmp_path}/b").at("run1")
    (tmp_path / "mine.jsonl").write_text('{"input": "1+1", "answer": "2"}\n')
    label = replace(LABEL, prompts=DataSource(str(tmp_path / "mine.jsonl")))
    found = upload_data(bucket, BoxSettings("label", label)).settings.prompts
    assert found.sha256 and bucket.head(found.source) is not None


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (TRAIN, ("label",)),
        (replace(TRAIN, student=ModelSource(stage="big")), ("label", "big")),
        (LABEL, ("pretrain",)),
        (EvaluateSettings("train", ModelSource(stage="pretrain"), DataSource("x"), "exact"), ("train", "pretrain")),
        (ExportSettings("train"), ("train",)),
        (RehearseSettings(1, 1.0), ()),
        (BoxSettings("train", TRAIN, chat=ModelSource(stage="export")), ("label", "export")),
        (BoxSettings("export", ExportSettings("train"), chat=ModelSource(stage="train")), ("train",)),
    ],
)
def test_what_a_stage_reads(settings: object, names: tuple[str, ...]) -> None:
    assert inputs_of(settings) == names  # type: ignore[arg-type]


def test_the_idle_rule_of_a_box_is_as_long_as_asked_whatever_its_pace_was() -> None:
    """Of other stages a stall is called after ten steps, or five minutes."""
    plan = planned(plan_of_train(cap_micros=10_000_000), idle_s=1800.0)
    runner = Runner.__new__(Runner)
    runner.run_id, runner.plan = "r", plan
    runner.lease, runner.bucket = SimpleNamespace(fence=1), SimpleNamespace(url="file:/x")
    runner._code_sha256 = lambda: "0"
    run = SimpleNamespace(apis={})
    box, other = plan.stages[0], plan_of_train().stages[1]
    watches = [runner._task(run, stage, 1, fake_offer()).watch for stage in (box, other)]
    assert [(watch.idle_s, watch.stall_floor_s) for watch in watches] == [(1800.0, 1800.0), (1800.0, 300.0)]


# --- inputs -----------------------------------------------------------------------------------------------------------


def run(
    name: str, done: tuple[str, ...], *, box_of: str | None = None, checkpoint: str | None = None, run_id: str = "",
    saved: int = 9,
):  # fmt: skip
    stages = [{"name": box_of, "kind": BOX}] if box_of else [{"name": "train", "kind": "train"}]
    row = replace(make_row("kd-x", State.GONE), facts={"checkpoint": checkpoint} if checkpoint else {})
    return SimpleNamespace(
        id=run_id or f"{name}-1", name=name, bucket=f"file:/b/{run_id or name}", spent_micros=5, cap_micros=10,
        done={key: {"result": {"ended": "its time was up", "saved_bytes": saved}} for key in done}, live=(),
        data={"plan": {"stages": stages}}, machines=(row,),
    )  # fmt: skip


def find(runs, given=None, needed=("label",)):
    return dev.find_inputs(runs, "test", "train", needed, given)


def test_inputs_come_from_the_newest_run_of_the_recipe_that_has_all_of_them() -> None:
    runs = [run("test", (), run_id="new"), run("other", ("label",)), run("test", ("label",), run_id="old")]
    found = find(runs)
    assert [(piece.of, piece.prefix, piece.to) for piece in found.pieces] == [("old", "label", "label")]
    assert found.words() == ["brings label of run old"]


def test_without_such_a_run_the_box_says_what_it_begins_without() -> None:
    found = find([run("other", ("label",))])
    assert found.pieces == () and found.words() == ["begins without label: no run of this recipe has it"]


def test_a_run_that_is_named_must_have_them() -> None:
    assert find([], given=run("other", ("label",))).pieces[0].of == "other-1"
    with pytest.raises(UsageError) as caught:
        find([run("test", ("label",))], given=run("other", ()))
    assert "--resume other-1" in caught.value.hint


def test_labels_that_come_with_the_recipe_are_no_stages_results() -> None:
    assert find([], needed=("data/labels-abc", "/home/me/labels")) == dev.Inputs((), ())


def test_files_come_from_the_newest_box_of_the_same_stage_that_left_some() -> None:
    def before(*boxes):
        return [(p.of, p.prefix, p.only) for p in find(boxes, needed=()).pieces if p.to == BEFORE_PREFIX]

    broken = run("dev-test", (), box_of="train", run_id="broken")
    lost = run("dev-test", (), box_of="train", checkpoint="train/checkpoints/step-3", run_id="lost")
    closed = run("dev-test", ("train",), box_of="train", run_id="closed")
    other = run("dev-test", ("label",), box_of="label", run_id="other")
    assert before(other, broken, closed, lost) == [("closed", "train", ("work.zip",))]
    assert before(broken, lost, closed) == [("lost", "train/checkpoints/step-3", ("work.zip",))]
    assert before(other, broken) == []
    full = run("dev-test", ("train",), box_of="train", checkpoint="train/checkpoints/step-9", run_id="full", saved=0)
    assert before(full, closed) == [("full", "train/checkpoints/step-9", ("work.zip",))]  # what it saved before
    assert before(run("dev-test", ("train",), box_of="train", saved=0), closed) == [("closed", "train", ("work.zip",))]


def test_the_last_words_say_what_is_saved_and_what_is_not() -> None:
    plan = planned(plan_of_train())
    words = lambda *names, **more: " ".join(dev.last_words(run("dev-test", names, box_of="train", **more), plan))  # noqa: E731
    assert "not open" in words() and "work.zip" not in words()
    assert "train/work.zip" in words("train") and "NOT" not in words("train")
    full = words("train", checkpoint="train/checkpoints/step-9", saved=0)
    assert "NOT saved" in full and "train/checkpoints" in full and "work.zip" not in full
    assert "NOT saved" in words("train", saved=0) and "next box" not in words("train", saved=0)


def test_a_box_that_never_had_a_machine_is_not_gone_on_with() -> None:
    """Its client may have ended before the inputs were there."""
    plan = planned(plan_of_train())
    known = run("dev-test", (), box_of="train")
    dev.check_resumable(known, plan)
    known.machines = ()
    with pytest.raises(UsageError, match="no machine yet"):
        dev.check_resumable(known, plan)


def test_a_box_of_the_same_stage_that_may_still_be_open_is_named_before_a_second_one_is_rented() -> None:
    runs = [run("dev-test", (), box_of="train", run_id=name) for name in ("open", "closed", "label")]
    runs[0].live = runs[2].live = runs[0].machines
    runs[2].data["plan"]["stages"][0]["name"] = "label"
    assert dev.still_open([*runs, run("test", ())], "test", "train") == ["open"]


@pytest.mark.parametrize(
    ("infra", "ssh", "refused"), [("slurm/lab", False, True), ("slurm/lab", True, False), ("local", False, False)]
)
def test_a_box_that_could_not_be_reached_is_not_rented(
    monkeypatch: pytest.MonkeyPatch, infra: str, ssh: bool, refused: bool
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/ssh" if ssh else None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    plan = planned(plan_of_train(offers=(replace(fake_offer(), infra=infra),), cap_micros=10_000_000))
    with pytest.raises(UsageError, match="reached by ssh") if refused else nullcontext():
        dev.check_here(plan)


def test_files_that_are_not_saved_are_told_while_the_box_is_open_once_until_it_goes_well() -> None:
    told: set[float] = set()
    said = [bool(dev.warnings({"left_s": 3000.0, "unsaved": float(bad)}, 900.0, told)) for bad in (0, 1, 1, 0, 1)]
    assert said == [False, True, False, False, True]


def test_what_is_laid_in_is_committed_file_by_file_and_only_what_is_wanted(tmp_path) -> None:
    source, own = (open_bucket(f"file:{tmp_path}/b").at(name) for name in ("old", "new"))
    (tmp_path / "out").mkdir()
    for name in ("work.zip", "result.json"):
        (tmp_path / "out" / name).write_text(name)
    commit_folder(source, tmp_path / "out", "train", fence=7)
    beats: list[int] = []
    session = SimpleNamespace(
        bucket=SimpleNamespace(url=own.url), lease=SimpleNamespace(renew_if_due=lambda: beats.append(1))
    )
    pieces = [
        dev.Piece(source.url, "train", "train", "old"),
        dev.Piece(source.url, "train", BEFORE_PREFIX, "old", ("work.zip",)),
    ]
    dev.lay_in(pieces, session, lambda text: None)  # type: ignore[arg-type]
    whole, before = read_commit(own, "train"), read_commit(own, BEFORE_PREFIX)
    assert whole == Manifest(0, read_commit(source, "train").files) and set(before.files) == {"work.zip"}
    assert own.get(f"{BEFORE_PREFIX}/work.zip")[0] == b"work.zip" and len(beats) >= 3


def test_the_chat_is_with_the_student_of_a_run_or_the_stages_own_model() -> None:
    def given(**kinds: str):
        stages = [replace(make_plan({name: 1.0}).stages[0], name=name, kind=kind, settings=RehearseSettings(1, 1.0))
                  for name, kind in kinds.items()]  # fmt: skip
        raw = plan_to_dict(replace(make_plan({"x": 1.0}), stages=tuple(stages)))
        for stage in raw["stages"]:
            stage["settings"] = {"student": "t", "formats": ["hf"]} if stage["kind"] == "export" else (
                {"steps": 1, "seconds_per_step": 1.0} if stage["kind"] == "rehearse" else json.loads(json.dumps(
                    plan_to_dict(plan_of_train())))["stages"][1]["settings"])  # fmt: skip
        data = {"schema": 1, "plan": raw, "version": "x"}
        return SimpleNamespace(id="r", done={key: {} for key in kinds}, data=data)

    assert dev.chat_source(TRAIN, given(train="train", export="export")) == ModelSource(stage="export")
    assert dev.chat_source(TRAIN, given(first="train", second="train")) == ModelSource(stage="second")
    assert dev.chat_source(TRAIN, None) == TRAIN.student
    assert dev.chat_source(LABEL, None) == LABEL.teacher
    assert dev.chat_source(ExportSettings("train"), None) == ModelSource(stage="train")
    for settings, named in ((TRAIN, given(only="rehearse")), (RehearseSettings(1, 1.0), None)):
        with pytest.raises(UsageError):
            dev.chat_source(settings, named)
    with pytest.raises(UsageError):
        dev.chat_source(replace(TRAIN, student=ModelSource(architecture=Architecture())), None)


# --- the session ------------------------------------------------------------------------------------------------------


class Doors:
    def reach(self, name: str, job_id: str): ...


def desk(tmp_path, infra: str = "slurm/lab", before: tuple[object, ...] = ()):
    offer = replace(fake_offer(), infra=infra, latencies=Latencies(flush_s=60.0))
    plan = planned(plan_of_train(cap_micros=10_000_000, offers=(offer,)), deadline_s=7200.0)
    bucket = open_bucket(f"file:{tmp_path}").at("run1")
    session = SimpleNamespace(
        plan=plan, provider=Doors(), bucket=bucket, lease=SimpleNamespace(fence=3), run_id="r",
        ledger=SimpleNamespace(run=lambda _: SimpleNamespace(machines=before)),
    )  # fmt: skip
    said: list[str] = []
    return dev.Desk(session, lambda kind, stage, text: said.append(text), said.append), bucket, said


def seen(infra: str = "slurm/lab", state: State = State.LIVE, rc: int | None = None, **numbers: float) -> Snapshot:
    offer = dev.offer_from_dict  # the row holds what the ledger does
    from orchestrator.runner import offer_to_dict

    assert offer
    order = {"offer": offer_to_dict(replace(fake_offer(), infra=infra)), "attempt": 1}
    row = replace(make_row("kd-x", state), order=order, facts={"job": "train-1"}, job_rc=rc)
    progress = Progress(BOX_READY, attempt=1, numbers=numbers)
    live = None if state is State.GONE else row
    return Snapshot(SimpleNamespace(machines=(row,)), "train", live, 60.0, progress, 0)  # type: ignore[arg-type]


def test_ctrl_c_before_a_box_is_open_promises_no_files(tmp_path) -> None:
    box, _, said = desk(tmp_path)
    box.close()
    assert box.stops() and said == ["ending the machine: the box was not open yet"]


def test_ctrl_c_tells_a_rented_box_to_close_and_waits_for_its_files(tmp_path) -> None:
    box, bucket, said = desk(tmp_path)
    box.look(seen())
    assert not box.stops()
    box.close()
    assert not box.stops()  # before anything else is looked at: it is told first
    limit = Limit.from_json(bucket.get("train/limit.json")[0].decode())
    assert (limit.attempt, limit.fence) == (1, 3) and limit.total > 0
    assert "saves your files" in said[-1]
    box.close()
    assert box.stops() and "now" in said[-1]


def test_a_box_that_does_not_close_in_time_is_ended(tmp_path, monkeypatch) -> None:
    box, _, _ = desk(tmp_path)
    now = [1000.0]
    monkeypatch.setattr(dev.time, "monotonic", lambda: now[0])
    box.look(seen())
    box.close()
    assert not box.stops()
    now[0] += dev.CLOSING_S + 59.0
    assert not box.stops()
    now[0] += 2.0
    assert box.stops()


@pytest.mark.parametrize("when", ["before it is open", "on this machine"])
def test_ctrl_c_ends_at_once_what_has_no_way_to_be_told(tmp_path, when: str) -> None:
    infra = "local" if when == "on this machine" else "slurm/lab"
    box, bucket, _ = desk(tmp_path, infra)
    box.look(seen(infra) if infra == "local" else seen(state=State.CREATING))
    box.close()
    assert box.stops() and bucket.head("train/limit.json") is None


@pytest.mark.parametrize("rc", [Exit.STALLED, Exit.TERMINATED, Exit.DEADLINE])
def test_no_second_machine_is_rented_for_a_box_that_ended_without_saving(tmp_path, rc: Exit) -> None:
    box, _, _ = desk(tmp_path)
    box.look(seen(state=State.GONE, rc=rc))
    assert box.stops()


def test_how_an_earlier_session_ended_does_not_end_the_one_that_goes_on(tmp_path) -> None:
    ended = seen(state=State.GONE, rc=Exit.STALLED)
    box, _, _ = desk(tmp_path, before=ended.run.machines)
    box.look(ended)
    assert not box.stops()


def test_a_machine_that_was_lost_is_replaced_as_in_any_run(tmp_path) -> None:
    box, _, _ = desk(tmp_path)
    box.look(seen(state=State.GONE, rc=None))
    assert not box.stops()


def test_the_end_that_comes_near_is_told_in_the_terminal_once(tmp_path) -> None:
    box, _, said = desk(tmp_path)
    for left_s, quiet_s in ((3000.0, 0.0), (590.0, 0.0), (580.0, 0.0), (110.0, 601.0), (100.0, 602.0)):
        box.look(seen(left_s=left_s, quiet_s=quiet_s))
    assert [text.partition(" ")[0] for text in said] == ["its", "its", "nothing"]


def test_a_machine_is_reached_for_once_its_supervisor_works_and_is_open_when_its_servers_answer() -> None:
    assert dev.target_of(seen()) == dev.Target("kd-x", "train-1", "train", is_open=True)
    early = replace(seen(), progress=Progress("start JupyterLab", attempt=1))
    assert dev.target_of(early) == dev.Target("kd-x", "train-1", "train", is_open=False)
    older = replace(seen(), progress=Progress(BOX_READY, attempt=0))
    assert [dev.target_of(one) for one in (older, seen(state=State.DRAINING))] == [None, None]


def test_what_it_does_until_it_is_open_is_told_once_each(tmp_path) -> None:
    box, _, said = desk(tmp_path)
    for phase in ("start", "download", "download", "start JupyterLab", BOX_READY, "checkpoint", BOX_READY):
        box.look(replace(seen(), progress=Progress(phase, attempt=1)))
    assert said == ["download ...", "start JupyterLab ..."]


def test_no_picture_is_drawn_over_the_addresses() -> None:
    assert issubclass(dev.DeskView, PlainView)
    dev.DeskView(planned(plan_of_train(cap_micros=10_000_000))).update(seen())
