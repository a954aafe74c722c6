"""What a run left: told apart by its manifests, fetched byte for byte, and deleted only where nobody needs it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from orchestrator.artifacts import (
    S3_MICROS_PER_GB_MONTH,
    Kept,
    What,
    bytes_bar,
    doomed,
    fetch,
    human_bytes,
    kept_why,
    look,
    month_micros,
    prunable,
    prunable_runs,
    prune,
    wanted,
)
from orchestrator.errors import NotOwner, UsageError
from orchestrator.lease import Lease
from orchestrator.ledger import Ledger
from orchestrator.plan import plan_to_dict
from orchestrator.runner import mark_to_dict
from orchestrator.states import Event
from orchestrator.testing import FakeBucket, VirtualClock
from tasks.bucket import Bucket, Corrupt, FileEntry, Manifest, Stat, commit_folder, open_bucket
from tests.plans import make_plan
from tests.whole_runs import make_home

RUN = "test-abc123"
STAGES = ["label", "train"]
MONTH = timedelta(days=30)


def folder_with(path: Path, **files: bytes) -> Path:
    for name, data in files.items():
        target = path / name.replace("__", "/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return path


@pytest.fixture
def bucket(tmp_path) -> Bucket:
    """A run with a finished label stage and a train stage that has one checkpoint and half of another."""
    bucket = open_bucket(f"file:{tmp_path}/bucket/{RUN}")
    labels = folder_with(tmp_path / "a", shard_0=b"l" * 1000, deep__shard_1=b"m" * 500)
    commit_folder(bucket, labels, "label", fence=1)
    commit_folder(bucket, folder_with(tmp_path / "b", weights=b"w" * 2000), "train/checkpoints/step-10", fence=1)
    bucket.put("train/checkpoints/step-20/weights", b"w" * 70)
    for name in ("log.txt", "metrics.jsonl", "task.json", "events/tf.1"):
        bucket.put(f"train/{name}", b"record")
    bucket.put("ledger/0001.json", b"{}")
    bucket.put("code/x.whl", b"code")
    bucket.put("data/x.jsonl", b"data")
    return bucket


def test_every_file_is_told_by_what_stands_behind_it(bucket):
    found = look(bucket, STAGES)
    assert {(a.key, a.size, str(a.kept)) for a in found} == {
        ("label/deep/shard_1", 500, "committed"),
        ("label/shard_0", 1000, "committed"),
        ("train/checkpoints/step-10/weights", 2000, "committed"),
        ("train/checkpoints/step-20/weights", 70, "partial"),
        *((f"train/{name}", 6, "record") for name in ("log.txt", "metrics.jsonl", "task.json", "events/tf.1")),
    }
    assert [a.key for a in found] == sorted(a.key for a in found)


def test_what_was_committed_and_is_gone_or_changed_is_said(bucket):
    bucket.delete("label/shard_0")
    bucket.put("label/deep/shard_1", b"short")
    assert {a.key: a.kept for a in look(bucket, ["label"])} == {
        "label/shard_0": Kept.MISSING,
        "label/deep/shard_1": Kept.DAMAGED,
    }


def test_a_manifest_that_cannot_be_trusted_commits_nothing(bucket):
    bucket.put("label/COMMIT", b'{"schema": 1, "fence": 1, "files": {"../../x": {"size": 1, "sha256": "0"}}}')
    assert {a.kept for a in look(bucket, ["label"])} == {Kept.PARTIAL}


def test_the_result_of_a_stage_is_fetched_and_of_an_unfinished_one_what_it_committed(bucket, tmp_path):
    found = look(bucket, STAGES)
    assert wanted(found) == {"label": 1500, "train/checkpoints/step-10": 2000}
    moved: list[int] = []
    assert fetch(bucket, found, tmp_path / "here", moved=moved.append) == 3
    assert sum(moved) == 3500
    assert (tmp_path / "here/label/deep/shard_1").read_bytes() == b"m" * 500
    assert not (tmp_path / "here/train/checkpoints/step-20").exists()
    result = folder_with(tmp_path / "c", model=b"r" * 5)
    commit_folder(bucket, result, "train", fence=1)
    assert wanted(look(bucket, ["train"])) == {"train": 5}  # its checkpoints are no longer worth the way


def test_a_fetch_that_broke_off_goes_on_with_what_is_there(bucket, tmp_path, monkeypatch):
    found, here, calls = look(bucket, ["label"]), tmp_path / "here", []
    original = type(bucket).get_file

    def breaking(self, key, path, moved=None):
        calls.append(key)
        if len(calls) == 2:
            raise OSError("the line is dead")
        original(self, key, path, moved)

    monkeypatch.setattr(type(bucket), "get_file", breaking)
    with pytest.raises(Exception, match="dead"):
        fetch(bucket, found, here)
    assert fetch(bucket, found, here) == 2
    assert len(calls) == 3  # the first file was not fetched again


def test_bytes_that_are_not_what_was_committed_are_refused(bucket, tmp_path):
    bucket.put("label/shard_0", b"x" * 1000)
    with pytest.raises(Corrupt):
        fetch(bucket, look(bucket, ["label"]), tmp_path / "here")


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "a/../../escaped", "..\\escaped"])
def test_names_that_would_leave_the_folder_are_refused(bucket, tmp_path, name):
    files = {name: FileEntry(4, "0" * 64)}
    bucket.put("label/COMMIT", Manifest(1, files).to_json().encode())
    with pytest.raises((UsageError, Corrupt)):
        fetch(bucket, look(bucket, ["label"]), tmp_path / "deep" / "here")
    assert not list(tmp_path.glob("**/escaped"))


def test_a_link_in_the_folder_does_not_lead_out_of_it(bucket, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", here / "label")
    with pytest.raises(Corrupt, match="leads out"):
        fetch(bucket, look(bucket, ["label"]), here)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_with_nothing_committed_there_is_nothing_to_fetch(bucket, tmp_path):
    bucket.delete("label/COMMIT")
    with pytest.raises(UsageError, match="committed"):
        fetch(bucket, look(bucket, ["label"]), tmp_path / "here")


def test_without_a_terminal_progress_is_lines(capsys, monkeypatch):
    monkeypatch.setattr("orchestrator.artifacts.PLAIN_EVERY_S", 0.0)
    with bytes_bar(3_000_000, "fetching") as moved:
        moved(1_000_000)
    assert capsys.readouterr().err == "fetching: 1.0 MB of 3.0 MB\n"


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (9_960_000, "10 MB"), (3_400_000_000, "3.4 GB"), (5e15, "5000 TB")],
)
def test_sizes_are_shown_in_powers_of_ten(size, text):
    assert human_bytes(int(size)) == text


# -- what may go -------------------------------------------------------------------------------------------------------


class Kingdom:
    """A ledger with one run whose bucket is the fixture's."""

    def __init__(self, tmp_path: Path, bucket: Bucket) -> None:
        self.clock, self.bucket = VirtualClock(), bucket
        self.ledger = Ledger(tmp_path / "ledger.sqlite")
        mark = self.clock.mark()
        plan = plan_to_dict(make_plan({"label": 1.0, "train": 1.0}))
        data = {"schema": 1, "owner": "owner1", "plan": plan}
        self.ledger.create_run(
            RUN, name="t", bucket=bucket.url, cap_micros=100, deadline_s=None, mark=mark_to_dict(mark), at=mark.wall,
            data=data,
        )  # fmt: skip

    def end(self, state: str = "done") -> None:
        self.ledger.note(RUN, "ended", self.clock.mark().wall, data={"state": state, "message": "", "hint": ""})

    def may(self, *, older_than=MONTH, named=False, what=What.CHECKPOINTS):
        return prunable(self.ledger, RUN, clock=self.clock, older_than=older_than, named=named, what=what)


