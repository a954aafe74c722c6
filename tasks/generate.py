"""Who writes the answers on this machine: vLLM where it is installed and there is a GPU, else transformers."""

from __future__ import annotations

import gc
import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from tasks import hub, verify
from tasks.contract import VLLM_SHARE, ModelSource, TaskError, Writing
from tasks.peers import LAUNCHED_ENV

ENGINES = ("auto", "vllm", "transformers")
CACHE_SHARE = 0.6  # of free memory that the key-value cache of a batch may take; the rest is for what a step holds

STREAM_TOKENS = 32  # of an answer between two words of it: a word a token would cost vLLM a tenth of its speed
TELL_S = 0.5  # between two looks at all answers in flight


class Moved(Protocol):
    """Told the share of the answers at hand that is written, by an engine in full; may raise Stopped."""

    def __call__(self, share: float, writing: Writing | None = None, /) -> None: ...


Most = Callable[[], int | None]  # answers that are still wanted of those asked for at once; None = all


@dataclass(frozen=True)
class Completion:
    ids: list[int]  # end of sequence included
    finish_reason: str  # stop | length, or what an API says
    top: list[list[tuple[int, float]]] | None = None  # of an API: a token's candidates (id, log-probability), or none

    @property
    def loops(self) -> bool:
        """Whether it goes round in circles until its end."""
        return verify.loops(self.ids[:-1] if self.finish_reason == "stop" else self.ids)


class Generator(Protocol):
    """Something that continues prompts. Deterministic for equal prompts and seed where the engine can."""

    def generate(self, prompts: list[list[int]], *, seed: int) -> list[Completion]: ...


def still(share: float, writing: Writing | None = None, /) -> None:
    """Nobody wants to know."""


def everything() -> int | None:
    """All answers are wanted."""
    return None


def wants_vllm(engine: str, device: torch.device) -> bool:
    """Whether vLLM is to write. Raises TaskError where the recipe insists on it and it is not there."""
    if engine not in ENGINES:
        raise TaskError(f"engine: {engine} is unknown", hint=f"use {', '.join(ENGINES[:-1])} or {ENGINES[-1]}")
    installed = find_spec("vllm") is not None
    if engine == "vllm" and not installed:
        raise TaskError("engine: vllm, but vLLM is not installed here", hint="install vllm, or use engine: auto")
    return engine == "vllm" or (engine == "auto" and installed and device.type == "cuda")


