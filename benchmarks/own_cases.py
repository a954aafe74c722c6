"""Are the plan's figures right for this package's own code on a real card? Measures what asked/own.jsonl lists.

    python -m benchmarks.own_cases --predict             # before: writes asked/own_predicted.jsonl, on any machine
    python -m benchmarks.own_cases [NAME...] --out FOLDER     # on a GPU: adds to own.jsonl and own_raw.jsonl there

A line of own.jsonl is a case as `kdcloud estimate` reads it, without what was measured; "own" in it says what the
package's code is told besides. Those named own-two-... were added, and predicted, when the others had been measured.
Random weights at published shapes. Each case starts from an empty GPU; steps before the first timed one are not
counted. Process memory: what the card lacks besides what torch has reserved, and that.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ASKED = Path(__file__).parent / "asked"
OWN, PREDICTED = ASKED / "own.jsonl", ASKED / "own_predicted.jsonl"
CARDS = ("H100", "H200")
WARM, TIMED, STEP_BUDGET_S = 3, 10, 12.0  # a case's timed steps: as many as fit into this, three at least
K = 64


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


# --- before


def predict() -> None:
    """What `kdcloud estimate` says of each case, on each card that may come. What was said before stays."""
    from orchestrator.cases import parse_case
    from orchestrator.estimate import as_json, estimate

    rows = lines(PREDICTED) if PREDICTED.exists() else []
    told = {(row["id"], row["gpu"]) for row in rows}
    for case in lines(OWN):
        for card in CARDS:
            if (case["id"], card) in told:
                continue
            found = as_json(estimate(parse_case(json.dumps({**_public(case), "gpu": card}))))
            rows.append({**found, "gpu": card})
    PREDICTED.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _public(case: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in case.items() if key != "own"}


# --- training


def built(model: dict[str, Any], dtype: Any) -> Any:
    """The case's shape with random weights on the GPU."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    skip = ("name", "architecture", "params")
    shape = {key: value for key, value in model.items() if key not in skip and value is not None}
    config = AutoConfig.for_model(model["architecture"], max_position_embeddings=32_768, **shape)
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def examples(case: dict[str, Any], count: int) -> Any:
    """Samples of `seq_len` tokens, 64 soft labels each; with own.mean_tokens, of uneven lengths up to that."""
    import torch

    from tasks import train

    gen = torch.Generator().manual_seed(0)
    vocab, length = case["model"]["vocab_size"] - 300, case["seq_len"]
    lengths = torch.full((count,), length)
    mean = case.get("own", {}).get("mean_tokens")
    if mean:  # as far below it as above, one as long as allowed
        lengths = torch.linspace(2 * mean - length, length, count).round().long()[torch.randperm(count, generator=gen)]
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    tokens = int(offsets[-1])
    few = min(tokens, 65_536)  # rows of soft labels, used again and again
    logp = torch.log_softmax(torch.randn(few, K + 1, generator=gen) * 3, 1)
    soft = (
        torch.randint(0, vocab, (few, K), generator=gen, dtype=torch.int32), logp[:, :K].half(), logp[:, K],
        torch.full((few,), -0.2),
    )  # fmt: skip
    return train.Examples(
        keys=[str(i) for i in range(count)], ids=torch.randint(0, vocab, (tokens,), generator=gen), offsets=offsets,
        prompts=torch.ones(count, dtype=torch.long), rows=offsets[:-1],
        soft=lambda at: tuple(part[at % few] for part in soft),
    )  # fmt: skip


