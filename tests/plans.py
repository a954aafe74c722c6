"""Plans made by hand for tests of what carries them out."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from decimal import Decimal

from orchestrator import spend
from orchestrator.ledger import MachineRow
from orchestrator.money import Rate
from orchestrator.plan import Micros, Plan, Range, StagePlan
from orchestrator.provision import Offer
from orchestrator.states import State
from orchestrator.testing import START, fake_offer
from tasks.contract import RehearseSettings


def make_plan(
    work_s: Mapping[str, float],
    *,
    cap_micros: int = 1_000_000,
    offers: tuple[Offer, ...] = (),
    deadline_s: float | None = None,
    bucket: str = "fake:",
    idle_s: float = 3600.0,
) -> Plan:
    """A plan of rehearse stages that says each takes just its `work_s`."""
    candidates = offers or (fake_offer(), fake_offer(600_000, gpu="A10G"))
    stages = tuple(_stage(name, seconds, candidates) for name, seconds in work_s.items())
    return Plan(
        name="test",
        recipe="test.yaml",
        digest="d",
        currency="CNY",
        rate=Rate(Decimal("7.1"), date(2026, 1, 15)),
        made_at=START,
        stages=stages,
        overhead=(),
        cap_micros=cap_micros,
        deadline_s=deadline_s,
        idle_s=idle_s,
        bucket=bucket,
        on_shortfall="stop",
        infra=(candidates[0].infra,),
    )


def _stage(name: str, seconds: float, candidates: tuple[Offer, ...]) -> StagePlan:
    hours = Range(seconds / 3600, seconds / 3600, seconds / 3600)
    cost = spend.cost_micros(candidates[0], seconds)
    return StagePlan(
        name=name,
        kind="rehearse",
        settings=RehearseSettings(steps=int(seconds), seconds_per_step=1.0),
        after=(),
        vram_gib=Range(1, 1, 1),
        vram_breakdown_gib={},
        hours=hours,
        startup_hours=Range(0, 0, 0),
        candidates=candidates,
        candidate_hours=tuple(hours for _ in candidates),
        cost_micros=Micros(cost, cost, cost),
        reserve_micros=spend.latency_reserve_micros(candidates[0]),
        rejected=(),
        notes=(),
        uses={},
    )


def make_row(name: str, state: State) -> MachineRow:
    """A ledger row of a machine in some state."""
    return MachineRow(
        name=name,
        run="r-abc123",
        stage="train",
        state=state,
        reserved_micros=1000,
        settled_micros=0,
        order={},
        facts={},
        reasons=(),
        reserved_at=START,
        absent_seen=False,
        job_rc=None,
    )
