"""What does a first recipe say? A template, or the answers to five questions over one. Reads, writes nothing."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from orchestrator import money
from orchestrator.catalog import MODELS, ModelShape, UnknownModel, shape_of
from orchestrator.errors import UsageError
from orchestrator.shipped import builtin_recipes

TINY, API, SAMPLE, LOCAL = "tiny", "api", "sample", "local"  # answers that name no model, file or cloud
TEACHER = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
STUDENT = "Qwen/Qwen2.5-1.5B"
STUDENT_PARAMS = 1.5e9  # what a student is near, of another family
SAME_VOCABULARY = 1024  # rows: tables of one tokenizer are padded differently, those of two differ by thousands
TABLE_INFRA = ("runpod", "aws", "lambda", "vast")
OWN_PRICE = "0.10 USD/h"  # electricity and wear of a small computer
HELD_OUT_SHARE, HELD_OUT_MOST, HELD_OUT_LEAST = 10, 500, 2  # every tenth answered prompt, at most and at least so many
INPUT, ANSWER = ("input", "prompt", "question"), ("answer", "target")  # as the stages read them


# -- prompts


@dataclass(frozen=True)
class Prompts:
    """A file of prompts: its lines, and those of them that name a right answer."""

    path: Path
    lines: tuple[str, ...] = field(repr=False)
    answered: tuple[int, ...] = field(repr=False)  # places in `lines`
    numeric: bool  # nine of ten right answers hold a digit

    def __str__(self) -> str:
        with_answer = "all" if len(self.answered) == len(self.lines) else str(len(self.answered) or "none")
        return f"{len(self.lines):,} prompts, {with_answer} with a right answer"


def read_prompts(path: Path) -> Prompts:
    """The file's rows. Raises UsageError naming the line that no stage could use."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint="name a file of yours, or: sample") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text", hint=_ROW) from error
    lines, answers, seen = list[str](), dict[int, str](), dict[str, int]()
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        key, answer = _row(line, f"{path}, line {number}")
        if key in seen:
            raise UsageError(f"{path}, line {number}: the same prompt as line {seen[key]}", hint="remove one of them")
        seen[key] = number
        if answer is not None:
            answers[len(lines)] = str(answer)
        lines.append(line.rstrip("\r"))
    if not lines:
        raise UsageError(f"{path} holds no rows", hint=_ROW)
    digits = sum(bool(re.search(r"\d", answer)) for answer in answers.values())
    return Prompts(path, tuple(lines), tuple(answers), numeric=digits * 10 >= len(answers) * 9)


_ROW = 'one JSON object a line: {"input": "...", "answer": "..."}'


def _row(line: str, where: str) -> tuple[str, Any]:
    """(what tells a prompt from the others, its right answer or None)."""
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: not JSON ({error.msg})", hint=_ROW) from error
    if not isinstance(raw, dict):
        raise UsageError(f"{where}: a {type(raw).__name__}, not an object", hint=_ROW)
    text, answer = (next((raw[name] for name in names if raw.get(name) is not None), None) for names in (INPUT, ANSWER))
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"{where}: no text under {', '.join(INPUT)}", hint=_ROW)
    if isinstance(answer, dict | list):
        raise UsageError(f"{where}: the answer is neither text nor a number", hint='write {"answer": "95"}')
    key = raw.get("key")
    if key is not None and not isinstance(key, str):
        raise UsageError(f"{where}: key is not text", hint="leave key out, or write it in quotes")
    return key or text, answer


