"""Asks models on this machine: a process of its own holds them (tasks/answer.py), so that the command line stays light.

It ends with whoever started it. Ctrl-C reaches only the command line, which then asks it to stop writing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from orchestrator.config import Home
from orchestrator.errors import StageFailed, UsageError
from orchestrator.ledger import Run
from orchestrator.plan import StagePlan
from orchestrator.student import CACHE, Found, Role, fetch, find, student_folder
from tasks.bucket import files_sha256, open_bucket
from tasks.contract import EvaluateSettings, LabelSettings, install_hint

NEEDS = ("torch", "transformers", "peft", "safetensors")
ORDER = (Role.BEFORE, Role.STUDENT, Role.TEACHER)  # as they are asked and shown
USUAL_TOKENS = 1024
LAST_LINES = 12
GRACE_S = 5.0


@dataclass(frozen=True)
class Answer:
    """What one model said so far. `text` is a model's: anything may stand in it."""

    role: Role
    text: str = ""
    opens_thinking: bool = False  # its prompt ends inside an opened <think>
    tokens: int | None = None  # None: it is still writing
    seconds: float = 0.0
    first_token_s: float | None = None
    finish: str = ""  # stop | length | stopped (by the person) | too_long (the question)

    @property
    def tokens_per_s(self) -> float | None:
        return self.tokens / self.seconds if self.tokens and self.seconds > 0.0 else None

    @property
    def thinking(self) -> str:
        return _split(self.text, self.opens_thinking)[0]

    @property
    def answer(self) -> str:
        return _split(self.text, self.opens_thinking)[1]


def _split(text: str, opened: bool) -> tuple[str, str]:
    """(thinking, answer): what stands after the last `</think>` is the answer, as an evaluation reads it."""
    thinking, mark, answer = text.rpartition("</think>")
    if mark:
        return thinking.replace("<think>", "").strip("\n"), answer.strip("\n")
    if opened or "<think>" in text:
        return text.replace("<think>", "").strip("\n"), ""
    return "", text


@dataclass(frozen=True)
class Loaded:
    """One model that answers."""

    role: Role
    name: str
    parameters: int
    dtype: str
    smaller: bool  # fewer bits than an evaluation takes, since those do not fit
    opens_thinking: bool


def check_installed() -> None:
    """Raises UsageError."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"asking a model needs {', '.join(missing)}, which is not installed here",
            hint=install_hint("local"),
        )


def usual_tokens(stages: Sequence[StagePlan]) -> int:
    """The longest answer that the run's evaluation allows, else its labels."""
    for kind in (EvaluateSettings, LabelSettings):
        for stage in stages:
            if isinstance(stage.settings, kind):
                return stage.settings.max_new_tokens
    return USUAL_TOKENS


def whole_student(
    run: Run, home: Home, *, stage: str | None = None, moved: Callable[[int], None] = lambda size: None
) -> Path:
    """`student_folder` for whoever serves it: an adapter is merged into its base, and kept below KDCLOUD_HOME/models.

    Raises UsageError, StageFailed, BucketError.
    """
    student = student_folder(run, home, stage=stage, moved=moved)
    if not student.adapter:
        return student.folder
    check_installed()
    bucket = open_bucket(run.bucket)
    found = find(run, bucket, stage=stage, roles=(Role.STUDENT,))
    known = files_sha256(found.files(student.stage))[:12]
    whole = home.root / CACHE / run.id / f"{student.stage}-merged-{known}"
    if not whole.exists():
        home.make()
        making = whole.with_name(f".{whole.name}.{os.getpid()}")
        with Asking(found, fetch(found, bucket, home), merge_into=making) as process:
            process.merge()
        making.replace(whole)
    return whole


