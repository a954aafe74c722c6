"""How fast is labelling end to end: vLLM generates without log-probabilities, our own pass scores what was kept?

    python -m benchmarks.labelling [--out FOLDER]     # needs CUDA and vLLM

Beside it vLLM's own ways to 64 log-probabilities a token, and generation alone. All samples are kept, and the prompts
are computed by the scoring pass too. Loading a model is left out: a stage does it once. Random weights at the 1.5B
shape, every answer as long as allowed. Each setting is run once to warm up and then timed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import kept, versions
from benchmarks.scoring import COMPLETION, PROMPT, REAL, K, ours, qwen
from tasks import models


def engine() -> Any:
    from transformers import AutoConfig
    from vllm import LLM

    folder = tempfile.mkdtemp()
    AutoConfig.for_model(
        "qwen2", vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=32_768, tie_word_embeddings=True,
        architectures=["Qwen2ForCausalLM"], dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip
    return LLM(
        model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=2048,
        max_logprobs=K, gpu_memory_utilization=0.6, enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip


def prompts(count: int, seed: int) -> list[list[int]]:
    rows: list[list[int]] = torch.randint(
        0, REAL, (count, PROMPT), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return rows


def generated(llm: Any, asked: list[list[int]], **params: Any) -> list[list[int]]:
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.6, top_p=0.95, max_tokens=COMPLETION, ignore_eos=True, detokenize=False, **params
    )
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def prompt_logprobs(llm: Any, pairs: list[tuple[list[int], list[int]]]) -> None:
    """vLLM's own way of scoring finished text."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, prompt_logprobs=K, flat_logprobs=True, detokenize=False)
    llm.generate([{"prompt_token_ids": p + c} for p, c in pairs], sampling, use_tqdm=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--prompts", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--without-objects", action="store_true", help="leave out logprobs=64 that is not flat: slow")
    parsed = parser.parse_args()
    llm = engine()
    model = qwen()
    models.compile_layers(model)
    rows: list[dict[str, Any]] = []
    for count in parsed.prompts:
        asked = prompts(count, count)

        def both(asked: list[list[int]] = asked) -> None:
            ours(model, list(zip(asked, generated(llm, asked), strict=True)))

        def twice(asked: list[list[int]] = asked) -> None:
            prompt_logprobs(llm, list(zip(asked, generated(llm, asked), strict=True)))

        ways: list[tuple[str, Callable[[], Any]]] = [
            ("vLLM, no log-probabilities", lambda asked=asked: generated(llm, asked)),
            ("vLLM, logprobs=64", lambda asked=asked: generated(llm, asked, logprobs=K)),
            ("vLLM, logprobs=64 flat", lambda asked=asked: generated(llm, asked, logprobs=K, flat_logprobs=True)),
            ("vLLM, then prompt_logprobs=64 flat", twice),
            ("kdcloud: vLLM, then its own scoring pass", both),
        ]
        for name, work in ways:
            if parsed.without_objects and name == "vLLM, logprobs=64":
                continue
            seconds = []
            for _ in range(3 if "no log" in name or "kdcloud" in name else 2):
                torch.cuda.synchronize()
                began = time.perf_counter()
                work()
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
            speed = count * COMPLETION / min(seconds[1:])
            rows.append({"prompts": count, "way": name, "output_tokens_per_s": round(speed)})
            print(rows[-1], flush=True)
    for count in parsed.prompts:
        mine = {row["way"]: row["output_tokens_per_s"] for row in rows if row["prompts"] == count}
        ours_ = mine["kdcloud: vLLM, then its own scoring pass"]
        best = max(speed for way, speed in mine.items() if "64" in way)
        print(f"{count} prompts: {ours_ / mine['vLLM, no log-probabilities']:.2f} x generation alone, "
              f"{ours_ / best:.2f} x the best of vLLM's own ways")  # fmt: skip
    kept(
        "labelling", rows, parsed.out, shape="Qwen2.5-1.5B, random weights, bf16", prompt=PROMPT,
        completion=COMPLETION, k=K, versions=versions("vllm", "transformers", "triton"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
