"""What do models on this machine say to a question? They stay loaded; questions and answers are lines of JSON.

The first line on stdin is a Setup as JSON, every further one a question `{"ask": "...", "seed": 0}`, or
`{"stop": true}` while an answer is being written. On stdout come `loading` and `ready` or `absent` for each model, then
`loaded`; for a question `text` as it is written and `answer` by each model in turn, then `asked`; or one `error`.
Answers are made by what writes them in an evaluation, so that they are the same ones.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

import psutil
import torch
from torch import Tensor

from tasks import hub, models
from tasks.contract import ModelSource, TaskError, build
from tasks.generate import TransformersGenerator
from tasks.labels import TOKENIZER_FOLDER
from tasks.stage import Context

SMALL = 5_000_000  # parameters: below, threads wait for each other longer than they compute
THREADS = torch.get_num_threads()  # as torch would have it
STUDENT = "student"  # the role without which nothing is asked
FIRST = (STUDENT, "teacher", "before")  # where not all of them fit
WORK_BYTES = 256 << 20  # of memory beside weights and cache: activations, logits, tokenizer
WEIGHTS_SLACK = 1.1  # fragments, and tensors of another precision while they are read


@dataclass(frozen=True)
class Asked:
    """One model to load; fields as orchestrator/student.py has them."""

    role: str
    name: str
    stage: str | None = None
    part: str = models.MODEL_FOLDER
    source: ModelSource | None = None
    adapter: bool = False
    tokenizer: str | None = None


@dataclass(frozen=True)
class Setup:
    root: Path  # holds `<stage>/<part>`
    models: tuple[Asked, ...]
    max_new_tokens: int
    temperature: float
    merge_into: Path | None = None  # only: the student as a whole model, for whoever wants to serve it

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> Setup:
        asked = []
        for one in raw["models"]:
            source = one.pop("source")
            asked.append(Asked(**one, source=None if source is None else build(ModelSource, source)))
        into = raw.get("merge_into")
        return Setup(
            Path(raw["root"]),
            tuple(asked),
            raw["max_new_tokens"],
            raw["temperature"],
            None if into is None else Path(into),
        )


class Interrupted(Exception):
    """The answer is not wanted any more."""


class Fetched:
    """The context of a stage whose inputs lie in `root` already; models.load asks for no more than this."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def input(self, stage: str) -> Path:
        return self._root / stage

    def progress(self, *_: Any, **__: Any) -> None:
        """Nobody watches."""


# -- does it fit? ------------------------------------------------------------------------------------------------------


def weights_in(folder: Path) -> int:
    """Parameters in the safetensors of a folder, from their heads."""
    count = 0
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            head = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        for name, tensor in head.items():
            if name != "__metadata__":
                count += torch.Size(tensor["shape"]).numel()
    return count


def cached_values(config: dict[str, Any], tokens: int) -> int:
    """Numbers in the key-value cache of one answer of so many tokens, its prompt included."""
    config = config.get("text_config", config)
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    return int(2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * width * tokens)


def need_bytes(parameters: int, cached: int, dtype: torch.dtype) -> int:
    """Memory that one loaded model and the answer it writes take."""
    return int((WEIGHTS_SLACK * parameters + cached) * dtype.itemsize) + WORK_BYTES


def fitting_dtype(parameters: int, cached: int, wanted: torch.dtype, free_bytes: int) -> torch.dtype | None:
    """`wanted` where it fits, else bf16 where that does, else None: a model in swap answers nobody. Pure."""
    for dtype in (wanted, torch.bfloat16):
        if need_bytes(parameters, cached, dtype) <= free_bytes:
            return dtype
    return None


def free_bytes(device: torch.device) -> int:
    """Memory for one more model: it is read into the machine's own before a GPU gets it."""
    free = psutil.virtual_memory().available
    return min(free, torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free


# -- loading -----------------------------------------------------------------------------------------------------------


def at_hand(source: ModelSource) -> str | None:
    """The folder of a model on this machine: one's own, or in the cache of the hub; None where it is not."""
    assert source.path is not None
    if Path(source.path).expanduser().is_dir():
        return str(Path(source.path).expanduser())
    found = hub.fetched(source)
    return None if found is None else str(found)


@dataclass
class _Ready:
    asked: Asked
    loaded: models.Loaded
    dtype: torch.dtype
    opens_thinking: bool

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.loaded.model.parameters())

    def generator(self, tokens: int, **how: Any) -> TransformersGenerator:
        """What writes an evaluation's answers; alone on its thread where the model is a small one."""
        torch.set_num_threads(1 if self.parameters < SMALL else THREADS)
        return TransformersGenerator(self.loaded.model, self.loaded.tokenizer, tokens, **how)


