"""What does a teacher behind an OpenAI-compatible API answer, and what has it cost? It stays below its limit.

Standard library only: HTTP, retries and the rate limit are thirty lines that need no package on the machine.
"""

from __future__ import annotations

import errno
import http.client
import json
import math
import os
import random
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from tasks.contract import ApiTeacher, TaskError
from tasks.stage import Stopped

MOST_BYTES = 64 << 20  # of one answer
LONGEST_WAIT_S = 300.0  # before the next attempt, whatever Retry-After says
GRACE_S = 10.0  # for answers that are on their way when a stop is asked for
MOST_TOP = 20  # top_logprobs that such APIs allow
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
UNREACHABLE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN})
UNBILLED = frozenset({429, 503})  # refused before any work; every other failure counts as paid in full
HINTS = {
    401: "check the key in {key}",
    403: "check the rights of the key in {key}",
    402: "pay in at the API's provider, and resume: what was answered is kept",
    404: "check base_url and model in the recipe",
}


@dataclass(frozen=True)
class Token:
    """A token of an answer as bytes, with the candidates for its place (bytes, log-probability), likeliest first."""

    text: bytes
    top: tuple[tuple[bytes, float], ...]


@dataclass(frozen=True)
class Answer:
    """One answer. `tokens` is None where the API gives no log-probabilities of the whole `content`."""

    content: str
    reasoning: str | None  # None where the API does not tell thinking and answer apart
    finish_reason: str
    tokens: tuple[Token, ...] | None


class _Again(Exception):
    """An attempt failed, and another may do better. `after_s` is what the server asks to wait."""

    def __init__(self, why: str, *, billed: bool = True, after_s: float | None = None) -> None:
        super().__init__(why)
        self.billed = billed
        self.after_s = after_s


class _Refused(TaskError):
    """The API took the request for a wrong one, and did no work."""


@dataclass
class Spent:
    """What was used so far, by every attempt of the stage. An attempt that was killed counts all it was `granted`."""

    micros: int = 0
    granted: int = 0  # written down before it is used: never less than what may have been spent
    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class Purse:
    """Counts money before it is spent; thread-safe. `save` must have written it down for good when it returns."""

    def __init__(self, limit_micros: int, before: Spent, save: Callable[[Spent], None], *, step_micros: int) -> None:
        self.spent = Spent(**{**asdict(before), "micros": max(before.micros, before.granted), "granted": 0})
        self.limit_micros = limit_micros
        self._step = step_micros  # granted at once: so much may count as spent that was not, after a kill
        self._save = save
        self._open = 0
        self._lock = threading.Lock()

    def take(self, micros: int) -> None:
        """Sets `micros` apart for one request. Raises TaskError where they could pass the limit."""
        with self._lock:
            needed = self.spent.micros + self._open + micros
            if needed > self.limit_micros:
                raise TaskError(
                    f"the API has cost up to {self.spent.micros + self._open} micro-USD, and the next answer could "
                    f"pass the {self.limit_micros} that were set apart for it",
                    hint="what was answered is kept: go on with `kdcloud run --resume RUN --budget MORE`",
                )
            if needed > self.spent.granted:
                granted = min(self.limit_micros, needed + self._step)
                self._save(replace(self.spent, granted=granted))  # raises where it is not written down
                self.spent.granted = granted
            self._open += micros

    def settle(self, taken: int, micros: int, *, input_tokens: int = 0, output_tokens: int = 0) -> None:
        """The request for which `taken` was set apart has ended, and cost `micros`."""
        with self._lock:
            self._open -= taken
            self.spent.micros += micros
            self.spent.calls += 1
            self.spent.input_tokens += input_tokens
            self.spent.output_tokens += output_tokens

    def close(self) -> None:
        """Gives back what was granted and not used."""
        with self._lock:
            self.spent.granted = self.spent.micros + self._open
            self._save(self.spent)


