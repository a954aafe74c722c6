"""Text of models, machines and providers as a terminal shows it and never obeys it. Pure."""

from __future__ import annotations

import json
import re
from typing import Any

_JOINER = "\u200d"  # holds pictures of several characters together
_BLANKS = re.compile(r"[^\S\x00-\x1f\x7f-\x9f\u2028\u2029]")  # also the wide one of Chinese and Japanese
_STEERING = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\xff\u0100-\U0010ffff]")


def printable(text: str) -> str:
    """What is no character to be seen, a blank, a tab or a line's end becomes `?`."""
    return "".join(c if c.isprintable() or c in "\n\t" + _JOINER or _BLANKS.match(c) else "?" for c in text)


def json_text(document: Any, *, indent: int | None = None) -> str:
    """JSON with letters as they are, and with every character that could steer a terminal as its \\u escape."""
    return _STEERING.sub(_escaped, json.dumps(document, indent=indent, ensure_ascii=False))


def _escaped(found: re.Match[str]) -> str:
    return found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1]