def rows_that_fit(config: Any, free_bytes: int, length: int, most: int) -> int:
    """How many answers transformers may write at once: as many rows of `length` tokens as have room in a cache of
    2-byte values."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row_bytes = 2 * 2 * config.num_hidden_layers * heads * width * length
    return max(1, min(most, int(CACHE_SHARE * free_bytes / row_bytes)))


def free_memory() -> None:
    """Gives back what nobody holds any more: before and after an engine that takes most of the GPU for itself."""
    gc.collect()  # an engine and who counts its steps know each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def alone(cards: int) -> Iterator[None]:
    """The environment in which an engine starts processes: it sees this process's GPU and those after it, `cards` in
    all, and nothing of the launcher, whose store torch would take for the engine's own (TORCHELASTIC_USE_AGENT_STORE in
    torch/distributed/rendezvous.py)."""
    if LAUNCHED_ENV not in os.environ:
        yield
        return
    before, first = dict(os.environ), int(os.environ["LOCAL_RANK"])
    seen = before.get("CUDA_VISIBLE_DEVICES")
    known = seen.split(",") if seen else [str(n) for n in range(first + cards)]
    for name in before:
        if name.startswith(("TORCHELASTIC_", "MASTER_", "GROUP_", "ROLE_")) or name in _LAUNCHED:
            del os.environ[name]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(known[first : first + cards])
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


class TransformersGenerator:
    """Batched generation with a key-value cache, prompts padded on the left. Greedy at temperature 0."""

    def __init__(
        self, model: Any, tokenizer: Any, max_new_tokens: int, *, temperature: float = 0.0, top_p: float = 1.0,
        moved: Moved | None = None, seen: Callable[[Tensor], None] | None = None,
    ) -> None:  # fmt: skip
        """`seen` gets the ids written so far, [B, C], after every token; it may raise."""
        self._model = model
        self._moved, self._seen = moved or still, seen
        self._pad = tokenizer.pad_token_id
        self._ends = {tokenizer.eos_token_id}
        from transformers import GenerationConfig

        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        # Made from nothing: the sampling settings in a model's own generation_config would join in silently.
        self._config = GenerationConfig(
            max_new_tokens=max_new_tokens, eos_token_id=sorted(self._ends), pad_token_id=self._pad, use_cache=True,
            **(sampling if temperature > 0.0 else {"do_sample": False}),
        )  # fmt: skip
        model.generation_config = self._config

    def generate(self, prompts: list[list[int]], *, seed: int) -> list[Completion]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[self._pad] * (longest - len(p)) + p for p in prompts], device=self._model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self._model.device)
        torch.manual_seed(seed)
        going_on = torch.zeros(len(prompts), dtype=torch.bool, device=ids.device)

        def token(written: Tensor, *_: Any, **__: Any) -> Tensor:
            self._moved((written.shape[1] - longest) / self._config.max_new_tokens)
            if self._seen is not None:
                self._seen(written[:, longest:])
            return going_on

        with torch.inference_mode():
            out = self._model.generate(
                input_ids=ids, attention_mask=mask, generation_config=self._config, stopping_criteria=[token]
            )
        return [self._until_end(row) for row in out[:, longest:].tolist()]

    def _until_end(self, ids: list[int]) -> Completion:
        for at, token in enumerate(ids):
            if token in self._ends:
                return Completion(ids[: at + 1], "stop")
        return Completion(ids, "length")


def lengths_so_far(ended: Sequence[int], going: Sequence[int]) -> tuple[float, float, int]:
    """(mean length up to the longest, share of answers that are longer, the longest) from the lengths of answers that
    ended and of those in the middle. Lengths of 0 say nothing."""
    ends, all_ = Counter(ended), Counter(n for n in (*ended, *going) if n > 0)
    alive, share, mean, before = sum(all_.values()), 1.0, 0.0, 0
    for length in sorted(all_):
        mean += share * (length - before)
        share *= 1.0 - ends[length] / alive
        alive, before = alive - all_[length], length
    return mean, share, before


class VllmGenerator:
    """vLLM, without log-probabilities: those come from our own pass and would slow generation to a quarter.

    Its engine is stepped here instead of by LLM.generate, which tells nothing before all answers have ended.
    """

    def __init__(
        self, place: ModelSource, tokenizer: Any, max_new_tokens: int, *, longest_prompt: int, temperature: float = 0.0,
        top_p: float = 1.0, seed: int = 0, moved: Moved | None = None, cards: int = 1,
    ) -> None:  # fmt: skip
        """`cards`: GPUs that share each layer. Raises TaskError when vLLM cannot serve the model."""
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
        from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]

        self._max_new_tokens, self._temperature, self._top_p = max_new_tokens, temperature, top_p
        self._params, self._kind = SamplingParams, RequestOutputKind.DELTA
        self._eos = tokenizer.eos_token_id
        try:
            with alone(cards):
                self._llm = LLM(
                    model=hub.local_path(place), revision=place.revision, trust_remote_code=place.trust_remote_code,
                    load_format="safetensors", seed=seed, stream_interval=STREAM_TOKENS,
                    tensor_parallel_size=cards, gpu_memory_utilization=VLLM_SHARE,
                    # By default the model's whole context, 131,072 tokens for R1-Distill: no small card's cache holds
                    # that.
                    max_model_len=longest_prompt + max_new_tokens,
                )  # fmt: skip
        except (ValueError, RuntimeError, OSError) as error:
            first = str(error).strip().split("\n")[0]
            raise TaskError(f"vLLM cannot serve {place.path}: {first}", hint="use engine: transformers") from error
        self._moved, self._names = moved or still, itertools.count()

    def generate(self, prompts: list[list[int]], *, seed: int) -> list[Completion]:
        found = dict(self.stream(prompts, seed=seed))
        return [found[i] for i in range(len(prompts))]

    def stream(
        self, prompts: list[list[int]], *, seed: int, most: Most = everything
    ) -> Iterator[tuple[int, Completion]]:
        """(place in `prompts`, answer) as they end. Where fewer are wanted meanwhile, the last ones asked for are
        dropped, whatever they have become: to keep those that end soon would be to keep the short ones."""
        engine, names = self._llm.llm_engine, [str(next(self._names)) for _ in prompts]
        flight, place = _Flight(names, self._max_new_tokens), {name: i for i, name in enumerate(names)}
        try:
            for i, name in enumerate(names):
                engine.add_request(name, {"prompt_token_ids": prompts[i]}, self._sampling(seed + i))
            told_at = 0.0
            while engine.has_unfinished_requests():
                outputs = engine.step()
                flight.steps += 1
                for output in outputs:
                    flight.ids[output.request_id] += output.outputs[0].token_ids
                    if output.finished:
                        del flight.open[output.request_id]
                        yield place[output.request_id], self._completion(flight.ids[output.request_id], output)
                dropped = flight.beyond(most())
                if dropped:
                    engine.abort_request(dropped)
                if dropped or time.monotonic() - told_at >= TELL_S:
                    writing, told_at = flight.writing(), time.monotonic()
                self._moved(flight.share(writing), writing)
        finally:
            if flight.open:
                engine.abort_request(list(flight.open))

    def _sampling(self, seed: int) -> Any:
        return self._params(
            temperature=self._temperature, top_p=self._top_p, max_tokens=self._max_new_tokens, seed=seed,
            stop_token_ids=[self._eos], detokenize=False, output_kind=self._kind,
        )  # fmt: skip

    def _completion(self, ids: list[int], output: Any) -> Completion:
        stopped = output.outputs[0].finish_reason == "stop"
        if stopped and (not ids or ids[-1] != self._eos):
            ids = [*ids, self._eos]  # some versions leave the end of sequence out
        return Completion(ids, "stop" if stopped else "length")


class _Flight:
    """What an engine was asked at once, and what it has written of it."""

    def __init__(self, names: Sequence[str], longest: int) -> None:
        self._longest = longest
        self.open = dict.fromkeys(names)  # in the order they were asked, which is that in which they begin
        self.ids: dict[str, list[int]] = {name: [] for name in names}
        self.steps, self._most, self._began = 0, 0, time.monotonic()

    def beyond(self, most: int | None) -> list[str]:
        """Takes out what is not wanted any more; what has ended is never taken back."""
        excess = 0 if most is None else len(self.ids) - max(most, len(self.ids) - len(self.open))
        dropped = list(self.open)[len(self.open) - excess :] if excess > 0 else []
        for name in dropped:
            del self.open[name], self.ids[name]
        return dropped

    def writing(self) -> Writing:
        going = [len(self.ids[name]) for name in self.open if self.ids[name]]
        ended = [len(ids) for name, ids in self.ids.items() if name not in self.open]
        self._most = max(self._most, len(going))
        mean, share, longest = lengths_so_far(ended, going)
        return Writing(
            answers=len(self.ids), before=0, later=0, ended=len(ended), flight=self._most,
            tokens=sum(ended) + sum(going), steps=self.steps, seconds=time.monotonic() - self._began,
            length=mean, going_on=share, longest=longest,
        )  # fmt: skip

    def share(self, writing: Writing) -> float:
        """Of all tokens: of an answer in the middle, half of what it may still have is taken to come."""
        mean = writing.length + writing.going_on * (self._longest - writing.longest) / 2
        return min(1.0, writing.tokens / max(1.0, len(self.ids) * mean))
