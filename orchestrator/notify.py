"""How do words reach somebody who is not at the terminal? By the addresses of config.yaml or KDCLOUD_NOTIFY.

Apprise knows webhooks, mail and some hundred services. Their addresses hold passwords: none of them, and no error text
of a library, is ever printed, logged or written down. Sending never holds anything up and never stops anything.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from orchestrator import words
from orchestrator.clock import Clock
from orchestrator.errors import UsageError
from orchestrator.ledger import Ledger
from orchestrator.plan import Plan
from orchestrator.words import Word
from tasks.contract import install_hint

Say = Callable[[str, str | None, str], None]
ENV = "KDCLOUD_NOTIFY"  # addresses with spaces between them; they count instead of those in config.yaml
LAST_WORDS_S = 10.0  # at the end the client waits so long for what is still on its way


def addresses(configured: Sequence[str], env: Mapping[str, str]) -> tuple[str, ...]:
    """Where words go."""
    return tuple(env[ENV].split()) if ENV in env else tuple(configured)


class Sender:
    """Sends in the background, a thread for each address: one that hangs keeps no other waiting."""

    def __init__(self, urls: Sequence[str], warn: Callable[[str], None]) -> None:
        self._lines = [_Line(url, f"{_kind(url)} ({n} of {len(urls)})") for n, url in enumerate(urls, 1)]
        self._warn = warn
        self._warned = False

    def send(self, word: Word) -> None:
        """Returns at once."""
        for line in self._lines:
            line.put(word)
        self.look()

    def look(self) -> None:
        """Says once if something does not arrive."""
        troubles = [line.trouble for line in self._lines if line.trouble]
        if troubles and not self._warned:
            self._warned = True
            self._warn(f"words are not told everywhere: {'; '.join(troubles)}; `kdcloud notify --test` tries it")

    def close(self, limit_s: float = LAST_WORDS_S) -> None:
        """Waits for what is on its way, but no longer than this."""
        end = time.monotonic() + limit_s
        for line in self._lines:
            line.no_more()
        for line in self._lines:
            line.finish(end - time.monotonic())
        self.look()

    def outcomes(self) -> dict[str, str]:
        """What became of it, by address as it may be shown; "" is good."""
        return {line.name: line.trouble for line in self._lines}


class _Line:
    """One address, its thread, and what waits for it."""

    def __init__(self, url: str, name: str) -> None:
        self.name, self.trouble = name, ""
        self._url = url
        self._waiting: queue.SimpleQueue[Word | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, word: Word) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True, name="notify")
            self._thread.start()
        self._waiting.put(word)

    def no_more(self) -> None:
        """Its thread ends after what waits."""
        self._waiting.put(None)

    def finish(self, limit_s: float) -> None:
        if self._thread is None:
            return
        self._thread.join(max(0.0, limit_s))
        if self._thread.is_alive():
            self.trouble = f"{self.name} did not answer in time"

    def _work(self) -> None:
        while (word := self._waiting.get()) is not None:
            why = _deliver(self._url, word)
            self.trouble = f"{self.name} {why}" if why else self.trouble


def _deliver(url: str, word: Word) -> str:
    """Why it did not arrive, or nothing. No library's own words: they may hold the address."""
    if find_spec("apprise") is None:
        return f"needs Apprise, which is not installed: {install_hint('notify')}"
    try:
        service = _service(url)
        if service is None:
            return "is not an address that Apprise knows"
        kind = "warning" if word.urgent else "info"
        arrived = service.notify(title=f"kdcloud: {word.title}", body=word.text, notify_type=kind, body_format="text")
    except Exception as error:  # noqa: BLE001 - whatever a service does, a run goes on
        return f"failed ({type(error).__name__})"
    return "" if arrived else "did not take it"


def _service(url: str) -> Any:
    """Apprise with this address, its logs turned off; None for one that it does not know."""
    import apprise

    for name in ("apprise", "requests", "urllib3.connectionpool"):  # they name addresses in full
        log = logging.getLogger(name)
        log.setLevel(logging.CRITICAL + 1)
        log.propagate = False
    service = apprise.Apprise()
    return service if service.add(url) else None


def _kind(url: str) -> str:
    """`json` of json://user:password@host: what may be shown of an address."""
    scheme, mark, _ = url.partition("://")
    known = mark and len(scheme) <= 20 and scheme.replace("+", "").replace("-", "").isalnum()
    return scheme if known else "an address"


class Teller:
    """What one client tells of one run: on the terminal through `say`, elsewhere through a Sender."""

    def __init__(self, ledger: Ledger, run_id: str, plan: Plan, clock: Clock, say: Say, urls: Sequence[str]) -> None:
        self._ledger, self._run_id, self._plan, self._clock, self._say = ledger, run_id, plan, clock, say
        self._sender = Sender(urls, lambda text: say("warn", None, text))
        self._told: set[str] = set()  # by this client: where the ledger cannot be written nothing is said twice either

    def look(self, spending_micros: int) -> None:
        """Tells what is due by now."""
        run = self._ledger.run(self._run_id)
        before = self._told | words.told(run)
        found = words.due(run, self._plan, spending_micros=spending_micros, before=before)
        self._sender.look()
        if not found:
            return
        self._told |= {key for word in found for key in word.keys}
        try:  # before it is told: rather not at all than twice
            self._ledger.note(self._run_id, words.TOLD, self._clock.mark().wall, data=words.note(found))
        except UsageError as error:
            self._say("warn", None, error.message)
        for word in found:
            self._say("warn" if word.urgent else "word", None, word.line())
            self._sender.send(word)

    def end(self, state: str, message: str, hint: str, worst_micros: Mapping[str, int]) -> None:
        """Tells how it ended; the terminal has the report."""
        run = self._ledger.run(self._run_id)
        self._sender.send(
            words.ended(run, self._plan, state=state, message=message, hint=hint, worst_micros=worst_micros)
        )

    def close(self) -> None:
        """Lets the last words arrive, for a bounded time."""
        self._sender.close()


def trial() -> Word:
    """What `kdcloud notify --test` sends."""
    return Word((), "this is a test", "kdcloud reaches you here. Nothing was started and nothing is running.")
