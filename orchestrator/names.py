"""Names of runs and machines: who owns it, which run and stage, and by when it must be gone, readable from the name."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime

from orchestrator.provision import MAX_NAME, NAME_PREFIX

ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
_NAME = re.compile(r"^kd-([a-z0-9]{6})-([a-z0-9]{6})-([a-z0-9-]+)-([a-z0-9]{6,7})$")


@dataclass(frozen=True)
class MachineName:
    owner: str
    run6: str
    stage: str
    deadline_at: datetime


def new_id(length: int = 6) -> str:
    """Random id of [a-z0-9], first a letter."""
    letters = ALPHABET[10:]
    return secrets.choice(letters) + "".join(secrets.choice(ALPHABET) for _ in range(length - 1))


def new_run_id(name: str) -> str:
    """`<recipe name>-<6 random>`; the last six characters go into machine names."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:24] or "run"
    return f"{slug}-{new_id()}"


def machine_name(owner: str, run: str, stage: str, deadline_at: datetime) -> str:
    """`kd-<owner6>-<run6>-<stage>-<deadline, base 36>`, at most 35 characters; a long stage name is cut."""
    tail = base36(int(deadline_at.timestamp()))
    room = MAX_NAME - len(NAME_PREFIX) - 6 - 1 - 6 - 1 - 1 - len(tail)
    return f"{NAME_PREFIX}{owner}-{run[-6:]}-{stage[:room].rstrip('-')}-{tail}"


def parse_machine_name(name: str) -> MachineName | None:
    """The parts of a machine name; None when it is not one of ours."""
    match = _NAME.match(name)
    if match is None:
        return None
    owner, run6, stage, tail = match.groups()
    return MachineName(owner, run6, stage, datetime.fromtimestamp(int(tail, 36), UTC))


def base36(number: int) -> str:
    digits = ""
    while number:
        number, rest = divmod(number, 36)
        digits = ALPHABET[rest] + digits
    return digits or "0"