def _load(asked: Asked, setup: Setup, device: torch.device) -> _Ready | str:
    """The model on its device, or why it is not used. Raises TaskError."""
    source = asked.source
    if source is not None:
        place = at_hand(source)
        if place is None:
            return "it is not on this machine, and too much to fetch for a question"
        source = ModelSource(path=place, trust_remote_code=source.trust_remote_code)
    weights = _weights(asked, source, setup.root)
    config = json.loads((weights / "config.json").read_text())
    parameters, cached = weights_in(weights), cached_values(config, setup.max_new_tokens + 512)
    wanted, free = models.working_dtype(device), free_bytes(device)
    dtype = fitting_dtype(parameters, cached, wanted, free)
    if dtype is None:
        least = need_bytes(parameters, cached, torch.bfloat16)
        return f"it needs {least / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on this machine"
    ctx = cast(Context, Fetched(setup.root))
    if source is not None:
        loaded = models.load(ctx, source, dtype=dtype)
    else:
        assert asked.stage is not None
        loaded = models.load_stage(setup.root / asked.stage, ctx, dtype=dtype, name=asked.part)
    if asked.tokenizer is not None:
        place = str(setup.root / asked.tokenizer / TOKENIZER_FOLDER)
        loaded.tokenizer = models.load_tokenizer(ModelSource(path=place))
    loaded.model.to(device).eval()
    return _Ready(asked, loaded, dtype, models.opens_thinking(loaded.tokenizer))


def _weights(asked: Asked, source: ModelSource | None, root: Path) -> Path:
    """The folder with all the weights that an answer needs: of an adapter, its base's. Raises TaskError."""
    if source is not None:
        assert source.path is not None
        return Path(source.path)
    assert asked.stage is not None
    folder = root / asked.stage / asked.part
    while (folder / models.STUDENT_FILE).exists():
        base = build(ModelSource, json.loads((folder / models.STUDENT_FILE).read_text())["base"])
        if base.trust_remote_code:  # the file came from a machine: it may not choose what runs here
            raise TaskError(
                f"the student is an adapter on {base.path}, whose own code would run on this machine",
                hint="ask the model of an export stage, or load it yourself if you trust that code",
            )
        if base.stage is None:
            folder = Path(at_hand(base) or hub.local_path(base))
            if not folder.is_dir():
                raise TaskError(
                    f"the student is an adapter on {base.path}, which is not on this machine",
                    hint="unset HF_HUB_OFFLINE, so that it can be fetched",
                )
            break
        folder = root / base.stage / models.MODEL_FOLDER
    return folder


# -- answering ---------------------------------------------------------------------------------------------------------


class Answers:
    """What one model writes to one question, told word by word."""

    def __init__(self, ready: _Ready, setup: Setup, tell: Any, unwanted: threading.Event) -> None:
        self._ready, self._setup, self._tell, self._unwanted = ready, setup, tell, unwanted

    def to(self, question: str, seed: int) -> None:
        role, tokenizer, model = self._ready.asked.role, self._ready.loaded.tokenizer, self._ready.loaded.model
        prompt = models.prompt_ids(tokenizer, question)
        longest = getattr(model.config, "max_position_embeddings", None) or self._setup.max_new_tokens + len(prompt)
        room = min(self._setup.max_new_tokens, longest - len(prompt))
        if room < 1:
            self._say(role, [], 0.0, None, "too_long")
            return
        started, first, ids = time.monotonic(), None, list[int]()
        words = Words(tokenizer, lambda text: self._tell({"type": "text", "role": role, "text": text}))

        def seen(written: Tensor) -> None:
            nonlocal first, ids
            first = first or time.monotonic() - started
            fresh = written[0, len(ids) :]
            ids = written[0].tolist()
            words.put(fresh.tolist())
            if self._unwanted.is_set():
                raise Interrupted

        generator = self._ready.generator(room, temperature=self._setup.temperature, seen=seen)
        try:
            (written,) = generator.generate([prompt], seed=seed)
            ids, finish = written.ids, written.finish_reason
        except Interrupted:
            finish = "stopped"
        self._say(role, ids, time.monotonic() - started, first, finish)

    def _say(self, role: str, ids: list[int], seconds: float, first: float | None, finish: str) -> None:
        text = self._ready.loaded.tokenizer.decode(ids, skip_special_tokens=True)
        self._tell({
            "type": "answer", "role": role, "text": text, "tokens": len(ids), "seconds": seconds,
            "first_token_s": first, "finish": finish,
        })  # fmt: skip


