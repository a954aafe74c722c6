"""The same recipe with ten samples: does the whole way hold, before real money is spent on it? Pure."""

from __future__ import annotations

from typing import Any

from orchestrator.plan import Plan
from orchestrator.recipe import EvaluateStage, LabelStage, PretrainStage, Recipe, RehearseStage, Stage, TrainStage

SAMPLES = 10  # prompts to label, prompts to evaluate, steps of a rehearsal
STEPS = 5  # of a training
PRETRAIN_STEPS = 300  # fewer, and the quickstart's teacher does not yet know how to end an answer
NOTE = f"smoke: {SAMPLES} samples a stage show that every stage works; its quality means nothing"


def smoke_of(recipe: Recipe) -> Recipe:
    """Models, methods, lengths and machines as they are; samples, steps and seeds cut down; any finished answer kept.

    lm-evaluation-harness is left out: its tasks have lengths of their own.
    """
    compare = recipe.compare.model_copy(update={"seeds": 1, "search_steps": 1 if recipe.compare.search_steps else None})
    changes = {"name": f"smoke-{recipe.name}"[:60], "compare": compare, "stages": tuple(map(_smaller, recipe.stages))}
    return recipe.model_copy(update=changes)


def _smaller(stage: Stage) -> Stage:
    changes: dict[str, Any] = {}
    match stage:
        case PretrainStage():
            changes = {"steps": min(stage.steps, PRETRAIN_STEPS)}
        case LabelStage():
            samples = min(stage.samples, SAMPLES)
            changes = {"samples": samples, "samples_per_prompt": 1, "keep": "all", "max_cut_share": 1.0}
        case TrainStage():
            changes = {"steps": min(stage.steps or STEPS, STEPS), "epochs": None}
        case EvaluateStage():
            changes = {"limit": min(stage.limit or SAMPLES, SAMPLES), "seeds": 1, "lm_eval": ()}
        case RehearseStage():
            changes = {"steps": min(stage.steps, SAMPLES)}
    return stage.model_copy(update=changes)


def cap_of(plan: Plan) -> int:
    """micro-USD: what the smoke run may cost where nobody says otherwise: its own high estimate, never the recipe's
    whole budget."""
    return min(plan.cap_micros, plan.cost_micros.high + plan.reserve_micros)
