"""Who writes the answers on this machine: vLLM where it is installed and there is a GPU, else transformers."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from tasks import hub
from tasks.contract import ModelSource, TaskError

ENGINES = ("auto", "vllm", "transformers")
CACHE_SHARE = 0.6  # of free memory that the key-value cache of a batch may take; the rest is for what a step holds

Moved = Callable[[float], None]  # told the share of the answers at hand that is written; may raise Stopped


@dataclass(frozen=True)
class Completion:
    ids: list[int]  # end of sequence included
    finish_reason: str  # stop | length, or what an API says
    top: list[list[tuple[int, float]]] | None = None  # of an API: a token's candidates (id, log-probability), or none


class Generator(Protocol):
    """Something that continues prompts. Deterministic for equal prompts and seed where the engine can."""

    def generate(self, prompts: list[list[int]], *, seed: int) -> list[Completion]: ...


def still(share: float) -> None:
    """Nobody wants to know."""


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


class TransformersGenerator:
    """Batched generation with a key-value cache, prompts padded on the left. Greedy at temperature 0."""

    def __init__(
        self, model: Any, tokenizer: Any, max_new_tokens: int, *, temperature: float = 0.0, top_p: float = 1.0,
        moved: Moved | None = None,
    ) -> None:  # fmt: skip
        self._model = model
        self._moved = moved or still
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


class VllmGenerator:
    """vLLM, without log-probabilities: those come from our own pass and would slow generation to a quarter."""

    def __init__(
        self, place: ModelSource, tokenizer: Any, max_new_tokens: int, *, longest_prompt: int, temperature: float = 0.0,
        top_p: float = 1.0, seed: int = 0, moved: Moved | None = None,
    ) -> None:  # fmt: skip
        """Raises TaskError when vLLM cannot serve the model."""
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

        self._max_new_tokens, self._temperature, self._top_p = max_new_tokens, temperature, top_p
        self._params = SamplingParams
        self._eos = tokenizer.eos_token_id
        try:
            self._llm = LLM(
                model=hub.local_path(place), revision=place.revision, trust_remote_code=place.trust_remote_code,
                load_format="safetensors", seed=seed,
                # By default the model's whole context, 131,072 tokens for R1-Distill: no small card's cache holds that.
                max_model_len=longest_prompt + max_new_tokens,
            )  # fmt: skip
        except (ValueError, RuntimeError, OSError) as error:
            first = str(error).strip().split("\n")[0]
            raise TaskError(f"vLLM cannot serve {place.path}: {first}", hint="use engine: transformers") from error
        self._moved, self._steps = moved or still, 0
        engine = self._llm.llm_engine
        self._step, engine.step = engine.step, self._counted_step

    def _counted_step(self) -> Any:
        """A token of every answer in flight; longer prompts and a full cache make it a few more steps than tokens."""
        self._steps += 1
        self._moved(self._steps / (self._steps + self._max_new_tokens))
        return self._step()

    def generate(self, prompts: list[list[int]], *, seed: int) -> list[Completion]:
        params = [
            self._params(
                temperature=self._temperature, top_p=self._top_p, max_tokens=self._max_new_tokens, seed=seed + i,
                stop_token_ids=[self._eos], detokenize=False,
            )
            for i in range(len(prompts))
        ]  # fmt: skip
        self._steps = 0
        outputs = self._llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        done = []
        for output in outputs:
            ids = list(output.outputs[0].token_ids)
            stopped = output.outputs[0].finish_reason == "stop"
            if stopped and (not ids or ids[-1] != self._eos):
                ids.append(self._eos)  # some versions leave the end of sequence out
            done.append(Completion(ids, "stop" if stopped else "length"))
        return done