class Words:
    """Text as its tokens come, handed on in whole characters."""

    def __init__(self, tokenizer: Any, tell: Callable[[str], None]) -> None:
        self._tokenizer, self._tell = tokenizer, tell
        self._ids: list[int] = []  # since the last end of a line
        self._told = 0  # characters of theirs

    def put(self, ids: Sequence[int]) -> None:
        self._ids += ids
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if text.endswith("\ufffd"):  # a character whose other bytes are still to come, most often
            return
        if len(text) > self._told:
            self._tell(text[self._told :])
        self._told = len(text)
        if text.endswith("\n"):  # so that a long answer is not decoded again for each of its tokens
            self._ids, self._told = [], 0


# -- the process -------------------------------------------------------------------------------------------------------


def main(lines: TextIO, out: TextIO) -> int:
    """Loads, then answers until stdin ends. 2 when something can be mended."""

    def tell(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    try:
        setup = Setup.from_dict(json.loads(lines.readline()))
        _serve(setup, lines, tell)
    except TaskError as error:
        tell({"type": "error", "message": error.message, "hint": error.hint})
        return 2
    return 0


def _serve(setup: Setup, lines: TextIO, tell: Any) -> None:
    models.quiet()
    unwanted = threading.Event()
    questions: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lines, questions, unwanted), daemon=True).start()
    device = models.pick_device()
    ready = list(_all(setup, device, tell))
    if setup.merge_into is not None:
        models.save(setup.merge_into, ready[0].loaded.model, ready[0].loaded.tokenizer)
        tell({"type": "merged"})
        return
    ready.sort(key=lambda one: setup.models.index(one.asked))
    tell({"type": "loaded", "device": device.type})
    while True:
        question = questions.get()
        unwanted.clear()
        for one in ready:
            if not unwanted.is_set():
                Answers(one, setup, tell, unwanted).to(question["ask"], question.get("seed", 0))
        tell({"type": "asked"})


def _listen(lines: TextIO, questions: queue.SimpleQueue[dict[str, Any]], unwanted: threading.Event) -> None:
    for line in lines:
        said = json.loads(line)
        if said.get("stop"):
            unwanted.set()
        else:
            questions.put(said)
    os._exit(0)  # whoever asked is gone, and waits for no answer


def _all(setup: Setup, device: torch.device, tell: Any) -> Iterator[_Ready]:
    """Those that are here and fit, in order of FIRST."""
    for asked in sorted(setup.models, key=lambda one: FIRST.index(one.role)):
        tell({"type": "loading", "role": asked.role})
        found = _load(asked, setup, device)
        if isinstance(found, str):
            if asked.role == STUDENT or len(setup.models) == 1:
                raise TaskError(
                    f"the {asked.role} cannot answer here: {found}",
                    hint="close other programs, or take it as GGUF in few bits with Ollama or llama.cpp "
                    "(formats: [hf, gguf] in the export stage)",
                )
            tell({"type": "absent", "role": asked.role, "why": found})
            continue
        found.generator(1).generate(
            [models.prompt_ids(found.loaded.tokenizer, "1")], seed=0
        )  # the first call is a slow one
        tell({
            "type": "ready", "role": asked.role, "dtype": str(found.dtype).removeprefix("torch."),
            "smaller": found.dtype != models.working_dtype(device), "opens_thinking": found.opens_thinking,
            "parameters": found.parameters,
        })  # fmt: skip
        yield found


if __name__ == "__main__":
    # Libraries print what they like: stdout is for messages alone.
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.exit(main(sys.stdin, messages))
