"""Is this answer right? Reads what stands after `</think>` only, and never executes anything a model wrote.

Run as a script (`--child`) it is the process in which math-verify parses, with limits on time and memory.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from importlib.util import find_spec
from pathlib import Path

KINDS = ("exact", "math", "text", "none")
_MATH_TIMEOUT_S = 10.0
_MATH_START_S = 60.0  # the child's first answer includes its imports
_MATH_MEMORY_BYTES = 4 << 30
_MAX_MATH_CHARS = 20_000
_BOXED = "\\boxed{"
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)?\.?\d+(?:[eE][-+]?\d{1,4})?")


@dataclass(frozen=True)
class Verdict:
    ok: bool
    reason: str  # ok | no_answer | wrong | too_short | repetitive | ... ; short, countable


def check(kind: str, output_text: str, answer: str | None, *, thinking: bool = False) -> Verdict:
    """Whether `output_text` answers with `answer`. Raises ValueError for an unknown kind.

    `thinking`: the prompt ended inside an opened `<think>`, so an answer needs a `</think>` before it.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of check {kind!r}, use one of {', '.join(KINDS)}")
    if kind == "none":
        return Verdict(True, "ok")
    said = answer_part(output_text, thinking=thinking)
    if said is None:
        return Verdict(False, "no_answer")
    if kind == "text":
        return _text(output_text, said)
    if answer is None:
        return Verdict(False, "no_reference")
    if kind == "exact":
        return _verdict(_plain(said) == _plain(answer))
    if len(said) > _MAX_MATH_CHARS:
        return Verdict(False, "too_long")
    if math_verify_installed():
        return _child().check(said, answer)
    return _verdict(_same_value(said, answer))


def answer_part(text: str, *, thinking: bool = False) -> str | None:
    """What stands after the last `</think>`, stripped; None when the thinking never ended or nothing follows it."""
    _, mark, after = text.rpartition("</think>")
    if not mark and (thinking or "<think>" in text):
        return None
    return after.strip() or None


def math_verify_installed() -> bool:
    return find_spec("math_verify") is not None


def note(kind: str) -> str | None:
    """What the reader of a result should know about how answers were checked."""
    if kind == "math" and not math_verify_installed():
        return "math-verify is not installed: answers were compared by exact rules (last number or \\boxed)"
    return None


def _verdict(ok: bool) -> Verdict:
    return Verdict(ok, "ok" if ok else "wrong")


# --- exact rules -----------------------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    return " ".join(text.split())


def _same_value(said: str, answer: str) -> bool:
    """The last \\boxed content or else the last number of `said` against the same of `answer`."""
    left, right = _final(said), _final(answer)
    try:
        return Decimal(left.replace(",", "")) == Decimal(right.replace(",", ""))
    except InvalidOperation:
        return _plain(left) == _plain(right)


def _final(text: str) -> str:
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip().strip("$").strip()
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else text.strip()


def _last_boxed(text: str) -> str | None:
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    depth = 1
    for at in range(start + len(_BOXED), len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start + len(_BOXED) : at]
    return None


# --- loops -----------------------------------------------------------------------------------------------------------

_LEAST_ROUNDS = 4  # tables and lists say the same thing two or three times
_LEAST_LOOP = 16  # tokens: "0000" may be an answer
_LONGEST_PERIOD = 512  # tokens: a few paragraphs; longer ones cost more to look for than they are met


