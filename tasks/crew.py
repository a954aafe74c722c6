"""How do the processes of one machine share out a stage's parts? By files: each part is done whole by one of them.

Rank 0 leads. It alone talks to the bucket; the others hand their parts in through a folder of this launch, so nothing
of an earlier one is ever taken for theirs. Whatever a part holds does not depend on who made it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tasks.peers import LAUNCHED_ENV, rank_of, size_of
from tasks.stage import Context, Stopped, write_text

STOP, PARTIAL = "stop", "partial-"
POLL_S, SAID_EVERY_S = 0.1, 0.5


class Crew:
    """As one of its processes sees it. `engines`: how many of them write answers, each with `cards` GPUs."""

    def __init__(self, folder: Path, rank: int = 0, size: int = 1, cards: int = 1) -> None:
        self.folder, self.rank, self.size, self.cards = folder, rank, size, cards
        self.engines = max(1, size // cards)
        self._told_at, self._others = 0.0, 0.0
        self._told: dict[str, Any] = {}
        if size > 1:
            folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def of(ctx: Context, cards: int = 1, env: Mapping[str, str] = os.environ) -> Crew:
        """Of the processes that torchrun started here; on several nodes the leader works alone."""
        rank, size = rank_of(env), size_of(env)
        if size == 1 or env.get("LOCAL_WORLD_SIZE", str(size)) != str(size):
            return Crew(ctx.work, rank, cards=cards)
        root = ctx.work if rank == 0 else ctx.work.parent.parent  # of a follower: WORK/rank-N/work
        return Crew(root / f"crew-{env.get(LAUNCHED_ENV, 'one')}", rank, size, cards)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def writes(self, part: int) -> bool:
        """Whether this process writes the answers of a part."""
        return self.rank % self.cards == 0 and part % self.engines == self.rank // self.cards

    def scores(self, part: int) -> bool:
        """Whether this process looks through a part that is written."""
        return part % self.size == self.rank

    # --- what they tell each other

    def hand_in(self, name: str, write: Callable[[Path], object]) -> None:
        """Makes `name` there for all at once, as `write` leaves it."""
        making = self.folder / f".{name}-{self.rank}"
        write(making)
        making.replace(self.folder / name)

    def there(self, name: str) -> Path | None:
        path = self.folder / name
        return path if path.exists() else None

    def say(self, name: str, told: Any) -> None:
        self.hand_in(name, lambda path: path.write_text(json.dumps(told)))

    def say_anew(self, name: str, told: Any) -> None:
        """`say`, but where nothing changed or nobody listens."""
        if self.size > 1 and self._told.get(name) != told:
            self._told[name] = told
            self.say(name, told)

    def heard(self, name: str, meanwhile: Callable[[], None]) -> Any:
        """What was said under `name`, waited for. Raises Stopped where the leader stops."""
        while (path := self.there(name)) is None:
            meanwhile()
            self.stop_if_told()
            time.sleep(POLL_S)
        return json.loads(path.read_text())

    def stop(self) -> None:
        """The leader's word to the others; each saves what it has and leaves."""
        if self.size > 1:
            self.say(STOP, True)

    def stop_if_told(self) -> None:
        if self.size > 1 and not self.leads and self.there(STOP) is not None:
            raise Stopped

    def left(self) -> bool:
        """Whether all others said that they leave."""
        return all(self.there(f"left-{rank}") is not None for rank in range(1, self.size))

    # --- how far they are

    def done(self, phase: str, mine: float) -> float:
        """Parts done by all of them, where this process did `mine`: what a follower says itself counts for it alone."""
        if self.size == 1:
            return mine
        now = time.monotonic()
        if now - self._told_at >= SAID_EVERY_S:
            self._told_at = now
            if self.leads:
                found = (self._said_done(phase, rank) for rank in range(1, self.size))
                self._others = max(self._others, sum(found))
            else:
                write_text(self.folder / f"{phase}-{self.rank}", json.dumps(mine))
        return mine + self._others if self.leads else mine

    def new_phase(self) -> None:
        self._told_at, self._others = 0.0, 0.0

    def _said_done(self, phase: str, rank: int) -> float:
        with suppress(OSError, ValueError):
            return float(json.loads((self.folder / f"{phase}-{rank}").read_text()))
        return 0.0
