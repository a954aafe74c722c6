"""How does Ollama talk to the student? A Modelfile with the chat template in Go's language, stops and sampling.

The template is taken apart by what it renders: pieces before and after each text, put together again and compared with
the template itself over several conversations. Where that fails the Modelfile has no TEMPLATE, and says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from tasks.gguf_file import template_of

Messages = Sequence[Mapping[str, str]]

_OPEN, _CLOSE = "<think>", "</think>"
_SYSTEM, _ASKED, _SAID, _AGAIN = "kdcloud:system", "kdcloud:asked", "kdcloud:said", "kdcloud:again"
_SHORT = (("user", _ASKED), ("assistant", _SAID), ("user", _AGAIN))
_DATES = re.compile(r"strftime_now|date_string")
_QUOTES = '"""'  # what ends a text in a Modelfile


@dataclass(frozen=True)
class Turns:
    """A chat template as pieces of text."""

    begin: str  # where no system message is given
    system: tuple[str, str] | None  # around a system message, from the beginning on; None = the template takes none
    user: tuple[str, str]
    assistant: tuple[str, str]  # around an answer in the past, without its thinking
    prompt: str  # what asks for an answer

    def render(self, messages: Messages) -> str:
        """The conversation's text, up to where the answer begins, as the Go template makes it."""
        first, *_ = messages
        has_system = first["role"] == "system" and self.system is not None
        text = self.begin
        if has_system and self.system is not None:
            text = self.system[0] + first["content"] + self.system[1]
        for message in messages[has_system:]:
            before, after = self.user if message["role"] == "user" else self.assistant
            text += before + message["content"] + after
        return text + self.prompt


def turns_of(tokenizer: PreTrainedTokenizerBase) -> Turns | None:
    """The template's pieces; None where it does not come apart into such ones."""
    if template_of(tokenizer) is None:
        return None
    try:
        turns = _taken_apart(tokenizer)
        good = all(turns.render(told) == _rendered(tokenizer, told) for told in _conversations(turns))
    except (TemplateError, ValueError, TypeError, KeyError):
        return None
    return turns if good else None