def parted(prompts: Prompts) -> tuple[str, str] | None:
    """(text of the file to learn from, text of the held-out one); None where too few have a right answer."""
    step = max(HELD_OUT_SHARE, -(-len(prompts.answered) // HELD_OUT_MOST))
    held = set(prompts.answered[step - 1 :: step])
    if len(held) < HELD_OUT_LEAST:
        return None
    rest = [line for place, line in enumerate(prompts.lines) if place not in held]
    return "\n".join(rest) + "\n", "\n".join(prompts.lines[place] for place in sorted(held)) + "\n"


# -- templates


@dataclass(frozen=True)
class Draft:
    """A recipe to be written: its keys, what it is about, and files that belong beside it."""

    raw: Mapping[str, Any]
    about: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)  # path relative to the recipe -> text


def templates() -> dict[str, str]:
    """What each template is, in a sentence: the first line of the recipe of that name."""
    found = {}
    for name, path in builtin_recipes().items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        found[name] = first.removeprefix("#").strip().rstrip(":.,") + "."
    return found


def from_template(name: str) -> Draft:
    """A built-in recipe with the files it names. Raises UsageError."""
    known = builtin_recipes()
    if name not in known:
        close = get_close_matches(name, known, n=1, cutoff=0.4)
        nearest = f"did you mean {close[0]}? " if close else ""
        raise UsageError(f"there is no template {name!r}", hint=f"{nearest}`kdcloud init --template list` shows them")
    raw = yaml.safe_load(known[name].read_text(encoding="utf-8"))
    folder = known[name].parent
    named = sorted({str(raw.get("data", {}).get(key, "builtin:")) for key in ("prompts", "held_out")})
    files = {file: (folder / file).read_text(encoding="utf-8") for file in named if not file.startswith("builtin:")}
    return Draft(raw, (templates()[name],), files)


# -- answers


@dataclass(frozen=True)
class Answers:
    """What a person wants. `prompts` None: the template's own."""

    teacher: str = TEACHER
    student: str = STUDENT
    prompts: Prompts | None = None
    infra: tuple[str, ...] = TABLE_INFRA
    budget: str = "50 CNY"


def composed(answers: Answers) -> Draft:
    """The recipe that does what was answered; the answers were checked as they were given."""
    base = {TINY: "quickstart", API: "api-teacher"}.get(answers.teacher, "r1-qwen-1.5b")
    draft = from_template(base)
    raw, about, files = copy.deepcopy(dict(draft.raw)), draft.about, dict(draft.files)
    raw["budget"] = answers.budget
    raw["infra"] = answers.infra[0] if len(answers.infra) == 1 else list(answers.infra)
    if LOCAL in answers.infra:
        raw.setdefault("local", {"price": OWN_PRICE})
        raw.pop("gpus", None)
    if answers.teacher != TINY:
        label, train = raw["stages"][:2]
        label["teacher"] = _named(answers.student if answers.teacher == API else answers.teacher)
        train["student"] = _named(answers.student)
        raw["name"] = run_name(answers.student)
        about = (_about(answers),)
    if answers.prompts is not None and answers.teacher != TINY:
        files = _with_prompts(raw, answers.prompts)
    return Draft(raw, about, files)


def _about(answers: Answers) -> str:
    teacher = "a teacher behind an API" if answers.teacher == API else answers.teacher
    own = "the algebra problems beside it" if answers.prompts is None else "your prompts"
    return " ".join(f"{answers.student} learns from {teacher} on {own}.".split())


def _named(model: str) -> str:
    """A folder by its whole path: the recipe may lie elsewhere. A known model as its hub spells it."""
    if (Path(model).expanduser() / "config.json").is_file():
        return str(Path(model).expanduser().absolute())
    return shape_of(model).name if model.lower() in {name.lower() for name in MODELS} else model


def run_name(student: str) -> str:
    """`qwen2.5-1.5b` of Qwen/Qwen2.5-1.5B, in the characters that a recipe's name may hold."""
    word = re.sub(r"[^a-z0-9._-]+", "-", Path(student).name.lower()).strip("._-")
    return word[:60] or "student"


def _with_prompts(raw: dict[str, Any], prompts: Prompts) -> dict[str, str]:
    """Puts the user's prompts into `raw`; returns the files to write beside the recipe."""
    label = raw["stages"][0]
    label["samples"] = min(int(label["samples"]), len(prompts.lines))
    both = parted(prompts)
    if both is None:  # nothing to check answers against, and nothing to evaluate on
        raw["data"] = {"prompts": str(prompts.path.absolute()), "verify": "none"}
        raw["stages"] = [stage for stage in raw["stages"] if stage["kind"] != "evaluate"]
        return {}
    train, held_out = f"data/{prompts.path.stem}-train.jsonl", f"data/{prompts.path.stem}-held-out.jsonl"
    verify = "math" if prompts.numeric else "exact"
    raw["data"] = {"prompts": train, "held_out": held_out, "verify": verify}
    label["samples"] = min(int(label["samples"]), both[0].count("\n"))
    return {train: both[0], held_out: both[1]}


# -- is an answer good? Each returns what it means, or raises UsageError


def check_model(text: str, others: Iterable[str] = ()) -> str:
    """A model whose shape is known, or one of `others`."""
    word = text.strip()
    if word.lower() in others:
        return word.lower()
    try:
        shape_of(word)
    except UnknownModel as error:
        raise UsageError(error.message, hint=error.hint) from error
    return word


def check_pair(teacher: str, student: str) -> None:
    """Raises UsageError when the student has another tokenizer: the labels hold ids of the teacher's."""
    if teacher == API:
        return
    one, two = shape_of(teacher), shape_of(student)
    if not _share(one, two):
        raise UsageError(
            f"{two.name} has another tokenizer than {one.name} ({two.vocab:,} and {one.vocab:,} tokens): it cannot "
            "learn from those labels",
            hint=f"take a student of the same family, like {student_for(teacher)}, or `api` as the teacher",
        )


def _share(one: ModelShape, two: ModelShape) -> bool:
    return abs(one.vocab - two.vocab) <= SAME_VOCABULARY


def student_for(teacher: str) -> str:
    """A model of the catalogue with the teacher's tokenizer, smaller than it and near 1.5B."""
    if teacher in (TINY, API):
        return STUDENT
    shape = shape_of(teacher)
    fitting = [one for one in MODELS.values() if _share(shape, one) and one.params < shape.params]
    if MODELS[STUDENT] in fitting:
        return STUDENT
    return min(fitting, key=lambda one: abs(one.params - STUDENT_PARAMS)).name if fitting else shape.name


def check_infra(text: str, known: Iterable[str]) -> tuple[str, ...]:
    """Names of infras, several with commas: each one of `known`, or a part of one (slurm/lab, aws/us-east-1)."""
    names = list(known)
    words = tuple(word.strip().lower().rstrip("/") for word in text.split(",") if word.strip())
    for word in words:
        if word.partition("/")[0] not in names or not re.fullmatch(r"[a-z0-9][a-z0-9._-]*(/[a-z0-9._-]+)*", word):
            close = get_close_matches(word, names, n=1, cutoff=0.5)
            nearest = f"did you mean {close[0]}? " if close else ""
            raise UsageError(f"{word!r} is no infra that has prices", hint=f"{nearest}known: {', '.join(names)}")
    if not words:
        raise UsageError("name at least one infra", hint=f"known: {', '.join(names)}")
    return tuple(dict.fromkeys(words))


def check_budget(text: str) -> str:
    """An amount above 0, as a recipe writes it."""
    try:
        return str(money.parse_budget(text))
    except ValueError as error:
        raise UsageError(str(error), hint="for example 50 CNY") from error


def check_prompts(text: str) -> Prompts | None:
    """A file of prompts that a stage can use, None for the sample."""
    return None if text.strip().lower() == SAMPLE else read_prompts(Path(text.strip()).expanduser())


# -- the five questions


@dataclass(frozen=True)
class Question:
    """One question: the option that answers it beforehand, its words, and what enter takes."""

    option: str
    words: str
    default: str
    note: str = ""


Ask = Callable[[Question, Callable[[str], Any]], Any]  # asks until the check takes the answer; returns what it means


def interview(ask: Ask, found: tuple[str, ...], known: Iterable[str]) -> Answers:
    """Asks at most five questions. `found`: infras that can be had now; `known`: all that have prices."""
    teacher = ask(
        Question(
            "teacher",
            "Teacher",
            TEACHER,
            f"Who writes the answers? owner/name, a folder, {API} (behind an API), or {TINY} (made here, on a CPU)",
        ),
        lambda text: check_model(text, (TINY, API)),
    )
    student, prompts = STUDENT, None
    if teacher != TINY:
        student = ask(
            Question("student", "Student", student_for(teacher), "Who learns? A smaller model with the same tokenizer"),
            lambda text: _student(teacher, text),
        )
        prompts = ask(
            Question(
                "prompts",
                "Prompts",
                SAMPLE,
                f"On what? A file of yours with {_ROW}; or {SAMPLE}: algebra problems made for trying",
            ),
            check_prompts,
        )
    names = tuple(dict.fromkeys((LOCAL, *found, *known)))
    cheap = teacher == TINY
    usual = (LOCAL,) if cheap else tuple(one for one in found if one != LOCAL) or TABLE_INFRA
    nothing = "" if found else ". None is enabled from here yet: `kdcloud doctor` says how"
    infra = ask(
        Question("infra", "Where to run", ", ".join(usual), f"Where? Any of {', '.join(names)}{nothing}"),
        lambda text: check_infra(text, names),
    )
    budget = ask(
        Question("budget", "Budget", "1 CNY" if cheap else "50 CNY", "What may it cost at most, in CNY or USD?"),
        check_budget,
    )
    return Answers(teacher, student, prompts, infra, budget)


def _student(teacher: str, text: str) -> str:
    student = check_model(text)
    check_pair(teacher, student)
    return student
