"""Which words are due to whoever waits for a run? Pure: the run as the ledger tells it in, short messages out.

Each is told once: what was told stands in the ledger, so that a client that takes the run over says nothing twice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.ledger import MachineRow, Run
from orchestrator.money import both, shown
from orchestrator.plan import Plan
from orchestrator.states import LOST

TOLD = "told"  # entry of the ledger: its data names the words that were told
SHARES = (50, 80, 95)  # per cent of the cap
LONGEST = 600  # characters of what a machine or a provider said
TITLES = {
    "done": "is done",
    "cap": "ended: its cap leaves no more",
    "deadline": "ended: its deadline leaves no more",
    "failed": "failed",
    "no_capacity": "ended: no machine can be had",
    "stopped": "was stopped",
    "unconfirmed": "MAY STILL COST MONEY: a teardown is not confirmed",
}


@dataclass(frozen=True)
class Word:
    """One message. `keys`: what is told by it, for the ledger."""

    keys: tuple[str, ...]
    title: str
    text: str
    urgent: bool = False

    def line(self) -> str:
        """For a terminal, where the rest is known."""
        return f"{self.title}; {self.text.splitlines()[0]}"


def told(run: Run) -> frozenset[str]:
    """Keys of what was told of this run, by any client."""
    return frozenset(str(key) for entry in run.entries if entry.kind == TOLD for key in entry.data.get("keys", ()))


def due(run: Run, plan: Plan, *, spending_micros: int, before: Collection[str]) -> list[Word]:
    """What is to be told while the run goes on. `spending_micros`: settled, and of open machines until now."""
    words = [_lost(run, plan, row) for row in run.machines if LOST in row.reasons]
    share = _of_cap(run, plan, spending_micros, before)
    return [word for word in (*words, *share) if not set(word.keys) <= set(before)]


def _of_cap(run: Run, plan: Plan, spending_micros: int, before: Collection[str]) -> list[Word]:
    """The highest share that was passed, and with it those below. A cap that was raised counts anew."""
    if run.cap_micros <= 0:
        return []
    passed = [share for share in SHARES if spending_micros * 100 >= share * run.cap_micros]
    keys = {share: f"cap-{share}-{run.cap_micros}" for share in passed}
    if not passed or keys[passed[-1]] in before:
        return []
    spent, cap = shown(spending_micros, plan.rate, plan.currency), both(run.cap_micros, plan.rate, plan.currency)
    lines = [
        f"spent {spent} of {cap}; about {shown(expected_micros(run, plan, spending_micros), plan.rate, plan.currency)} "
        "when it is done",
        "at the cap the stage saves a checkpoint and its machine is ended: nothing is spent beyond it",
        f"look: kdcloud status {run.id}   end it now: kdcloud down {run.id}",
    ]
    title = f"{run.id} has used {passed[-1]} % of its cap"
    return [Word(tuple(keys.values()), title, "\n".join(lines), urgent=passed[-1] >= SHARES[-1])]


def expected_micros(run: Run, plan: Plan, spending_micros: int) -> int:
    """What the run will have cost: what it has, and what is expected of the stages that are not done.

    For the stage at work its renewed forecast counts, where there is one, less what its machine has used.
    """
    left = 0
    for stage in plan.stages:
        if stage.name in run.done:
            continue
        rows = [row for row in run.machines if row.stage == stage.name]
        forecast = (rows[-1].facts.get("forecast") or {}).get("cost_micros") if rows else None
        settled = sum(row.settled_micros for row in rows)
        running = spending_micros - run.spent_micros if any(row in run.live for row in rows) else 0
        whole = stage.cost_micros.expected if forecast is None else int(forecast)
        left += max(0, whole - running - (settled if forecast is None else 0))
    return spending_micros + left


def _lost(run: Run, plan: Plan, row: MachineRow) -> Word:
    offer = row.facts.get("landed") or row.order["offer"]
    where = " ".join(str(offer[key]) for key in ("infra", "region", "gpu") if offer.get(key))
    kind = "spot machine was taken back" if offer.get("spot") else "machine was lost"
    saved = row.facts.get("checkpoint")
    lines = [
        f"it goes on elsewhere from {saved}" if saved else "its stage begins anew elsewhere",
        f"stage {row.stage}, {where}",
        f"the cap holds as before; look: kdcloud status {run.id}",
    ]
    return Word((f"lost-{row.name}",), f"{run.id}: a {kind}", "\n".join(map(printable, lines)))


def ended(run: Run, plan: Plan, *, state: str, message: str, hint: str, worst_micros: Mapping[str, int]) -> Word:
    """How the run ended. `worst_micros`: the most that each machine which may still bill may cost, by name."""
    spent, cap = shown(run.spent_micros, plan.rate, plan.currency), both(run.cap_micros, plan.rate, plan.currency)
    lines = [f"spent {spent} of {cap}"]
    if worst_micros:
        worst = both(sum(worst_micros.values()), plan.rate, plan.currency)
        lines.append(f"may still bill: {', '.join(worst_micros)}; in the worst case {worst} by now")
    lines += [quality] if (quality := _quality(run)) else []
    lines += [_short(text) for text in (message, hint) if text]
    after = "down" if state == "unconfirmed" else "report"
    lines.append(f"kdcloud {after} {run.id}")
    title = f"{run.id} {TITLES.get(state, state)}"
    return Word((), title, "\n".join(lines), urgent=state == "unconfirmed")


def _quality(run: Run) -> str:
    """`student 61.7 % right, before 0.0 %, teacher 99.9 %`, where it was measured."""
    for done in run.done.values():
        found = done["result"].get("quality") or {}
        names = {"student": "student", "student_before": "before", "teacher": "teacher"}
        told = [f"{word} {found[role]['accuracy']['mean']:.1%}" for role, word in names.items() if found.get(role)]
        if told:
            return "right answers: " + ", ".join(told)
    return ""


def _short(text: str) -> str:
    plain = printable(text)
    return plain if len(plain) <= LONGEST else plain[: LONGEST - 1] + "…"


def printable(text: str) -> str:
    """In one line: what machines and providers say may hold anything."""
    return "".join(char if char.isprintable() else " " for char in text)


def note(words: Sequence[Word]) -> dict[str, Any]:
    """The data of the ledger's entry."""
    return {"keys": [key for word in words for key in word.keys]}
