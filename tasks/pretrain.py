"""How does a teacher come from nothing? Next-token training of a small model on a generated corpus."""

from __future__ import annotations

from typing import Any

from tasks import data, models
from tasks.contract import PretrainSettings
from tasks.stage import Context
from tasks.train import Arm, Examples, Fit, fit, resume_point


def run(ctx: Context, settings: PretrainSettings) -> dict[str, Any]:
    """The model under `model/`, with a tokenizer of single bytes."""
    models.quiet()
    models.set_threads(settings.threads)
    ctx.progress("prepare", declared=True)
    rows = data.corpus(settings.corpus, settings.examples, settings.seed)
    tokenizer = models.tiny_tokenizer()
    examples = _examples(rows, tokenizer)
    device = models.pick_device()
    model = models.from_architecture(settings.model, tokenizer, seed=settings.seed).to(device)
    how = Fit(
        steps=settings.steps, batch_size=settings.batch_size, micro_batch=settings.batch_size,
        learning_rate=settings.learning_rate, alpha=0.0, seed=settings.seed, weight_decay=0.05,
        checkpoint_every_s=settings.checkpoint_every_s,
    )  # fmt: skip
    done = fit(ctx, model, examples, how, Arm("pretrain", 0, settings.steps), resume_point(ctx))
    models.save(ctx.out / models.MODEL_FOLDER, model, tokenizer)
    return {
        "examples": len(examples),
        "steps": settings.steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": done.tokens,
        "tokens_per_s": done.tokens_per_s,
        "final_loss": done.final_loss,
    }


def _examples(rows: list[dict[str, Any]], tokenizer: Any) -> Examples:
    prompts = {row["input"]: models.prompt_ids(tokenizer, row["input"]) for row in rows}
    texts = tokenizer([row["output"] for row in rows], add_special_tokens=False)["input_ids"]
    return Examples.hard([(prompts[row["input"]], [*ids, tokenizer.eos_token_id])
                          for row, ids in zip(rows, texts, strict=True)])  # fmt: skip
