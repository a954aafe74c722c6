"""What does llama.cpp make of a GGUF file? Runs in .venv-export; a line of JSON in, a line of JSON out."""

from __future__ import annotations

import json
import sys

import llama_cpp
import numpy as np

F32 = 0  # ggml's number of the type


def main() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(answer(**asked)), flush=True)


def answer(
    path: str, *, texts: list[str] = (), ids: list[list[int]] = (), new_tokens: int = 0, exact: bool = False
) -> dict[str, object]:
    """Tokens of each text; for each row of ids what it goes on with, greedily, or the logits at every place."""
    kinds = {"type_k": F32, "type_v": F32} if exact else {}
    # One thread: several wait for each other at every layer, which on a busy machine takes seconds a token.
    model = llama_cpp.Llama(path, n_ctx=512, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False, **kinds)
    told: dict[str, object] = {
        "tokens": [model.tokenize(text.encode(), add_bos=False, special=True) for text in texts],
        "beginning": model.tokenize(b"1", add_bos=True),
        "pieces": [model.detokenize([i], special=True).decode("utf-8", "replace") for i in range(model.n_vocab())],
        "metadata": {key: value for key, value in model.metadata.items() if len(value) < 10_000},
        "ends": [i for i in range(model.n_vocab()) if llama_cpp.llama_vocab_is_eog(model._model.vocab, i)],
    }
    if new_tokens:
        told["greedy"] = [greedy(model, row, new_tokens) for row in ids]
    else:
        told["logits"] = [logits(model, row).tolist() for row in ids]
    return told


def logits(model: llama_cpp.Llama, ids: list[int]) -> np.ndarray:
    model.reset()
    model.eval(ids)
    return model.scores[: len(ids)].copy()


def greedy(model: llama_cpp.Llama, ids: list[int], new_tokens: int) -> list[list[float]]:
    """[token, how far it is above the next one in logits] of each new token, up to and with the end."""
    model.reset()
    found: list[list[float]] = []
    tokens = ids
    for _ in range(new_tokens):
        model.eval(tokens)
        row = model.scores[model.n_tokens - 1]
        second, first = np.sort(row)[-2:]
        token = int(row.argmax())
        found.append([token, float(first - second)])
        if llama_cpp.llama_vocab_is_eog(model._model.vocab, token):
            break
        tokens = [token]
    return found


if __name__ == "__main__":
    main()
