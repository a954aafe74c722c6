"""Do several processes of a machine make the labels that one makes? Real ones, started by torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ml_support import run_stage
from safetensors.torch import load_file
from test_train import LABEL, PRETRAIN, TRAIN

import tasks
from tasks import label
from tasks.bucket import Bucket, commit_folder, open_bucket
from tasks.contract import DataSource, EvaluateSettings, Exit, LabelSettings, ModelSource, Task
from tasks.crew import Crew
from tasks.generate import alone
from tasks.labels import shard_name
from tasks.stage import Stopped, committed_checkpoints

ROOT = Path(tasks.__file__).parents[1]
SHARDS = 5
SHARDED = replace(LABEL, samples=22, shard_size=5, batch_size=2)  # the last one is shorter

# Cut answers are made to look finished, and stages that follow a line of their own.
PLANTED = """
import os, sys
from tasks import label
from tasks.stage import main
real = label._judged
label._judged = lambda *args: {**real(*args), "finish_reason": "stop"}
ADDED
main(sys.argv[1:])
"""

# Greedy answers of the folder's model, and a line of what each engine was started with.
SERVER = """
import json
import pytest, torch, vllm_stand_in
def answering(llm):
    from transformers import AutoModelForCausalLM
    env = {name: os.environ[name] for name in os.environ if "RANK" in name or "TORCHELASTIC" in name}
    env["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES")
    with open(FILE, "a") as file:
        file.write(json.dumps([llm.cards, env]) + chr(10))
    model = AutoModelForCausalLM.from_pretrained(llm.model, dtype=torch.float32)
    def answer(ids, params):
        told = model.generate(torch.tensor([ids]), max_new_tokens=params.max_tokens, do_sample=False)
        return told[0, len(ids):].tolist()
    return answer
vllm_stand_in.install(pytest.MonkeyPatch(), answering)
label.wants_vllm = lambda engine, device: True
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    run_stage(root, "pretrain", "pretrain", PRETRAIN)
    real = label._judged
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label, "_judged", lambda *args: {**real(*args), "finish_reason": "stop"})
        run_stage(root, "label", "label", LABEL)
    run_stage(root, "train", "train", TRAIN)
    return root


def bucket_of(inputs: Path, tmp_path: Path) -> Bucket:
    bucket = open_bucket(f"file:{tmp_path / 'bucket'}")
    for stage in ("pretrain", "train"):
        commit_folder(bucket, inputs / stage / "done", stage, fence=1)
    return bucket