class Asking:
    """Models in a process of their own. Use as a context; `load` first, then `ask`."""

    def __init__(
        self, found: Found, root: Path, *, max_new_tokens: int = 1, temperature: float = 0.0,
        merge_into: Path | None = None,
    ) -> None:  # fmt: skip
        """`merge_into`: only for `merge`."""
        models = sorted(found.models, key=lambda one: ORDER.index(one.role))
        self.loaded: dict[Role, Loaded] = {}
        self._names = {one.role: one.name for one in models}
        self._setup: dict[str, Any] = {
            "root": str(root), "models": [one.to_dict() for one in models], "max_new_tokens": max_new_tokens,
            "temperature": temperature, "merge_into": merge_into and str(merge_into),
        }  # fmt: skip

    def __enter__(self) -> Asking:
        self._errors = tempfile.TemporaryFile()
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}  # what is imported here
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "tasks.answer"], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True, encoding="utf-8", start_new_session=True,
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._child.stdin is not None and self._child.stdout is not None
        with suppress(OSError):
            self._child.stdin.close()  # it ends by that, unless it is busy loading
        if kind is not None:
            self._child.kill()
        try:
            self._child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()
        self._errors.close()

    def load(self) -> Iterator[tuple[Role, str]]:
        """(role, what became of it) as they load: "" when it begins, then what it is, or why it is not used.

        Raises UsageError when the student cannot be had here, StageFailed when the process dies.
        """
        self._tell(self._setup)
        for said in self._heard(until="loaded"):
            role = Role(said["role"])
            match said["type"]:
                case "loading":
                    yield role, ""
                case "absent":
                    yield role, f"is not asked: {said['why']}"
                case "ready":
                    one = Loaded(
                        role, self._names[role], said["parameters"], said["dtype"], said["smaller"],
                        said["opens_thinking"],
                    )  # fmt: skip
                    self.loaded[role] = one
                    yield role, loaded_words(one)

    def merge(self) -> None:
        """Writes the only model as a whole one. Raises as `load`."""
        self._tell(self._setup)
        for _ in self._heard(until="merged"):
            pass

    def ask(self, question: str, *, seed: int) -> Iterator[Answer]:
        """What each model has said so far, again and again, in the order of ORDER; a whole answer has its tokens."""
        self._tell({"ask": question, "seed": seed})
        now: dict[Role, Answer] = {}
        for said in self._heard(until="asked"):
            role = Role(said["role"])
            one = now.get(role) or Answer(role, opens_thinking=self.loaded[role].opens_thinking)
            if said["type"] == "text":
                one = replace(one, text=one.text + said["text"])
            else:
                one = replace(one, **{name: said[name] for name in ("text", *_MEASURED)})
            now[role] = one
            yield one

    def stop(self) -> None:
        """Asks for no more of the answer at hand; what there is comes as usual."""
        self._tell({"stop": True})

    def _tell(self, message: Mapping[str, Any]) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(message) + "\n")
            self._child.stdin.flush()
        except OSError as error:
            raise self._died() from error

    def _heard(self, *, until: str) -> Iterator[dict[str, Any]]:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            said = json.loads(line)
            if said["type"] == until:
                return
            if said["type"] == "error":
                raise UsageError(said["message"], hint=said["hint"])
            yield said
        raise self._died()

    def _died(self) -> StageFailed:
        rc = self._child.wait()
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").splitlines()[-LAST_LINES:]
        plain = "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in last)
        how = f"was killed by signal {-rc}" if rc < 0 else f"ended with status {rc}"
        hint = "this machine's memory may have run out: ask one model (--only student), or free some" if rc < 0 else ""
        return StageFailed(f"the process that holds the models {how}\n{plain}".rstrip(), hint=hint)


_MEASURED = ("tokens", "seconds", "first_token_s", "finish")


def loaded_words(one: Loaded) -> str:
    """`stage export, 34,000 parameters, float32`."""
    count = f"{one.parameters / 1e9:.2f} billion" if one.parameters >= 1e9 else f"{one.parameters:,}"
    less = "; more bits do not fit here, so answers may differ from the evaluation's" if one.smaller else ""
    return f"{one.name}, {count} parameters, {one.dtype}{less}"
