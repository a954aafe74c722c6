"""What stages need on machines."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator import sizing
from tests.recipes import RENTED
from tests.test_planner import card, plan

GPUS = ("A10G", "A100-80GB")


def test_offers_of_one_card_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    measure = sizing._measure

    def counted(*args: object) -> object:
        asked.append((args[0].name, args[1], args[3].gpu.name))  # type: ignore[attr-defined]
        return measure(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(sizing, "_measure", counted)
    counts = []
    for regions in (1, 40):
        asked.clear()
        plan(RENTED, *(replace(card(gpu, 500_000 + i), region=f"r{i}") for i in range(regions) for gpu in GPUS))
        counts.append((len(asked), len(set(asked))))
    assert counts[0] == counts[1] and 8 <= counts[0][1] < 60


def test_cards_differ_in_what_a_stage_needs_on_them() -> None:
    label = plan(RENTED, card("A10G", 500_000), card("A100-80GB", 500_000), join=False).stages[0]
    hours = {offer.gpu: hours.expected for offer, hours in zip(label.candidates, label.candidate_hours, strict=True)}
    assert hours["A10G"] > 2 * hours["A100-80GB"]