def labelled(
    processes: int, bucket: Bucket, stage: str, settings: LabelSettings | EvaluateSettings, work: Path,
    added: str = "", attempt: int = 1,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    kind = "label" if isinstance(settings, LabelSettings) else "evaluate"
    task = Task("run", stage, kind, attempt=attempt, fence=1, bucket=bucket.url, settings=settings, gate=True)
    bucket.put(f"{stage}/task.json", task.to_json().encode())
    work.mkdir(parents=True)
    (work / "task.json").write_text(task.to_json())
    (work / "planted.py").write_text(PLANTED.replace("ADDED", added))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] * (processes > 1)
    return subprocess.run(
        [sys.executable, *torchrun, str(work / "planted.py"), "--task", str(work / "task.json"), "--work", str(work)],
        env={"PATH": "/usr/bin:/bin", "HOME": str(work), "PYTHONPATH": f"{ROOT}:{ROOT}/tests", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


def out(done: subprocess.CompletedProcess[str], work: Path) -> Path:
    assert done.returncode == Exit.DONE, done.stdout + done.stderr
    return work / "out"


def files(folder: Path) -> dict[str, bytes]:
    ours = [path for kind in ("labels", "generated") for path in folder.glob(f"{kind}-*")]
    found = {path.name: path.read_bytes() for path in ours}
    assert len(found) == 2 * SHARDS
    return found


def result(folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((folder / "result.json").read_text())
    assert told.pop("tokens_per_s") > 0
    return told


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_labels_do_not_depend_on_how_many_processes_make_them(inputs: Path, tmp_path: Path, processes: int) -> None:
    bucket = bucket_of(inputs, tmp_path)
    one = out(labelled(1, bucket, "one", SHARDED, tmp_path / "one"), tmp_path / "one")
    many = out(labelled(processes, bucket, "many", SHARDED, tmp_path / "many"), tmp_path / "many")
    assert files(one) == files(many) and result(one) == result(many)
    made = list((tmp_path / "many").glob("crew-*/generated-*"))
    assert len(made) == SHARDS  # and each process made its own
    for rank in range(1, processes):
        own = (tmp_path / "many" / f"rank-{rank}" / "work" / "out").glob("generated-*")
        assert len(list(own)) == len(range(rank, SHARDS, processes))


# Each process has a batch in a checkpoint; then the first one is stopped, and the other one does not get further.
STOPPING = """
import signal, time
shared = label.Crew.done
def done(self, phase, mine):
    if phase == "generate" and 0.5 < mine < 1:
        wanted = "stop" if not self.leads else "partial-generated-00001.jsonl"
        while not (self.folder / wanted).exists():
            time.sleep(0.05)
        if self.leads:
            os.kill(os.getpid(), signal.SIGTERM)
    return shared(self, phase, mine)
label.Crew.done = done
"""


@pytest.mark.slow
def test_what_every_process_had_when_it_was_stopped_is_gone_on_with(inputs: Path, tmp_path: Path) -> None:
    bucket = bucket_of(inputs, tmp_path)
    whole = out(labelled(1, bucket, "whole", SHARDED, tmp_path / "whole"), tmp_path / "whole")
    done = labelled(2, bucket, "label", SHARDED, tmp_path / "first", STOPPING)
    assert done.returncode != Exit.DONE and "stopped as asked" in done.stdout, done.stdout + done.stderr
    (step, *_) = reversed(committed_checkpoints(bucket, "label"))
    saved = {path.name: path.read_text().splitlines() for path in
             (tmp_path / "first" / "checkpoints" / f"step-{step}").glob("generated-*")}  # fmt: skip
    assert {"generated-00000.jsonl", "generated-00001.jsonl"} <= saved.keys()
    rest = out(labelled(2, bucket, "label", SHARDED, tmp_path / "rest", attempt=2), tmp_path / "rest")
    lines = (rest / "generated-00001.jsonl").read_text().splitlines()
    text = {json.loads(line)["key"]: json.loads(line)["text"] for line in lines}
    assert all(text[json.loads(line)["key"]] == json.loads(line)["text"] for line in saved["generated-00001.jsonl"])
    assert files(rest).keys() == files(whole).keys()
    assert result(rest)["generated"] == result(whole)["generated"] == 22


@pytest.mark.slow
def test_a_teacher_on_two_gpus_together_labels_as_on_one(inputs: Path, tmp_path: Path) -> None:
    """One engine with both; then each process holds half of every weight and scores every other batch."""
    bucket, seen = bucket_of(inputs, tmp_path), tmp_path / "seen.jsonl"
    added = f"FILE = {str(seen)!r}" + SERVER + "label.SCORE_TOKENS = 40\n"
    settings = replace(SHARDED, engine="vllm", temperature=0.0)
    one = out(labelled(1, bucket, "one", settings, tmp_path / "one", added), tmp_path / "one")
    both = replace(settings, tensor_parallel=2)
    two = out(labelled(2, bucket, "two", both, tmp_path / "two", added), tmp_path / "two")
    for index in range(SHARDS):
        a, b = load_file(one / shard_name(index)), load_file(two / shard_name(index))
        assert a.keys() == b.keys()
        for name in a:
            assert (a[name].double() - b[name].double()).abs().max() < 1e-3, name
    alone_said, *together = [json.loads(line) for line in seen.read_text().splitlines()]
    assert alone_said[0] == 1 and together == [[2, {"CUDA_VISIBLE_DEVICES": "0,1"}]]


EVALUATE = EvaluateSettings(
    "train", ModelSource(stage="pretrain"), DataSource("builtin:addition/held_out"), "math", max_new_tokens=5,
    batch_size=4, limit=18, seeds=2,
)  # fmt: skip
TIMES = ("tokens_per_s", "first_token_s", "peak_gib")


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "added"), [("transformers", ""), ("vllm", "tasks.evaluate")])
def test_an_evaluation_does_not_depend_on_how_many_processes_write(
    inputs: Path, tmp_path: Path, engine: str, added: str
) -> None:
    """Sampled answers of transformers draw batch by batch; an engine's prompt by prompt (here it is greedy)."""
    bucket, seen = bucket_of(inputs, tmp_path), tmp_path / "seen.jsonl"
    server = f"FILE = {str(seen)!r}" + SERVER + "from tasks import evaluate\nevaluate.wants_vllm = label.wants_vllm\n"
    told = []
    for processes in (1, 3):
        work = tmp_path / str(processes)
        done = labelled(processes, bucket, str(processes), replace(EVALUATE, engine=engine), work, server * bool(added))
        found = json.loads((out(done, work) / "result.json").read_text())
        for role in found["quality"].values():
            assert role is None or all(role.pop(name) > 0 for name in TIMES)
        told.append(found)
    assert told[0] == told[1] and told[0]["engine"] == engine
    assert added == "" or len(seen.read_text().splitlines()) == 3 + 3 * 3  # an engine a model and process


@pytest.mark.slow
def test_where_vllm_is_not_each_gpu_has_the_whole_teacher(inputs: Path, tmp_path: Path) -> None:
    bucket = bucket_of(inputs, tmp_path)
    one = out(labelled(1, bucket, "one", SHARDED, tmp_path / "one"), tmp_path / "one")
    done = labelled(2, bucket, "two", replace(SHARDED, tensor_parallel=2), tmp_path / "two")
    assert files(out(done, tmp_path / "two")) == files(one)
    assert "transformers write, with the whole teacher on each of the 2 GPUs" in done.stdout
    other = labelled(1, bucket, "other", replace(SHARDED, tensor_parallel=4), tmp_path / "other")
    assert other.returncode == Exit.BAD_INPUT and "held by 4 GPUs together, and here are 1" in other.stdout


@pytest.mark.parametrize(
    ("size", "cards", "writes", "scores"),
    [
        (1, 1, [[0, 1, 2, 3, 4]], [[0, 1, 2, 3, 4]]),
        (2, 1, [[0, 2, 4], [1, 3]], [[0, 2, 4], [1, 3]]),
        (4, 2, [[0, 2, 4], [], [1, 3], []], [[0, 4], [1], [2], [3]]),  # two engines with two GPUs each
        (4, 4, [[0, 1, 2, 3, 4], [], [], []], [[0, 4], [1], [2], [3]]),
    ],
)
def test_every_part_is_made_once(
    tmp_path: Path, size: int, cards: int, writes: list[list[int]], scores: list[list[int]]
) -> None:
    crews = [Crew(tmp_path / "crew", rank, size, cards) for rank in range(size)]
    assert [[part for part in range(5) if crew.writes(part)] for crew in crews] == writes
    assert [[part for part in range(5) if crew.scores(part)] for crew in crews] == scores


def test_what_all_have_done_is_told_by_the_leader(tmp_path: Path) -> None:
    leader, other = (Crew(tmp_path / "crew", rank, 2) for rank in (0, 1))
    assert other.done("generate", 0.5) == 0.5
    assert leader.done("generate", 1.25) == 1.75
    other.done("generate", 0.75)  # too soon after the first: files are not written with every step
    leader._told_at = 0.0
    assert leader.done("generate", 1.25) == 1.75
    other._told_at = leader._told_at = 0.0
    other.done("generate", 0.75)
    assert leader.done("generate", 1.25) == 2.0
    (tmp_path / "crew" / "generate-1").write_text("")  # half written: what was known stays
    leader._told_at = 0.0
    assert leader.done("generate", 1.25) == 2.0


def test_who_is_told_to_stop_does(tmp_path: Path) -> None:
    leader, other = (Crew(tmp_path / "crew", rank, 2) for rank in (0, 1))
    leader.stop()
    leader.stop_if_told()
    with pytest.raises(Stopped):
        other.heard("generated", lambda: None)
    assert not leader.left()
    other.say("left-1", True)
    assert leader.left()


@pytest.mark.parametrize(
    ("visible", "rank", "cards", "sees"),
    [(None, 1, 1, "1"), ("4,5,6,7", 2, 2, "6,7"), ("GPU-a,GPU-b", 0, 1, "GPU-a"), (None, 0, 2, "0,1")],
)
def test_an_engine_sees_its_own_gpus_and_nothing_of_the_launcher(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, rank: int, cards: int, sees: str
) -> None:
    launched = {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with alone(1):
        assert "CUDA_VISIBLE_DEVICES" not in os.environ  # nothing was launched: all there is
    for name, value in {**launched, **({"CUDA_VISIBLE_DEVICES": visible} if visible else {})}.items():
        monkeypatch.setenv(name, value)
    with alone(cards):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == sees
        assert not launched.keys() & os.environ.keys() and "PATH" in os.environ
    assert launched.items() <= os.environ.items() and os.environ.get("CUDA_VISIBLE_DEVICES") == visible