class Client:
    """Asks for answers, several at once. Raises TaskError for an address or a key that cannot work."""

    def __init__(
        self, api: ApiTeacher, purse: Purse, *, max_new_tokens: int, temperature: float, top_p: float, top: int
    ) -> None:
        check_url(api.base_url)
        self._api, self._purse = api, purse
        self._url = f"{api.base_url.rstrip('/')}/chat/completions"
        self._most_output = max_new_tokens
        self._body = {
            "model": api.model, api.limit_name: max_new_tokens, "temperature": temperature, "top_p": top_p,
            **({"logprobs": True, "top_logprobs": min(top, MOST_TOP)} if top else {}),
        }  # fmt: skip
        self._key = _key(api.key_env)
        handlers: list[Any] = [_NoRedirect]  # a redirect would carry the key elsewhere
        if urlsplit(api.base_url).scheme == "http":
            handlers.append(urllib.request.ProxyHandler({}))  # and so would a proxy: this is for this machine only
        self._opener = urllib.request.build_opener(*handlers)
        self._pace = threading.Lock()
        self._next_at = 0.0

    def answers(self, prompts: Sequence[str], stopping: Callable[[], bool]) -> Iterator[tuple[int, Answer]]:
        """(place in `prompts`, answer) as they come. On trouble what is on its way is still waited for, then raised.

        No more than max_parallel are asked ahead of what was taken: so many are lost when the process is killed.
        Raises Stopped, and TaskError when an answer cannot be had.
        """
        trouble: BaseException | None = None
        until, closing = math.inf, threading.Event()
        pool = ThreadPoolExecutor(self._api.max_parallel)
        ahead = iter(enumerate(prompts))
        places: dict[Future[Answer], int] = {}
        try:
            while time.monotonic() < until:
                while trouble is None and len(places) < self._api.max_parallel and (following := next(ahead, None)):
                    places[pool.submit(self._answer, following[1], closing)] = following[0]
                if not places:
                    break
                done, _ = wait(places, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    place, error = places.pop(future), future.exception()
                    if error is None:
                        yield place, future.result()
                    elif not isinstance(error, Stopped):
                        trouble = trouble or error
                if stopping():
                    trouble, until = trouble or Stopped(), min(until, time.monotonic() + GRACE_S)
                if trouble is not None:
                    closing.set()
        finally:
            closing.set()
            pool.shutdown(wait=False, cancel_futures=True)
        if trouble is not None:
            raise trouble

    def _answer(self, prompt: str, closing: threading.Event) -> Answer:
        try:
            return self._tried(prompt, closing)
        except TaskError:
            closing.set()  # here, so that this thread takes up no other question
            raise

    def _tried(self, prompt: str, closing: threading.Event) -> Answer:
        worst = self._api.most_micros(len(prompt.encode()), self._most_output)
        body = json.dumps({**self._body, "messages": [{"role": "user", "content": prompt}]}).encode()
        for attempt in range(1, self._api.attempts + 1):
            self._wait_turn(closing)
            self._purse.take(worst)
            paid = worst
            used = (0, 0)
            try:
                raw = self._post(body)
                answer, usage = _read(raw)
                used = usage or used
                if usage is not None:
                    paid = self._api.cost_micros(*usage)
                if paid > worst:
                    raise TaskError(
                        f"the API counted {used[0]} tokens of prompt and {used[1]} of answer: more than the limit of "
                        f"{self._most_output} allows",
                        hint="the API does not keep to the limit of new tokens: try `limit_name` in the recipe",
                    )
                return answer
            except _Refused:
                paid = 0
                raise
            except _Again as again:
                paid = worst if again.billed else 0
                if attempt == self._api.attempts:
                    raise TaskError(
                        f"the API gave no answer in {attempt} attempts; the last: {again}",
                        hint="resume later: what was answered is kept",
                    ) from None
                self._back_off(attempt, again.after_s, closing)
            finally:
                self._purse.settle(worst, paid, input_tokens=used[0], output_tokens=used[1])
        raise AssertionError("unreachable")

    def _wait_turn(self, closing: threading.Event) -> None:
        """Keeps to requests_per_minute. Raises Stopped when no request shall be sent any more."""
        per_minute = self._api.requests_per_minute
        with self._pace:
            now = time.monotonic()
            at = max(now, self._next_at)
            self._next_at = at + (60.0 / per_minute if per_minute else 0.0)
        if closing.wait(at - now) if at > now else closing.is_set():
            raise Stopped

    def _back_off(self, attempt: int, after_s: float | None, closing: threading.Event) -> None:
        """Waits 1, 2, 4 ... s (with chance, so that not all come back at once), or for as long as the server asks."""
        delay = 2.0 ** (attempt - 1) * random.uniform(0.5, 1.0)
        if after_s is not None:
            delay = max(0.0, after_s)
            with self._pace:  # it means everybody
                self._next_at = max(self._next_at, time.monotonic() + min(delay, LONGEST_WAIT_S))
        if closing.wait(min(delay, LONGEST_WAIT_S)):
            raise Stopped

    def _post(self, body: bytes) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "kdcloud"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, body, headers, method="POST")
        until = time.monotonic() + self._api.timeout_s
        try:
            with self._opener.open(request, timeout=self._api.timeout_s) as reply:
                data = bytearray()
                while chunk := reply.read1(1 << 16):
                    data += chunk
                    if len(data) > MOST_BYTES:
                        raise _Again("the answer is too large")
                    if time.monotonic() > until:
                        raise _Again(f"no whole answer in {self._api.timeout_s:g} s")
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from None
        except urllib.error.URLError as error:
            reason = error.reason
            unheard = isinstance(reason, (ConnectionRefusedError, socket.gaierror, ssl.SSLCertVerificationError))
            unheard = unheard or (isinstance(reason, OSError) and reason.errno in UNREACHABLE)
            raise _Again(f"no connection: {self._clean(str(reason))}", billed=not unheard) from None
        except (OSError, http.client.HTTPException) as error:
            raise _Again(f"the connection broke: {self._clean(str(error)) or type(error).__name__}") from None
        try:
            answer = json.loads(data)
        except ValueError:
            raise _Again("the answer is not JSON") from None
        if not isinstance(answer, dict):
            raise _Again("the answer is no object")
        return answer

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        if error.code in RETRIED or error.code >= 500:
            after = _retry_after_s(error.headers.get("Retry-After"))
            return _Again(f"status {error.code}", billed=error.code not in UNBILLED, after_s=after)
        # A 401 may repeat the key, or parts of it: what the server says then is not shown.
        told = "" if error.code in (401, 403) else _told(error)
        hint = HINTS.get(error.code, "check the teacher's `api` in the recipe: some APIs give no logprobs (top_k: 0)")
        return _Refused(
            f"the API refused with status {error.code}{': ' + self._clean(told) if told else ''}",
            hint=hint.format(key=self._api.key_env or "key_env"),
        )

    def _clean(self, text: str) -> str:
        """On one line, printable, without the key."""
        text = text.replace(self._key, "***") if self._key else text
        return "".join(c if c.isprintable() else " " for c in text)[:300]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def check_url(url: str) -> None:
    """Raises TaskError where a key would travel in the clear, or along with a password in the address."""
    parts = urlsplit(url)
    here = parts.hostname in ("localhost", "127.0.0.1", "::1")
    if not parts.hostname or parts.username or not (parts.scheme == "https" or (parts.scheme == "http" and here)):
        raise TaskError(f"base_url {url!r} cannot be used", hint="write it like https://api.example.com/v1")


