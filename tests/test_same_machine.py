"""Stages on one machine: it goes on by itself, is paid once, and whatever breaks it the rest is started anew.

Money is read from the fake provider's own invoice, not from the ledger.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.plan import Plan
from orchestrator.shares import visits
from tests.plans import make_plan
from tests.test_runner import WORK, World


def chained(joins: Collection[str] = ("train", "evaluate"), work_s: Mapping[str, float] = WORK, **changes: Any) -> Plan:
    """A plan whose named stages go on on the machine of the one before them."""
    plan = make_plan(work_s, **changes)
    stages = tuple(replace(s, joins=True, reserve_micros=0) if s.name in joins else s for s in plan.stages)
    return replace(plan, stages=stages)


def launches(world: World) -> list[str]:
    return [name.split("-")[3] for what, name in world.provider.calls if what == "launch"]


def shares(world: World) -> dict[str, list[tuple[float, int]]]:
    """(seconds, micros) of every stage on every machine; checks that nothing is lost on the way."""
    found: dict[str, list[tuple[float, int]]] = {}
    for row in world.run.machines:
        told = visits(row)
        assert sum(one.micros or 0 for one in told) == row.settled_micros
        if "billed_s" in row.facts:
            assert sum(one.seconds or 0.0 for one in told) == pytest.approx(row.facts["billed_s"])
        for one in told:
            found.setdefault(one.stage, []).append((one.seconds or 0.0, one.micros or 0))
    return found


def test_joined_stages_share_one_machine_and_its_cost_is_split_by_their_time(tmp_path: Path) -> None:
    world = World(tmp_path, chained())
    assert world.client().state == "done"
    assert list(world.run.done) == list(WORK)
    assert launches(world) == ["label"] and len(world.run.machines) == 1
    found = {stage: seconds for stage, ((seconds, _),) in shares(world).items()}
    assert found == pytest.approx({"label": 300 + 22.5, "train": 600, "evaluate": 60 + 2.5}, abs=10)
    world.check_money()
    (tmp_path / "alone").mkdir()
    alone = World(tmp_path / "alone")
    alone.client()
    assert world.provider.invoice_micros() < alone.provider.invoice_micros()


def test_only_what_is_planned_so_is_joined(tmp_path: Path) -> None:
    world = World(tmp_path, chained(["evaluate"]))
    assert world.client().state == "done"
    assert launches(world) == ["label", "train"]
    world.check_money()