def knows_thoughts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether its template does."""
    return _OPEN in (template_of(tokenizer) or "")


def modelfile(
    tokenizer: PreTrainedTokenizerBase, file: str, *, add_bos: bool, stops: Iterable[str], context: int,
    temperature: float, top_p: float | None, thinks: bool,
) -> str:  # fmt: skip
    """The text of a Modelfile beside the GGUF `file`. `thinks`: its answers begin with thoughts."""
    turns, own = turns_of(tokenizer), template_of(tokenizer)
    begins = _begin(tokenizer, add_bos)
    template = None if turns is None else go_template(turns, begins=begins, thinks=thinks)
    lines = ["# ollama create student -f Modelfile && ollama run student", f"FROM ./{file}", ""]
    if own is None:
        lines += ["# The student has no chat template: Ollama hands a question over as it is, to be gone on with."]
    elif template is None:
        lines += [
            "# The student's own chat template has no equal in Ollama's language. The GGUF file holds it as it is:",
            "# llama.cpp uses it (llama-server --jinja), and Ollama guesses one from it, or takes one written here.",
        ]
    else:
        if _DATES.search(own):
            lines.append("# The student's own template tells the day: here it stays the one of this export.")
        lines.append(f"TEMPLATE {_QUOTES}{template}{_QUOTES}")
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys(stops) if _quotable(stop)]
    lines.append(f"PARAMETER temperature {temperature:g}")
    if temperature:
        lines.append("PARAMETER top_k 0")  # else Ollama draws from the 40 likeliest only
    if top_p is not None:
        lines.append(f"PARAMETER top_p {top_p:g}")
    lines.append("PARAMETER repeat_penalty 1")  # else Ollama, before late 2026, holds 1.1 against digits said again
    lines.append(f"PARAMETER num_ctx {context}")
    return "\n".join(lines) + "\n"


def go_template(turns: Turns, *, begins: str = "", thinks: bool = False) -> str | None:
    """TEMPLATE of a Modelfile; None where a piece cannot stand in one. `begins`: what Ollama itself puts before it."""
    system, begin = turns.system, turns.begin
    if begins:
        if not begin.startswith(begins) or (system is not None and not system[0].startswith(begins)):
            return None
        begin = begin.removeprefix(begins)
        system = None if system is None else (system[0].removeprefix(begins), system[1])
    if not all(map(_plain, (begin, *(system or ()), *turns.user, *turns.assistant, turns.prompt))):
        return None
    head = begin
    if system is not None:
        otherwise = f"{{{{ else }}}}{begin}" if begin else ""
        head = f"{{{{ if .System }}}}{system[0]}{{{{ .System }}}}{system[1]}{otherwise}{{{{ end }}}}"
    # Past thoughts stay out; one is shown where its answer is to be gone on with. By finding .Thinking here Ollama
    # knows that this model thinks, and between which marks.
    thought = f"{{{{ if and $last .Thinking }}}}{_OPEN}\n{{{{ .Thinking }}}}\n{_CLOSE}\n\n{{{{ end }}}}"
    user = f"{turns.user[0]}{{{{ .Content }}}}{turns.user[1]}"
    said = f"{turns.assistant[0]}{thought if thinks else ''}{{{{ .Content }}}}"
    after = f"{{{{ if not $last }}}}{turns.assistant[1]}{{{{ end }}}}" if turns.assistant[1] else ""
    return (  # one line but for the template's own: no blank may slip in
        f"{head}{{{{ range $i, $_ := .Messages }}}}{{{{ $last := eq (len (slice $.Messages $i)) 1 }}}}"
        f'{{{{ if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}{said}{after}{{{{ end }}}}'
        f'{{{{ if and $last (ne .Role "assistant") }}}}{turns.prompt}{{{{ end }}}}{{{{ end }}}}'
    )


def _taken_apart(tokenizer: PreTrainedTokenizerBase) -> Turns:
    """Raises ValueError, or whatever the template raises."""
    asked, said, again = ({"role": r, "content": c} for r, c in _SHORT)
    begin_user, user_prompt = _split(_rendered(tokenizer, [asked]), _ASKED)
    _, user_end = _split(_rendered(tokenizer, [asked], ask=False), _ASKED)
    _, said_end = _split(_rendered(tokenizer, [asked, said], ask=False), _SAID)
    _, rest = _split(_rendered(tokenizer, [asked, said, again]), _ASKED)
    said_begin, rest = _split(rest, _SAID)
    between, _ = _split(rest, _AGAIN)
    user_begin = _without(between, said_end)
    begin = begin_user.removesuffix(user_begin)
    prompt, said_begin = _without(user_prompt, user_end), _without(said_begin, user_end)
    return Turns(begin, _system(tokenizer, user_begin), (user_begin, user_end), (said_begin, said_end), prompt)


def _system(tokenizer: PreTrainedTokenizerBase, user_begin: str) -> tuple[str, str] | None:
    try:
        told = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _ASKED}]
        before, rest = _split(_rendered(tokenizer, told), _SYSTEM)
        between, _ = _split(rest, _ASKED)
    except (TemplateError, ValueError):
        return None  # it takes none, or leaves it out
    return (before, between.removesuffix(user_begin)) if between.endswith(user_begin) else None


def _split(text: str, mark: str) -> tuple[str, str]:
    """What stands before and after `mark`. Raises ValueError unless it is there once."""
    before, after = text.split(mark)
    return before, after


def _without(text: str, begin: str) -> str:
    if not text.startswith(begin):
        raise ValueError(f"{text!r} does not begin with {begin!r}")
    return text[len(begin) :]


def _rendered(tokenizer: PreTrainedTokenizerBase, told: Messages, *, ask: bool = True) -> str:
    return str(tokenizer.apply_chat_template(list(told), tokenize=False, add_generation_prompt=ask))


def _conversations(turns: Turns) -> Iterator[Messages]:
    """What the pieces are tried on: up to three questions, with a system message where there may be one."""
    texts = ["What is 12+34?", "46, isn't it?\n\nYes.", 'And "0x1f"\tin tens? 数', "31", "Thanks <b>&amp;</b>"]
    roles = ["user", "assistant"] * 3
    told = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    for count in (1, 3, 5):
        yield told[:count]
        if turns.system is not None:
            yield [{"role": "system", "content": "Answer briefly.\nBe kind."}, *told[:count]]


def _begin(tokenizer: PreTrainedTokenizerBase, add_bos: bool) -> str:
    return str(tokenizer.bos_token) if add_bos else ""


def _plain(text: str) -> bool:
    """Whether it may stand in a Modelfile and a Go template as it is."""
    return not any(mark in text for mark in ("{{", "}}", _QUOTES)) and all(
        char.isprintable() or char in "\n\t" for char in text
    )


def _quotable(text: str) -> bool:
    return bool(text) and _plain(text) and not any(char in text for char in '"\\\n\t')