def own_step(case: dict[str, Any], folder: Path) -> Callable[[int], int]:
    """A step of tasks.train's loop; returns its trained tokens."""
    import torch

    from tasks import models, train
    from tasks.contract import LoraSettings, ModelSource

    method, own = case["method"], case.get("own", {})
    if method == "qlora":
        built(case["model"], torch.bfloat16).save_pretrained(folder)
        _emptied()
        model: Any = models._pretrained(ModelSource(path=str(folder)), torch.bfloat16, True)
    else:
        model = built(case["model"], torch.float32 if method == "full" else torch.bfloat16)
    if method != "full":
        lora = case["lora"]
        settings = LoraSettings(r=lora["r"], alpha=2.0 * lora["r"], dropout=0.0, targets=tuple(lora["targets"]))
        model = models.with_lora(model, settings, special_ids=[], seed=0).to("cuda")
    if case["gradient_checkpointing"]:
        models.checkpoint_layers(model, frozen=method != "full")
    packed = models.use_packing(model)
    if case.get("compile"):
        models.compile_layers(model)
    if method != "full" and (case.get("compile") or case["gradient_checkpointing"]):
        models.causal(model).enable_input_require_grads()
    model.train()
    batch = case["batch_size"] * case["grad_accum"]
    data = examples(case, own.get("samples", 2 * batch))
    how = train.Fit(
        steps=10_000, batch_size=own.get("samples_a_step", batch), micro_batch=case["batch_size"], learning_rate=1e-4,
        alpha=0.7, temperature=2.0, use_mass_at_t=True, precision="bf16", max_seq_len=case["seq_len"],
        optimizer=case["optimizer"].replace("adamw8", "adamw_8"),
    )  # fmt: skip
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = train._optimizer(weights, how, torch.device("cuda"))
    ahead = train.Ahead(model, data, train.Order(len(data), how.batch_size, 0))
    assert packed, "this model should pack here"

    def step(n: int) -> int:
        picked, batches = ahead.at(n, how)
        train.accumulate(model, data, picked, how, None, batches)
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return int(data.lengths[picked].sum())

    return step


