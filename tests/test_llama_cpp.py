"""Does llama.cpp make of exported files what transformers make of the student? With a real llama.cpp, or not at all.

Part `export` of the checks: scripts/llama_cpp.py builds it into .venv-export. Nothing here is skipped.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as kinds
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from tasks import data, gguf_file, models
from tests.whole_runs import ROOT, make_home

pytestmark = [pytest.mark.export, pytest.mark.slow]

PYTHON = ROOT / ".venv-export" / "bin" / "python"
PROMPTS = 20
NEW_TOKENS = 16
Q8_ALIKE = 18  # of the prompts, at least

# What cuts differ on: digits, spaces, line ends, contractions, scripts, marks of turns in the text. Composed (NFC).
TEXTS = [
    "What is 12+34?",
    "1 22 333 4444 55555 666666 3.14159e-10 0x1F ½ ² Ⅷ ٣٤٥ ४५",
    "  two  spaces   three\t tab\n newline \r\n\r\n  indented\n\n\n\tend  ",
    "I'm, you're, HE'S, we'Ll they'VE don't 'd 'twas",
    "Ünïcödé naïve façade Ελληνικά русский العربية हिन्दी ไทย 한국어 日本語 蒸馏 知识",
    "🚀🚀 👩‍👩‍👧‍👦 🇩🇪 ❤️ é e \u200b\u00a0\u3000\ufeff|",
    "def f(a, b):\n\treturn {**a, 'k': [*b]}  # done ~~ `x` <<= != ===\n",
    "<|im_start|>user\nhi<|im_end|><think>no</think><|nothing|> <|im_end |> < |im_end|>",
    "x" * 300 + " " * 40 + "\n" * 9,
    "\\frac{1}{2} $$\\sum_{i=0}^{n} x_i^2$$ \\boxed{42}",
    "",
    " ",
    "a",
]
CORPUS = [
    "the student learns what the teacher knows and the teacher knows a lot of it",
    "I'm sure you're right that we've done it, they'll see; HE'S here",
    "12 + 34 = 46, 100 + 200 = 300, 1234567890 and 3.14159",
    "蒸馏 知识 蒸馏 知识 naïve façade русский русский",
    "def f(x):\n    return x + 1\n\n\n    # indented twice  \n\t\ttabs",
]
TURNS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_BEGINNING = "{{ bos_token }}" + CHATML
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # as Llama 3's tokenizer.json has it


def llama(path: Path, **asked: Any) -> dict[str, Any]:
    """What llama.cpp says, in a process of its own."""
    assert PYTHON.exists(), "llama.cpp is not here: run scripts/llama_cpp.py, as `make test-export` does"
    line = json.dumps({"path": str(path), **asked}) + "\n"
    done = subprocess.run([PYTHON, "tests/llama_side.py"], cwd=ROOT, input=line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


# --- the quickstart's student ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a whole quickstart, without the arms that only a comparison needs."""
    recipe = re.sub(r"^compare: .*\n", "", (ROOT / "recipes" / "quickstart.yaml").read_text(), flags=re.MULTILINE)
    home = make_home(tmp_path_factory.mktemp("quickstart"), recipe)
    done = home.call("run", str(home.recipe), "--yes", timeout_s=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return home.bucket / "export"


@pytest.fixture(scope="module")
def asked(exported: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of held-out problems, and what transformers answer, greedily, with the weights as they were trained."""
    tokenizer = AutoTokenizer.from_pretrained(exported / "hf")
    model = AutoModelForCausalLM.from_pretrained(exported / "hf", dtype=torch.float32).eval()
    rows = list(data.builtin("builtin:addition/held_out"))[:PROMPTS]
    prompts = [models.prompt_ids(tokenizer, row["input"]) for row in rows]
    answers = []
    for prompt in prompts:
        told = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
        answers.append(told[0, len(prompt) :].tolist())
    assert len(prompts) == PROMPTS and len({tuple(one) for one in answers}) > PROMPTS // 2  # it says something
    return prompts, answers


def test_the_quickstarts_student_says_the_same_tokens_in_llama_cpp(
    exported: Path, asked: tuple[list[list[int]], list[list[int]]]
) -> None:
    """f16 against fp32, on every prompt to the end."""
    prompts, answers = asked
    told = llama(exported / "gguf" / "student-f16.gguf", ids=prompts, new_tokens=NEW_TOKENS)
    found = [[token for token, _ in one] for one in told["greedy"]]
    assert found == answers
    margins = sorted(margin for one in told["greedy"] for _, margin in one)
    print(f"f16: {len(margins)} tokens alike; the closest decision was {margins[0]:.4f} logits apart")


def test_eight_bits_change_few_of_its_words(exported: Path, asked: tuple[list[list[int]], list[list[int]]]) -> None:
    prompts, answers = asked
    told = llama(exported / "gguf" / "student-q8_0.gguf", ids=prompts, new_tokens=NEW_TOKENS)
    found = [[token for token, _ in one] for one in told["greedy"]]
    alike = sum(ours == theirs for ours, theirs in zip(found, answers, strict=True))
    print(f"q8_0: {alike} of {PROMPTS} answers alike")
    assert alike >= Q8_ALIKE


def test_llama_cpp_cuts_text_as_the_quickstarts_tokenizer_does(exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported / "hf")
    texts = [*TEXTS, "<|user|>1+2<|assistant|><think>\n3</think><|end|>"]
    told = llama(exported / "gguf" / "student-f16.gguf", texts=texts)
    check_tokens(told, tokenizer, texts)
    assert tokenizer.eos_token_id in told["ends"]
    assert told["metadata"]["tokenizer.chat_template"] == tokenizer.chat_template


def test_its_card_tells_what_its_run_did(exported: Path) -> None:
    card, beside = ((exported / name / "README.md").read_text() for name in ("hf", "gguf"))
    same, too = (re.sub(r"(?s)## How to run it.*?(?=## Where)", "", text) for text in (card, beside))
    assert same == too and "llama-cli -m student-q8_0.gguf" in beside
    for words in ("1,000 held-out problems", "| this student |", "| the teacher |", "400 of them", "8 likeliest tokens",
                  "made from scratch", "Made with kdcloud", "student-q8_0.gguf"):  # fmt: skip
        assert words in card, words
    assert "unknown" not in card


# --- families, with random weights -----------------------------------------------------------------------------------


def bpe(pattern: str | None, **options: Any) -> Tokenizer:
    """A byte-level tokenizer with merges learned from a few lines; `pattern` None cuts as GPT-2 does."""
    tokenizer = Tokenizer(kinds.BPE(**options))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tokenizer.pre_tokenizer = plain
    if pattern is not None:
        from tokenizers import Regex

        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def marked(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in ("<think>", "</think>")])
    return tokenizer


def qwen_words() -> PreTrainedTokenizerBase:
    made = json.loads(bpe(gguf_file._QWEN2).to_str())["model"]
    merges = [tuple(pair) for pair in made["merges"]]
    return marked(
        Qwen2Tokenizer(
            vocab=made["vocab"], merges=merges, unk_token="<|endoftext|>", eos_token="<|im_end|>",
            pad_token="<|endoftext|>", extra_special_tokens=["<|im_start|>"], chat_template=CHATML,
        )
    )  # fmt: skip


def plain_words(pattern: str | None, *, beginning: bool = False, **options: Any) -> PreTrainedTokenizerBase:
    inner = bpe(pattern, **options)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"], chat_template=WITH_BEGINNING if beginning else CHATML,
    )  # fmt: skip
    if beginning:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
        )
    return marked(tokenizer)


def digit_words() -> PreTrainedTokenizerBase:
    tokenizer = plain_words(None)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


SCALED = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILIES: dict[str, tuple[Callable[[], PreTrainedTokenizerBase], dict[str, Any]]] = {
    "qwen2 tied": (qwen_words, {"model_type": "qwen2", "tie_word_embeddings": True}),
    "qwen2": (qwen_words, {"model_type": "qwen2", "tie_word_embeddings": False, "rope_theta": 1e6}),
    "qwen3": (qwen_words, {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True}),
    "llama 3": (
        lambda: plain_words(LLAMA3, beginning=True, ignore_merges=True),
        {"model_type": "llama", "tie_word_embeddings": False, "rope_parameters": SCALED},
    ),
    "llama by merges": (lambda: plain_words(LLAMA3), {"model_type": "llama", "tie_word_embeddings": True}),
    "llama like gpt-2": (lambda: plain_words(None), {"model_type": "llama", "tie_word_embeddings": False}),
    "llama by digits": (digit_words, {"model_type": "llama", "tie_word_embeddings": False}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A folder with a model of random weights, its GGUF in fp32 beside it."""
    words, options = FAMILIES[request.param]
    tokenizer = words()
    torch.manual_seed(5)
    config = AutoConfig.for_model(
        **{
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": len(tokenizer) + 7, "max_position_embeddings": 512,
            "initializer_range": 0.15, "eos_token_id": tokenizer.eos_token_id, **options,
        }
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:  # norms of 1 and biases of 0 would hide a mistake
                weight.add_(torch.randn_like(weight) * (0.3 if "bias" in name else 0.1))
    folder = tmp_path_factory.mktemp("family")
    models.save(folder, model, tokenizer)
    read = models.load_tokenizer(models.ModelSource(path=str(folder)))
    gguf_file.write(folder, folder / "f32.gguf", "f32", read)
    return folder, model, read


def test_a_family_computes_the_same_logits_in_llama_cpp(family: tuple[Path, Any, Any]) -> None:
    """fp32 on both sides, 200 tokens: far enough for positions to be wrong if they were."""
    folder, model, _ = family
    ids = torch.randint(0, 256, (1, 200), generator=torch.Generator().manual_seed(3))
    told = torch.tensor(llama(folder / "f32.gguf", ids=ids.tolist(), exact=True)["logits"][0])
    with torch.no_grad():
        ours = model(ids).logits[0]
    assert ours.std() > 0.1
    torch.testing.assert_close(told, ours, rtol=0, atol=2e-3 * float(ours.std()))


def test_a_family_cuts_text_the_same_in_llama_cpp(family: tuple[Path, Any, Any]) -> None:
    folder, _, tokenizer = family
    check_tokens(llama(folder / "f32.gguf", texts=TEXTS), tokenizer, TEXTS)


def check_tokens(told: dict[str, Any], tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
    for text, tokens in zip(texts, told["tokens"], strict=True):
        assert tokens == tokenizer.encode(text, add_special_tokens=False), text
    prompt = models.prompt_ids(tokenizer, "1")
    begins = tokenizer.bos_token_id is not None and prompt[0] == tokenizer.bos_token_id
    assert (told["beginning"][0] == tokenizer.bos_token_id) == begins
    for i in tokenizer.added_tokens_decoder:
        assert told["pieces"][i] == tokenizer.decode([i])


def test_composed_text_is_what_a_normalizing_tokenizer_needs(family: tuple[Path, Any, Any]) -> None:
    """What the card warns of is so: taken apart, an é is other tokens in llama.cpp than here, where it is composed."""
    folder, _, tokenizer = family
    apart = "cafe\u0301"
    told = llama(folder / "f32.gguf", texts=[apart])["tokens"][0]
    composes = isinstance(tokenizer.backend_tokenizer.normalizer, normalizers.NFC)
    assert (told != tokenizer.encode(apart, add_special_tokens=False)) == composes
    assert bool(gguf_file.vocabulary(tokenizer, rows=len(tokenizer)).notes) == composes
