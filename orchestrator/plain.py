"""Text of models, machines and providers as a terminal shows it and never obeys it. Pure."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

_JOINER = "\u200d"  # holds pictures of several characters together


def printable(text: str) -> str:
    """What is no character to be seen, a blank, a tab or a line's end becomes `?`."""
    return "".join(c if c.isprintable() or c in "\n\t" + _JOINER or _is_blank(c) else "?" for c in text)


def _is_blank(char: str) -> bool:
    """Also the wide one of Chinese and Japanese."""
    return unicodedata.category(char) == "Zs"


def json_text(document: Any, *, indent: int | None = None) -> str:
    """JSON with letters as they are, and with every character that could steer a terminal as its \\u escape."""
    lines = json.dumps(document, indent=indent, ensure_ascii=False).split("\n")
    return "\n".join(line if line.isprintable() else "".join(map(_escaped, line)) for line in lines)


def _escaped(char: str) -> str:
    return char if char.isprintable() else json.dumps(char)[1:-1]
