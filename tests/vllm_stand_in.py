"""vLLM 0.24's offline engine, as far as it is used: what LLM, LLMEngine and SamplingParams take, give and refuse.

As in vllm/v1/engine: requests wait until one of `at_once` places is free, in the order they came; a step writes a token
of each that has one; of a request that streams (DELTA) word comes with its first token, every `stream_interval`
tokens, and at its end, each time with what is new; an aborted request is never heard of again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from tasks import contract

Answer = Callable[[list[int], Any], list[int]]  # ids of a prompt and its SamplingParams to all ids of its answer


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


class SamplingParams:
    def __init__(
        self, *, temperature: float = 1.0, top_p: float = 1.0, seed: int | None = None, max_tokens: int | None = 16,
        stop_token_ids: list[int] | None = None, detokenize: bool = True,
        output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE,
    ) -> None:  # fmt: skip
        self.temperature, self.top_p, self.seed, self.max_tokens = temperature, top_p, seed, max_tokens
        self.stop_token_ids, self.detokenize, self.output_kind = stop_token_ids or [], detokenize, output_kind


class _Request:
    def __init__(self, name: str, prompt: list[int], params: SamplingParams, answer: list[int]) -> None:
        self.name, self.prompt, self.params, self.answer = name, prompt, params, answer
        self.written, self.sent = 0, 0


class LLMEngine:
    def __init__(self, owner: LLM) -> None:
        self._owner = owner
        self._requests: dict[str, _Request] = {}
        self.steps = 0
        self.aborted: list[str] = []

    def add_request(self, request_id: str, prompt: Mapping[str, list[int]], params: SamplingParams) -> str:
        if not isinstance(request_id, str):
            raise TypeError(f"request_id must be a string, got {type(request_id)}")
        assert request_id not in self._requests and set(prompt) == {"prompt_token_ids"}
        assert params.output_kind is RequestOutputKind.DELTA and not params.detokenize
        ids = prompt["prompt_token_ids"]
        if len(ids) + 1 > self._owner.room:
            raise ValueError(f"the prompt of {len(ids)} tokens is longer than the maximum model length")
        answer = self._owner.answer(ids, params)
        self._requests[request_id] = _Request(request_id, ids, params, answer)
        return request_id

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    def abort_request(self, request_ids: list[str], internal: bool = False) -> None:
        assert not internal
        for name in request_ids:
            if self._requests.pop(name, None) is not None:
                self.aborted.append(name)

    def step(self) -> list[Any]:
        self.steps += 1
        self._owner.stepped()
        outputs = [self._token(one) for one in list(self._requests.values())[: self._owner.at_once]]
        return [output for output in outputs if output is not None]

    def _token(self, one: _Request) -> Any:
        one.written += 1
        most = min(one.params.max_tokens or sys.maxsize, self._owner.room - len(one.prompt))
        stopped = one.written >= len(one.answer) and one.answer[-1:] == one.params.stop_token_ids[:1]
        finished = stopped or one.written >= min(most, len(one.answer))
        due = finished or one.sent == 0 or one.written - one.sent >= self._owner.stream_interval
        if not due:
            return None
        new, one.sent = one.answer[one.sent : one.written], one.written
        if finished:
            del self._requests[one.name]
        reason = ("stop" if stopped else "length") if finished else None
        said = SimpleNamespace(index=0, text="", token_ids=new, finish_reason=reason)
        return SimpleNamespace(request_id=one.name, outputs=[said], finished=finished)


class LLM:
    made: ClassVar[list[LLM]] = []
    at_once: ClassVar[int] = 256
    answering: ClassVar[Callable[[LLM], Answer]]
    stepping: ClassVar[Callable[[], None]]

    def __init__(
        self, model: str, *, revision: str | None, trust_remote_code: bool, load_format: str, seed: int,
        max_model_len: int, stream_interval: int = 1, tensor_parallel_size: int = 1,
        gpu_memory_utilization: float | None = None,
    ) -> None:  # fmt: skip
        assert load_format == "safetensors"
        assert gpu_memory_utilization == contract.VLLM_SHARE, "the plan counts with this share of a card"
        self.model, self.room, self.stream_interval = model, max_model_len, stream_interval
        self.cards = tensor_parallel_size
        self.answer = type(self).answering(self)
        self.llm_engine = LLMEngine(self)
        self.stepped = type(self).stepping
        LLM.made.append(self)


def install(
    monkeypatch: pytest.MonkeyPatch, answering: Callable[[LLM], Answer], *, at_once: int = 256,
    stepping: Callable[[], None] = lambda: None,
) -> type[LLM]:  # fmt: skip
    """As `import vllm` finds it, for one test."""
    vllm, params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    there = type("LLM", (LLM,), {"answering": staticmethod(answering), "stepping": staticmethod(stepping)})
    there.at_once = at_once  # type: ignore[attr-defined]
    vllm.LLM, vllm.SamplingParams = there, SamplingParams  # type: ignore[attr-defined]
    params.RequestOutputKind, params.SamplingParams = RequestOutputKind, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)
    LLM.made.clear()
    return LLM
