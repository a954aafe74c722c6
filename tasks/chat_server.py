"""A model behind the few calls of OpenAI's interface that a chat needs: transformers, one answer at a time, loopback.

    python -m tasks.chat_server ORDERS.json        # place, port, key, name, trust_remote_code

For machines without vLLM. Orders come in a file that only its owner can read, and whoever asks must know the key.
"""

from __future__ import annotations

import hmac
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

HOST = "127.0.0.1"
LONGEST_BODY = 4 << 20
MAX_TOKENS = 1024  # where the question names none


class Answers(Protocol):
    """A model: pieces of its answer to a conversation, as they come."""

    def __call__(
        self, messages: list[dict[str, str]], *, max_tokens: int, temperature: float, top_p: float
    ) -> Iterator[str]: ...


class Student:
    """A model of transformers, on the GPU where there is one."""

    def __init__(self, place: str, *, trust_remote_code: bool) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        self._model = AutoModelForCausalLM.from_pretrained(
            place, trust_remote_code=trust_remote_code, use_safetensors=True, dtype=dtype
        ).to("cuda" if torch.cuda.is_available() else "cpu")
        self._one = threading.Lock()

    def __call__(
        self, messages: list[dict[str, str]], *, max_tokens: int, temperature: float, top_p: float
    ) -> Iterator[str]:
        from transformers import TextIteratorStreamer

        inputs = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self._model.device)
        streamer = TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        how: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            how = {"do_sample": True, "temperature": temperature, "top_p": top_p}
        with self._one:
            work = threading.Thread(
                target=self._model.generate, daemon=True,
                kwargs={**inputs, **how, "streamer": streamer, "max_new_tokens": max_tokens},
            )  # fmt: skip
            work.start()
            yield from streamer
            work.join()


def serve(answers: Answers, *, port: int, key: str, name: str) -> ThreadingHTTPServer:
    """The server, listening; call `serve_forever`. Port 0: any that is free."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self._may() and self._is("/v1/models"):
                self._send({"object": "list", "data": [{"id": name, "object": "model", "owned_by": "kdcloud"}]})

        def do_POST(self) -> None:
            if not (self._may() and self._is("/v1/chat/completions")):
                return
            try:
                size = int(self.headers.get("Content-Length", "0"))
                asked = question_of(json.loads(self.rfile.read(min(size, LONGEST_BODY))))
            except (ValueError, TypeError, KeyError) as error:
                self._send({"error": {"message": f"not understood: {error!r}"}}, 400)
                return
            pieces = answers(**asked.how)
            if asked.stream:
                self._stream(pieces)
            else:
                text = "".join(pieces)
                message = {"role": "assistant", "content": text}
                self._send(envelope(name, [{"index": 0, "message": message, "finish_reason": "stop"}]))

        def _may(self) -> bool:
            known = hmac.compare_digest(self.headers.get("Authorization", "").encode(), f"Bearer {key}".encode())
            if not known:
                self._send({"error": {"message": "this server asks for its key"}}, 401)
            return known

        def _is(self, path: str) -> bool:
            if self.path.partition("?")[0] != path:
                self._send({"error": {"message": "there is nothing here"}}, 404)
                return False
            return True

        def _send(self, document: Mapping[str, Any], status: int = 200) -> None:
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data)
            self.close_connection = True

        def _stream(self, pieces: Iterator[str]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            for piece in pieces:
                delta = {"index": 0, "delta": {"role": "assistant", "content": piece}, "finish_reason": None}
                self._event(envelope(name, [delta], "chat.completion.chunk"))
            self._event(envelope(name, [{"index": 0, "delta": {}, "finish_reason": "stop"}], "chat.completion.chunk"))
            self.wfile.write(b"data: [DONE]\n\n")
            self.close_connection = True

        def _event(self, document: Mapping[str, Any]) -> None:
            self.wfile.write(b"data: " + json.dumps(document).encode() + b"\n\n")
            self.wfile.flush()

        def log_message(self, format: str, *args: object) -> None:
            """What people ask is written nowhere."""

    return ThreadingHTTPServer((HOST, port), Handler)


class Question:
    """What is asked, with OpenAI's defaults."""

    def __init__(self, how: dict[str, Any], stream: bool) -> None:
        self.how, self.stream = how, stream


def question_of(raw: Mapping[str, Any]) -> Question:
    """Raises ValueError, TypeError or KeyError for what is none."""
    messages = [{"role": str(one["role"]), "content": text_of(one["content"])} for one in raw["messages"]]
    if not messages:
        raise ValueError("no messages")
    most = raw.get("max_completion_tokens") or raw.get("max_tokens") or MAX_TOKENS
    given, share = raw.get("temperature"), raw.get("top_p")
    how = {
        "messages": messages, "max_tokens": int(most), "temperature": 1.0 if given is None else float(given),
        "top_p": 1.0 if share is None else float(share),
    }  # fmt: skip
    return Question(how, bool(raw.get("stream")))


def text_of(content: Any) -> str:
    """A message's words: a string, or parts of which the texts count."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text")


def envelope(name: str, choices: list[dict[str, Any]], kind: str = "chat.completion") -> dict[str, Any]:
    return {"id": "chat", "object": kind, "created": int(time.time()), "model": name, "choices": choices}


def main() -> None:
    orders = json.loads(Path(sys.argv[1]).read_text())
    student = Student(orders["place"], trust_remote_code=bool(orders["trust_remote_code"]))
    with serve(student, port=int(orders["port"]), key=orders["key"], name=orders["name"]) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