def plain_step(case: dict[str, Any], folder: Path) -> Callable[[int], int]:
    """A step as most people write it: transformers' own loss over materialised logits, adapters by PEFT, AdamW."""
    import torch

    method, full = case["method"], case["method"] == "full"
    model = built(case["model"], torch.bfloat16)
    if not full:
        from peft import LoraConfig, get_peft_model

        lora = case["lora"]
        model.enable_input_require_grads()
        config = LoraConfig(r=lora["r"], lora_dropout=0.0, target_modules=lora["targets"], task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    if case["gradient_checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    shape = (case["grad_accum"], case["batch_size"], case["seq_len"])
    ids = torch.randint(0, case["model"]["vocab_size"], shape, device="cuda")
    print(f"  plain {method}, {len(weights)} weights", flush=True)

    def step(n: int) -> int:
        for part in ids:
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=not full):
                loss = model(input_ids=part, labels=part, use_cache=False).loss / len(ids)
            loss.backward()
            del loss
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return ids.numel()

    return step


def trained(case: dict[str, Any]) -> dict[str, Any]:
    import torch

    with tempfile.TemporaryDirectory() as folder:
        ways = {"plain": plain_step}
        step = ways.get(case.get("own", {}).get("loop", ""), own_step)(case, Path(folder))
        for n in range(WARM):
            torch.cuda.synchronize()
            began = time.perf_counter()
            step(n)
        torch.cuda.synchronize()
        about = time.perf_counter() - began
        times = max(3, min(TIMED, int(STEP_BUDGET_S / about)))
        began, tokens = time.perf_counter(), 0
        for n in range(times):
            tokens += step(WARM + n)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        return {"tokens_per_s": round(tokens / seconds, 1), "step_seconds": round(seconds / times, 4), **peaks()}


# --- labelling


def written(case: dict[str, Any]) -> dict[str, Any]:
    """Answers by tasks.generate, then the scoring pass of tasks.label where soft labels are asked for."""
    import torch

    from tasks import generate, label, models

    gen, model = torch.Generator().manual_seed(0), case["model"]
    prompts = torch.randint(
        0, model["vocab_size"] - 300, (case["prompts"], int(case["input_tokens"])), generator=gen
    ).tolist()
    tokenizer = models.tiny_tokenizer()
    answer, engine = int(case["output_tokens"]), case["engine"]
    with tempfile.TemporaryDirectory() as folder, _never_ends(engine, case, Path(folder)) as writer:
        scorer, more = None, {}
        if engine == "transformers":
            scorer = built(model, torch.bfloat16).eval()
            made: Any = generate.TransformersGenerator(scorer, tokenizer, answer, temperature=0.6, top_p=0.95)
        else:
            made = writer(tokenizer, answer)

        def write() -> tuple[list[tuple[list[int], list[int]]], float]:
            torch.cuda.synchronize()
            began, pairs = time.perf_counter(), []
            for at in range(0, len(prompts), case["concurrency"]):
                part = prompts[at : at + case["concurrency"]]
                done = made.generate(part, seed=0)
                pairs += [(p, c.ids) for p, c in zip(part, done, strict=True)]
            torch.cuda.synchronize()
            return pairs, time.perf_counter() - began

        first, (pairs, wrote) = write()[1], write()
        tokens = sum(len(ids) for _, ids in pairs)
        free, whole = torch.cuda.mem_get_info()
        seen = peaks() if engine == "transformers" else {"process_gib": (whole - free) / 2**30}
        if case.get("own", {}).get("beside"):  # the engine's own loop over the same requests
            params = made._params(temperature=0.6, top_p=0.95, max_tokens=answer, detokenize=False)
            began = time.perf_counter()
            made._llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
            more["engine_alone_tokens_per_s"] = round(tokens / (time.perf_counter() - began), 1)
        scored = 0.0
        if case.get("soft_label_k"):
            if scorer is None:
                made = None
                _emptied()
                scorer = built(model, torch.bfloat16).eval()
            scored = _scored(label, scorer, pairs, case)
        return {
            "seconds": round(wrote + scored, 2), "tokens_per_s": round(tokens / (wrote + scored), 1),
            "writing_tokens_per_s": round(tokens / wrote, 1), "first_writing_s": round(first, 2),
            "scoring_s": round(scored, 2), "tokens": tokens, **more, **seen,
        }  # fmt: skip


def _scored(label: Any, model: Any, pairs: list[tuple[list[int], list[int]]], case: dict[str, Any]) -> float:
    import torch

    k, vocab = case["soft_label_k"], case["model"]["vocab_size"]

    def once() -> None:
        for batch in label.batches([len(p) + len(c) for p, c in pairs], label.SCORE_TOKENS):
            label.score(model, [pairs[i] for i in batch], k, 2.0, real_vocabulary=vocab)

    once()
    torch.cuda.synchronize()
    began = time.perf_counter()
    once()
    torch.cuda.synchronize()
    return time.perf_counter() - began


@contextlib.contextmanager
def _never_ends(engine: str, case: dict[str, Any], folder: Path) -> Iterator[Any]:
    """For vLLM: makes a VllmGenerator of random weights that nobody stored; what it writes is as long as allowed."""
    if engine == "transformers":
        yield None
        return
    from functools import partial

    import torch
    import vllm
    from transformers import AutoConfig

    from tasks import generate
    from tasks.contract import ModelSource

    model = case["model"]
    shape = {k: v for k, v in model.items() if k not in ("name", "architecture", "params") and v is not None}
    names = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
    AutoConfig.for_model(
        model["architecture"], max_position_embeddings=32_768, architectures=[names[model["architecture"]]],
        dtype="bfloat16", **shape,
    ).save_pretrained(folder)  # fmt: skip
    real, params = vllm.LLM, vllm.SamplingParams

    def dummy(**how: Any) -> Any:
        return real(**{**how, "load_format": "dummy"}, skip_tokenizer_init=True)

    def made(tokenizer: Any, answer: int) -> Any:
        found = generate.VllmGenerator(
            ModelSource(path=str(folder)), tokenizer, answer, longest_prompt=int(case["input_tokens"]), temperature=0.6,
            top_p=0.95,
        )  # fmt: skip
        found._params = partial(params, ignore_eos=True)
        found.generate([[1, 2, 3]] * 4, seed=0)
        torch.cuda.synchronize()
        return found

    vllm.LLM = dummy
    try:
        yield made
    finally:
        vllm.LLM = real


# --- all of them


def peaks() -> dict[str, float]:
    import torch

    free, whole = torch.cuda.mem_get_info()
    beside = whole - free - torch.cuda.memory_reserved()
    most = torch.cuda.max_memory_reserved()
    return {
        "allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
        "reserved_gib": round(most / 2**30, 3),
        "process_gib": round((beside + most) / 2**30, 3),
    }


def _emptied() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def measured(case: dict[str, Any]) -> dict[str, Any]:
    _emptied()
    began = time.perf_counter()
    try:
        found = trained(case) if case["task"] == "train" else written(case)
    except Exception as error:  # noqa: BLE001 - the next case is worth measuring
        found = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    return {**found, "whole_s": round(time.perf_counter() - began, 1)}


def rows_of(case: dict[str, Any], found: dict[str, Any], card: str) -> Iterator[dict[str, Any]]:
    """A case of `kdcloud estimate` for each way to count memory; its times stand in the first."""
    case = {**_public(case), "gpu": card}
    times = {key: found[key] for key in ("tokens_per_s", "seconds", "step_seconds") if key in found}
    for basis in ("allocated", "reserved", "process"):
        if f"{basis}_gib" in found:
            memory = {"peak_gib": round(found[f"{basis}_gib"], 3), "memory_basis": basis}
            yield {**case, "id": f"{case['id']}-{basis}", "measured": {**memory, **times}}
            times = {}


def main(words: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of the ids of the cases to measure (default: all)")
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("."))
    parsed = parser.parse_args(None if words is None else list(words))
    if parsed.predict:
        return predict()
    import torch

    from benchmarks.common import versions

    name = torch.cuda.get_device_name()
    card = next((card for card in CARDS if card in name), name)
    used = versions("transformers", "peft", "triton", "bitsandbytes", "vllm")
    told = {"gpu": card, "date": datetime.now(UTC).date().isoformat(), "card": name, "versions": used}
    predicted = {(row["id"], row["gpu"]): row for row in lines(PREDICTED)}
    parsed.out.mkdir(parents=True, exist_ok=True)
    with (parsed.out / "own.jsonl").open("a") as out, (parsed.out / "own_raw.jsonl").open("a") as raw:
        for case in lines(OWN):
            if parsed.names and not any(part in case["id"] for part in parsed.names):
                continue
            found = measured(case)
            raw.write(json.dumps({"id": case["id"], **told, **found}) + "\n")
            for row in rows_of(case, found, card):
                out.write(json.dumps(row) + "\n")
            for stream in (out, raw):
                stream.flush()
            print(_line(case, found, predicted.get((case["id"], card))), flush=True)


def _line(case: dict[str, Any], found: dict[str, Any], said: dict[str, Any] | None) -> str:
    """Measured against predicted, in a line."""
    if "failed" in found or said is None:
        return f"{case['id']:36} {found}"
    parts = [f"{case['id']:36}"]
    for basis in ("allocated", "reserved", "process"):
        got, want = found.get(f"{basis}_gib"), (said.get("peak_gib") or {}).get(basis)
        if got and want:
            parts.append(f"{basis} {got:.2f} GiB ({want['expected'] / got - 1:+.1%})")
    rate = (said.get("tokens_per_s") or {}).get("expected")
    if rate:
        parts.append(f"{found['tokens_per_s']:.0f} tokens/s ({rate / found['tokens_per_s'] - 1:+.1%})")
    parts.append(f"{found['whole_s']:.0f} s")
    return "  ".join(parts)


if __name__ == "__main__":
    main()
