"""What do the entries of a ledger tell a person? One sentence each, or nothing. Pure."""

from __future__ import annotations

from orchestrator.ledger import Entry
from orchestrator.money import human_seconds, shown
from orchestrator.plan import Plan
from orchestrator.runner import offer_from_dict, place


def news_of(entry: Entry, plan: Plan) -> tuple[str, str] | None:
    """(kind, text) as a View takes them; None for entries that only a program reads."""
    data = entry.data
    match entry.kind:
        case "reserve":
            attempt = int(data.get("attempt", 1))
            return "start", f"{f'attempt {attempt} ' if attempt > 1 else ''}on {place(offer_from_dict(data['offer']))}"
        case "up" if data.get("landed"):
            offer = offer_from_dict(data["landed"])
            return None if offer.infra == "local" else ("up", f"{place(offer)} is up")
        case "gate" if "forecast" in data:
            whole, cost = human_seconds(data["forecast"]["hours"] * 3600), data["forecast"]["cost_micros"]
            return "gate", f"at its speed it takes {whole}, {shown(cost, plan.rate, plan.currency)}"
        case "limit":
            return "warn", f"the money would not last: by on_shortfall it ends at {data['limit']:.0f}"
        case "short":
            return "warn", str(data["short"]["message"])
        case "stop" if data.get("why") not in (None, "its work is done"):
            return "stop", f"ending the machine: {data['why']}"
        case "gone":
            return "gone", f"its machine is gone; {shown(entry.micros, plan.rate, plan.currency)}"
        case "late":
            return (
                "warn",
                f"a machine cost more than it was settled at: {shown(entry.micros, plan.rate, plan.currency)}",
            )
        case "stage_done":
            return "done", "done"
        case "resumed":
            return "start", "a client goes on with the run"
        case "stop_requested":
            return "stop", "the run was asked to stop"
        case "ended":
            return "done" if data["state"] == "done" else "stop", ": ".join(
                part for part in (str(data["state"]), str(data.get("message", ""))) if part
            )
    return None