def loops(ids: Sequence[int]) -> bool:
    """Whether the answer ends in one run of tokens over and over: at least a third of it, and four rounds.

    Each period is tried from the end back, as far as every token is that of one period before.
    """
    least = max(_LEAST_LOOP, len(ids) // 3)
    for period in range(1, min(_LONGEST_PERIOD, len(ids) // _LEAST_ROUNDS) + 1):
        same = 0
        while same < len(ids) - period and ids[-1 - same] == ids[-1 - same - period]:
            same += 1
            if same + period >= max(least, _LEAST_ROUNDS * period):
                return True
    return False


# --- free text -------------------------------------------------------------------------------------------------------

_MIN_WORDS = 3
_MAX_CHARS = 100_000
_MIN_REPEAT_WORDS = 24  # shorter answers cannot loop
_MAX_REPEATED = 0.3  # share of five-word runs that were there before
_MAX_FOREIGN = 0.3  # share of letters outside the answer's main script
_MAX_UNREADABLE = 0.02


def _text(whole: str, said: str) -> Verdict:
    """Length, repetition (also within the thinking) and language."""
    units = _units(said)
    if len(units) < _MIN_WORDS:
        return Verdict(False, "too_short")
    if len(whole) > _MAX_CHARS:
        return Verdict(False, "too_long")
    if _repeated(_units(whole)) > _MAX_REPEATED or _repeated(units) > _MAX_REPEATED:
        return Verdict(False, "repetitive")
    unreadable = sum(c == "\ufffd" or (unicodedata.category(c) == "Cc" and c not in "\n\r\t") for c in said)
    if unreadable > _MAX_UNREADABLE * len(said):
        return Verdict(False, "unreadable")
    scripts = Counter(_script(c) for c in said if c.isalpha())
    if scripts and 1 - scripts.most_common(1)[0][1] / scripts.total() > _MAX_FOREIGN:
        return Verdict(False, "mixed_language")
    return Verdict(True, "ok")


def _units(text: str) -> list[str]:
    """Words; each character of a script that writes without spaces counts as one."""
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+", text)


def _repeated(units: list[str], n: int = 5) -> float:
    """Share of runs of n units that occurred earlier in the text."""
    if len(units) < _MIN_REPEAT_WORDS:
        return 0.0
    runs = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
    return 1 - len(set(runs)) / len(runs)


def _script(char: str) -> str:
    name = unicodedata.name(char, "").split(" ")[0].split("-")[0]
    return "CJK" if name in ("CJK", "HIRAGANA", "KATAKANA") else name


# --- math, in a child ------------------------------------------------------------------------------------------------


class _Child:
    """A process that parses and compares; it is killed and made anew when it takes too long or dies."""

    def __init__(self, *, timeout_s: float = _MATH_TIMEOUT_S, memory_bytes: int = _MATH_MEMORY_BYTES) -> None:
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._process: subprocess.Popen[str] | None = None

    def check(self, said: str, answer: str) -> Verdict:
        if self._process is None or self._process.poll() is not None:
            self._start()
        process = self._process
        assert process is not None and process.stdin is not None
        try:
            process.stdin.write(json.dumps([said, answer]) + "\n")
            process.stdin.flush()
            reply = self._line(self._timeout_s)
        except BrokenPipeError:
            reply = ""
        if not reply:
            timed_out = process.poll() is None
            self.close()
            return Verdict(False, "check_timed_out" if timed_out else "check_died")
        return _verdict(json.loads(reply))

    def _start(self) -> None:
        # -P keeps this folder off sys.path: names such as data or label must not shadow packages.
        argv = [sys.executable, "-P", str(Path(__file__).resolve()), "--child", str(self._memory_bytes)]
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._line(_MATH_START_S)

    def _line(self, timeout_s: float) -> str:
        """One line of the child; empty when none came in time or the child is gone."""
        assert self._process is not None and self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            return self._process.stdout.readline() if selector.select(timeout_s) else ""

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()
            self._process = None


_CHILD: list[_Child] = []


def _child() -> _Child:
    if not _CHILD:
        _CHILD.append(_Child())
    return _CHILD[0]


_FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.remove", "os.rename", "subprocess.", "socket.")


def _refuse(event: str, args: tuple[object, ...]) -> None:
    """An audit hook: comparing needs no process, no network and no file to write."""
    writes = event == "open" and len(args) > 2 and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    if writes or event.startswith(_FORBIDDEN):
        raise PermissionError(event)


def _serve(memory_bytes: int) -> None:
    """The child's loop: a line with [said, answer] in, a line with true or false out."""
    import resource

    from math_verify import parse, verify

    out, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no reply
    if sys.platform != "darwin":  # macOS refuses to lower the address space
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    sys.addaudithook(_refuse)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        said, answer = json.loads(line)
        # Should the parent die while this hangs: the process ends by itself once it burnt twice the time it has.
        used = resource.getrusage(resource.RUSAGE_SELF)
        most = int(used.ru_utime + used.ru_stime + 2 * _MATH_TIMEOUT_S) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))
        try:
            same = verify(parse(f"${answer}$" if "$" not in answer else answer), parse(said))
        except (ValueError, TypeError, ArithmeticError, AttributeError, RecursionError, MemoryError, PermissionError):
            same = False
        print(json.dumps(bool(same)), file=out, flush=True)


if __name__ == "__main__" and sys.argv[1:2] == ["--child"]:
    _serve(int(sys.argv[2]))