@pytest.fixture
def kingdom(tmp_path, bucket) -> Kingdom:
    return Kingdom(tmp_path, bucket)


def keys(bucket: Bucket) -> set[str]:
    return {stat.key for stat in bucket.list()}


def test_checkpoints_and_broken_uploads_of_a_done_old_run_go_and_nothing_else(kingdom, bucket):
    kingdom.end()
    kingdom.clock.sleep(31 * 24 * 3600)
    before, one = keys(bucket), kingdom.may()
    assert set(one.keys) == {k for k in before if k.startswith("train/checkpoints/")} and one.size > 2070
    assert keys(bucket) == before  # dry
    prune(kingdom.ledger, one, clock=kingdom.clock, what=What.CHECKPOINTS)
    assert keys(bucket) - {"lease.json"} == before - set(one.keys)
    assert kingdom.ledger.run(RUN).entries[-1].kind == "pruned"
    assert kingdom.may(older_than=timedelta()).keys == ()


def test_everything_leaves_the_ledger_and_the_lease(kingdom, bucket):
    kingdom.end()
    Lease.acquire(bucket, "owner1", kingdom.clock).release()
    one = kingdom.may(older_than=timedelta(), what=What.EVERYTHING)
    prune(kingdom.ledger, one, clock=kingdom.clock, what=What.EVERYTHING)
    assert keys(bucket) == {"ledger/0001.json", "lease.json"}


def test_labels_go_only_when_asked_for_and_results_stay():
    stats = [Stat(key, 1, "", None) for key in (
        "label/COMMIT", "label/shard", "label/log.txt", "train/model", "train/COMMIT", "train/checkpoints/step-1/w",
        "code/x", "data/y", "ledger/0001.json", "ledger/run.json", "lease.json",
    )]  # fmt: skip
    kinds = {"label": "label", "train": "train"}
    go = {what: {s.key for s in doomed(stats, [], kinds, what)} for what in What}
    assert go[What.CHECKPOINTS] == {"train/checkpoints/step-1/w"}
    assert go[What.LABELS] == {"train/checkpoints/step-1/w", "label/COMMIT", "label/shard"}
    assert go[What.EVERYTHING] == {s.key for s in stats} - {"ledger/0001.json", "ledger/run.json", "lease.json"}


