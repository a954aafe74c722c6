"""Runs that a ledger knows and nothing ever ran: for what only looks at them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

from orchestrator.config import Home
from orchestrator.ledger import Ledger, Run
from orchestrator.plan import StagePlan, plan_to_dict
from orchestrator.runner import mark_to_dict
from orchestrator.testing import VirtualClock
from tasks.contract import SETTINGS, Settings
from tests.plans import make_plan


def stages(**settings: Settings) -> list[StagePlan]:
    """Stages of these names and settings, in order."""
    kinds = {cls: kind for kind, cls in SETTINGS.items()}
    plan = make_plan(dict.fromkeys(settings, 1.0))
    return [replace(s, kind=kinds[type(settings[s.name])], settings=settings[s.name]) for s in plan.stages]


def recorded(home: Home, run_id: str, url: str, planned: Sequence[StagePlan]) -> Run:
    """A run of these stages in the ledger of `home`, its artefacts at `url`."""
    plan = replace(make_plan({"any": 1.0}), stages=tuple(planned))
    home.make()
    mark = VirtualClock().mark()
    with closing(Ledger(home.ledger)) as ledger:
        ledger.create_run(
            run_id, name="r", bucket=url, cap_micros=1, deadline_s=None, mark=mark_to_dict(mark), at=mark.wall,
            data={"schema": 1, "plan": plan_to_dict(plan), "owner": "o"},
        )  # fmt: skip
        return ledger.run(run_id)