def _key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not re.fullmatch(r"[\x21-\x7e]+", key):  # http.client would show a wrong one in its error
        raise TaskError(
            f"the environment variable {name} holds no key" + (" that can be sent" if key else ""),
            hint=f"export {name}=... before you start kdcloud, and resume",
        )
    return key


def _told(error: urllib.error.HTTPError) -> str:
    try:
        said = json.loads(error.read(1 << 16))
        found = said.get("error", said)
        return str(found.get("message", "")) if isinstance(found, dict) else str(found)
    except (OSError, ValueError, AttributeError, http.client.HTTPException):
        return ""


def _retry_after_s(text: str | None) -> float | None:
    """Seconds, from seconds or a date; None where neither stands there."""
    if text is None:
        return None
    try:
        seconds = float(text)
        return seconds if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        at = parsedate_to_datetime(text)
    except ValueError:
        return None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() - datetime.now(UTC).timestamp()


# --- reading an answer


def _read(raw: dict[str, Any]) -> tuple[Answer, tuple[int, int] | None]:
    """The answer and (input tokens, output tokens), None where the API does not count. Raises _Again."""
    try:
        choice = raw["choices"][0]
        message = choice["message"]
        content = message.get("content") or ""
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        if not isinstance(content, str) or not isinstance(reasoning, str | None):
            raise TypeError
        reason = str(choice.get("finish_reason") or "unknown")
        answer = Answer(content, reasoning or None, reason, _tokens(choice.get("logprobs"), content))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        raise _Again("the answer is not one of a chat") from None
    usage = raw["usage"] if isinstance(raw.get("usage"), dict) else {}
    asked, told = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if isinstance(asked, int) and isinstance(told, int) and asked >= 0 and told >= 0:
        return answer, (asked, told)
    return answer, None


def _tokens(logprobs: Any, content: str) -> tuple[Token, ...] | None:
    """The tokens with their candidates; None unless together they are `content`, and each has candidates."""
    rows = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not rows:
        return None
    tokens = []
    for row in rows:
        top = [(_bytes(one), float(one["logprob"])) for one in row.get("top_logprobs") or ()]
        top = [(text, value) for text, value in top if math.isfinite(value) and value > -1000.0]  # -9999 says unknown
        if not top:
            return None
        tokens.append(Token(_bytes(row), tuple(sorted(top, key=lambda one: -one[1]))))
    return tuple(tokens) if b"".join(token.text for token in tokens) == content.encode() else None


def _bytes(row: Any) -> bytes:
    return bytes(row["bytes"]) if row.get("bytes") is not None else str(row["token"]).encode()
