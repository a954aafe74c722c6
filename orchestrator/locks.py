"""Which locked environments can a stage work in, and where do their files lie? Every plan loads it: it loads little."""

from __future__ import annotations

from pathlib import Path

from orchestrator.errors import UsageError
from tasks.contract import BoxSettings, EvaluateSettings, LabelSettings


def environments(kind: str, settings: object) -> tuple[str, ...]:
    """Locked environments that a stage can work in, the best first; none where a few packages do.

    Answers are written by vLLM where the machine can, and else by transformers, unless the recipe names one of them.
    """
    if isinstance(settings, BoxSettings):
        return tuple(f"{name}-box" for name in environments(settings.kind, settings.settings))
    if kind == "rehearse":
        return ()
    if not isinstance(settings, LabelSettings | EvaluateSettings) or getattr(settings, "api", None) is not None:
        return ("train",)
    return {"vllm": ("label",), "transformers": ("train",)}.get(settings.engine, ("label", "train"))


def requirements(name: str) -> Path:
    """A file of locked versions: beside this file in a wheel, in requirements/ of a checkout."""
    here = Path(__file__).resolve().parent
    for path in (here / f"{name}.txt", here.parent / "requirements" / f"{name}.txt"):
        if path.is_file():
            return path
    raise UsageError(f"kdcloud is not installed whole: its {name}.txt is missing", hint="install it again")