@pytest.mark.parametrize(
    ("state", "driven", "days", "named", "why"),
    [
        ("done", False, 31, False, ""),
        ("done", False, 29, False, "less than 30 d"),
        ("done", False, 29, True, "less than 30 d"),
        ("done", True, 31, True, "drives"),
        ("cap", False, 31, False, "could go on"),
        ("cap", False, 31, True, ""),
        (None, False, 31, False, "could go on"),
        (None, True, 31, True, "drives"),
    ],
)
def test_who_is_spared(kingdom, state, driven, days, named, why):
    if state:
        kingdom.end(state)
    now = kingdom.clock.mark().wall + timedelta(days=days)
    said = kept_why(kingdom.ledger.run(RUN), now=now, older_than=MONTH, named=named, driven=driven)
    assert why in said and bool(said) == bool(why)


def test_a_run_with_a_machine_that_may_still_be_there_is_spared_even_by_name(kingdom):
    order = {"offer_index": 0, "bound": "cap"}
    kingdom.ledger.reserve(RUN, "train", "kd-1", 5, kingdom.clock.mark().wall, later_floor=0, order=order)
    kingdom.ledger.move("kd-1", Event.SENT, kingdom.clock.mark().wall)
    kingdom.end()
    one = kingdom.may(older_than=timedelta(), named=True, what=What.EVERYTHING)
    assert "machine" in one.kept_why and one.keys == ()
    with pytest.raises(UsageError, match="machine"):
        prune(kingdom.ledger, replace(one, keys=("label/shard_0",)), clock=kingdom.clock, what=What.EVERYTHING)
    assert "label/shard_0" in keys(kingdom.bucket)


def test_a_run_that_was_taken_up_meanwhile_keeps_all_it_has(kingdom, bucket):
    kingdom.end()
    one = kingdom.may(older_than=timedelta())
    before = keys(bucket)
    Lease.acquire(bucket, "owner1", kingdom.clock)
    assert "drives" in kingdom.may(older_than=timedelta()).kept_why
    with pytest.raises(NotOwner):
        prune(kingdom.ledger, one, clock=kingdom.clock, what=What.CHECKPOINTS)
    assert before <= keys(bucket)


def test_a_bucket_that_does_not_answer_is_a_reason_to_keep(kingdom, tmp_path):
    kingdom.end()
    os.rename(tmp_path / "bucket", tmp_path / "away")
    (tmp_path / "bucket").write_text("a file")
    (one,) = prunable_runs(
        kingdom.ledger, [RUN], clock=kingdom.clock, older_than=timedelta(), named=False, what=What.CHECKPOINTS
    )
    assert one.kept_why and one.keys == ()


def test_a_month_is_priced_where_the_price_is_known(monkeypatch):
    assert month_micros("file:/x", 10**12) == 0
    assert month_micros("s3://b/x", 2 * 10**9) == 2 * S3_MICROS_PER_GB_MONTH
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://elsewhere")
    assert month_micros("s3://b/x", 10**9) is None


def test_a_listing_of_a_store_in_memory_reads_the_same():
    clock = VirtualClock()
    bucket = FakeBucket(clock)
    bucket.put("train/half", b"1")
    (one,) = look(bucket, ["train"])
    assert one.kept is Kept.PARTIAL


RECIPE = """
name: left
budget: 1 CNY
infra: local
local: {price: 0.10 USD/h}
stages:
  - {name: only, kind: rehearse, steps: 5, seconds_per_step: 0.01, checkpoint_every_steps: 2}
"""


def test_from_the_command_line_what_is_left_is_listed_fetched_and_pruned(tmp_path):
    home = make_home(tmp_path, RECIPE)
    assert home.call("run", "recipe.yaml", "--yes").returncode == 0
    listed = home.json("artifacts")
    assert "result.json" in {a["file"] for a in listed["artifacts"] if a["committed"]}
    states = {a["state"] for a in listed["artifacts"]}
    assert states == {"committed", "record"}
    assert "result.json" in home.call("artifacts").stdout
    done = home.call("artifacts", "last", "--fetch", "here", "--stage", "only")
    assert done.returncode == 0 and "as it was committed" in done.stderr
    assert json.loads((tmp_path / "here/only/result.json").read_text())
    assert home.call("artifacts", "--stage", "nosuch").returncode == 2
    assert home.call("artifacts", "--prune", "--fetch", "here").returncode == 2
    dry = home.call("artifacts", "--prune", "--older-than", "1s")
    assert "--yes" in dry.stdout and home.json("artifacts") == listed
    assert "deleted" in home.call("artifacts", "--prune", "--older-than", "1s", "--yes").stdout
    after = home.json("artifacts")
    assert not [a for a in after["artifacts"] if a["file"].startswith("checkpoints/")]
    assert {a["key"] for a in after["artifacts"]} < {a["key"] for a in listed["artifacts"]}
    assert home.json("report")["state"] == "done"
