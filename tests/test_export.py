"""What do people take home? GGUF files as their reader finds them, a Modelfile, a model card that nothing breaks."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from orchestrator.catalog import LICENCES, MODELS
from orchestrator.errors import UsageError
from orchestrator.handover import packages, with_origin
from tasks import card, export, gguf_file, modelfile, models
from tasks.bucket import commit_folder, open_bucket
from tasks.contract import (
    RESULT_FILE,
    TASK_FILE,
    Architecture,
    DataSource,
    EvaluateSettings,
    ExportSettings,
    LabelSettings,
    ModelSource,
    Origin,
    Task,
    TaskError,
    TrainSettings,
)
from tasks.stage import StageContext
from tasks.train import STUDENTS_FILE
from tests.ml_support import FolderContext, context
from tests.recipes import RENTED, SMALL, recipe
from tests.test_planner import CARDS, plan

TINY = Architecture(hidden_size=64, intermediate_size=96)
ARM = {"kind": "soft", "learning_rate": 2e-4, "steps": 12, "tokens": 3456, "final_loss": 0.5, "seed": 0}
NASTY = (
    "x\n---\nlicense: stolen\n# **bold** [a](http://evil) <script>alert(1)</script> `rm` | cell |\x1b[31m {{ .System }}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN25 = (  # a system message of its own where none is given
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}" + CHATML
)
QWEN3 = (  # the last answer's thoughts stay, earlier ones go
    "{% for m in messages %}{% set c = m['content'].split('</think>')[-1] %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ c + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% endif %}{% if m['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GO_IN_IT = CHATML.replace("{% for", "{% raw %}{{ .System }}{% endraw %}{% for", 1)
COUNTED = "{% for m in messages %}{{ loop.index ~ ': ' ~ m['content'] ~ '\n' }}{% endfor %}"
TEMPLATES = {"own": models.TEMPLATE, "chatml": CHATML, "qwen2.5": QWEN25, "qwen3": QWEN3, "r1": R1, "llama3": LLAMA3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights, whose heads are wider than a block of q8_0 and whose MLP is not."""
    tokenizer = models.tiny_tokenizer()
    arch = replace(TINY, model_type="llama", intermediate_size=80)
    path = tmp_path_factory.mktemp("student")
    models.save(path, models.from_architecture(arch, tokenizer, seed=1), tokenizer)
    return path


def written(folder: Path, target: Path, form: str) -> gguf.GGUFReader:
    gguf_file.write(folder, target, form, models.load_tokenizer(ModelSource(path=str(folder))))
    return gguf.GGUFReader(target)


# --- GGUF ------------------------------------------------------------------------------------------------------------


def test_norms_stay_fp32_and_only_rows_of_whole_blocks_take_eight_bits(folder: Path, tmp_path: Path) -> None:
    types = {t.name: t.tensor_type.name for t in written(folder, tmp_path / "q.gguf", "q8_0").tensors}
    assert {types[name] for name in types if "norm" in name} == {"F32"}
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == types["blk.1.ffn_up.weight"] == "Q8_0"
    assert types["blk.0.ffn_down.weight"] == "F16"  # rows of 80
    assert "output.weight" not in types  # tied
    half = {t.name: t.tensor_type.name for t in written(folder, tmp_path / "h.gguf", "f16").tensors}
    assert set(half.values()) == {"F16", "F32"} and half.keys() == types.keys()


def test_eight_bits_hold_each_weight_to_a_127th_of_the_largest_in_its_block(folder: Path, tmp_path: Path) -> None:
    exact = {t.name: t.data for t in written(folder, tmp_path / "f.gguf", "f32").tensors}
    for tensor in written(folder, tmp_path / "q.gguf", "q8_0").tensors:
        if tensor.tensor_type.name == "Q8_0":
            blocks = exact[tensor.name].reshape(-1, 32)
            found = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1, 32)
            # Half a step of rounding, and the scale itself in 16 bits: 127 steps of up to 2^-11 of it.
            most = np.abs(blocks).max(1, keepdims=True) / 127 * (0.5 + 127 * 2**-11)
            assert (np.abs(found - blocks) <= most).all()


def test_a_value_that_half_precision_cannot_hold_is_an_error_and_no_infinity(folder: Path, tmp_path: Path) -> None:
    loaded = models._pretrained(ModelSource(path=str(folder)), torch.float32)
    with torch.no_grad():
        loaded.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    models.save(tmp_path / "wide", loaded, models.tiny_tokenizer())
    with pytest.raises(TaskError, match=r"layers\.0\.mlp\.up_proj\.weight has values"):
        written(tmp_path / "wide", tmp_path / "x.gguf", "f16")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "gemma2"}, "this model is of type gemma2"),
        ({"hidden_act": "gelu"}, "activation gelu"),
        ({"mlp_bias": True}, "with biases"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "a sliding window"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "positions of type yarn"),
        ({"model_type": "qwen2", "rope_parameters": {"rope_type": "llama3"}}, "positions of type llama3"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "a part of each head"),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(change: dict[str, Any], says: str) -> None:
    class Config:
        model_type, hidden_act = "llama", "silu"

    config = Config()
    gguf_file._check_model(config)
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(TaskError, match=says) as raised:
        gguf_file._check_model(config)
    assert "convert_hf_to_gguf.py" in raised.value.hint


def sentencepiece(described: dict[str, Any]) -> None:
    described["model"]["byte_fallback"] = True


def other_cut(described: dict[str, Any]) -> None:
    described["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\d{1,3}|\D+"


def lower_case(described: dict[str, Any]) -> None:
    described["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize(
    ("change", "says"),
    [(sentencepiece, "SentencePiece"), (other_cut, "how this tokenizer cuts text"), (lower_case, "changes text")],
)
def test_a_tokenizer_that_llama_cpp_would_not_follow_is_refused(change: Any, says: str) -> None:
    tokenizer = models.tiny_tokenizer()
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    change(described)

    class Backend:
        def to_str(self) -> str:
            return json.dumps(described)

    tokenizer._tokenizer = Backend()
    with pytest.raises(TaskError, match=says):
        gguf_file.vocabulary(tokenizer, rows=300)


def test_rows_beyond_the_tokenizer_are_unused_and_too_few_rows_are_an_error() -> None:
    tokenizer = models.tiny_tokenizer()
    words = gguf_file.vocabulary(tokenizer, rows=300)
    count = len(tokenizer)
    assert len(words.tokens) == len(set(words.tokens)) == 300
    assert set(words.types[count:]) == {int(gguf.TokenType.UNUSED)}
    kinds = {words.tokens[i]: words.types[i] for i in range(count)}
    assert kinds["<|user|>"] == gguf.TokenType.CONTROL and kinds["<think>"] == gguf.TokenType.USER_DEFINED
    with pytest.raises(TaskError, match="260 rows"):
        gguf_file.vocabulary(tokenizer, rows=260)


# --- Modelfile -------------------------------------------------------------------------------------------------------


def worded(template: str | None) -> Any:
    tokenizer = models.tiny_tokenizer()
    tokenizer.bos_token = "<|pad|>"
    tokenizer.chat_template = template
    return tokenizer


def go(template: str, messages: list[dict[str, str]], system: str = "") -> str:
    """What Go's text/template makes of the few forms that are written here."""
    parts = re.split(r"(\{\{.*?\}\})", template)
    at = 0

    def block(live: bool, scope: dict[str, Any]) -> tuple[str, str]:
        nonlocal at
        text = ""
        while at < len(parts):
            part = parts[at]
            at += 1
            if not part.startswith("{{"):
                text += part if live else ""
                continue
            word = part[2:-2].strip()
            if word == "end" or word.startswith("else"):
                return text, word
            if word.startswith("range"):
                assert word == "range $i, $_ := .Messages"
                start = at
                for i, message in enumerate(messages):
                    at = start
                    body, ended = block(live, {**scope, **message, "i": i})
                    assert ended == "end"
                    text += body
            elif word.startswith("if "):
                taken = truth(word[3:], scope)
                body, ended = block(live and taken, scope)
                text += body
                while ended != "end":
                    now = not taken and (ended == "else" or truth(ended.removeprefix("else if "), scope))
                    body, ended = block(live and now, scope)
                    text, taken = text + body, taken or now
            elif word.startswith("$last :="):
                assert word == "$last := eq (len (slice $.Messages $i)) 1"
                scope["last"] = scope["i"] == len(messages) - 1
            elif live:
                text += {".System": system, ".Content": scope.get("content", ""), ".Thinking": ""}[word]
        return text, "eof"

    def truth(word: str, scope: dict[str, Any]) -> bool:
        role = scope.get("role")
        return {
            ".System": bool(system), "not $last": not scope.get("last"), "and $last .Thinking": False,
            'eq .Role "user"': role == "user", 'eq .Role "assistant"': role == "assistant",
            'and $last (ne .Role "assistant")': bool(scope.get("last")) and role != "assistant",
        }[word]  # fmt: skip

    text, ended = block(True, {})
    assert ended == "eof"
    return text


@pytest.mark.parametrize("name", TEMPLATES)
def test_ollamas_template_says_what_the_students_own_says(name: str) -> None:
    tokenizer = worded(TEMPLATES[name])
    turns = modelfile.turns_of(tokenizer)
    assert turns is not None
    begins = tokenizer.bos_token if name in ("r1", "llama3") else ""
    template = modelfile.go_template(turns, begins=begins, thinks=True)
    assert template is not None and template.count("{{ if") + template.count("range") == template.count("{{ end }}")
    told = [
        {"role": "user", "content": 'What is 1+1?\nTell "me".'},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Sure?"},
    ]
    for count in (1, 3):
        own = tokenizer.apply_chat_template(told[:count], tokenize=False, add_generation_prompt=True)
        assert begins + go(template, told[:count]) == own
        if turns.system is not None:
            system = [{"role": "system", "content": "Be brief."}, *told[:count]]
            own = tokenizer.apply_chat_template(system, tokenize=False, add_generation_prompt=True)
            assert begins + go(template, told[:count], "Be brief.") == own
    assert (turns.system is None) == (name == "own")


def ollama(template: str | None, *, stops: Sequence[str] = ("<|end|>",), thinks: bool = True) -> str:
    return modelfile.modelfile(
        worded(template), "a.gguf", add_bos=False, stops=stops, context=4096, temperature=0.6, top_p=0.95, thinks=thinks
    )


@pytest.mark.parametrize("template", [COUNTED, GO_IN_IT, "{{ broken("])
def test_a_template_that_does_not_come_apart_is_left_to_the_gguf_file_in_words(template: str) -> None:
    text = ollama(template)
    assert "TEMPLATE" not in text and "has no equal in Ollama's language" in text and "FROM ./a.gguf" in text


def test_a_student_without_a_template_is_not_said_to_have_one() -> None:
    assert "has no chat template" in ollama(None) and "holds it as it is" not in ollama(None)


def test_a_template_that_tells_the_day_keeps_the_one_of_the_export_and_says_so() -> None:
    text = ollama("{{ strftime_now('%d %b %Y') }}" + CHATML)
    assert f"{datetime.now().astimezone():%d %b %Y}" in text and "stays the one of this export" in text
    assert "this export" not in ollama(CHATML)


def test_thoughts_of_a_student_whose_template_knows_none_are_shown_apart() -> None:
    """Reasoning that an API told was taught between the marks."""
    assert ".Thinking" in ollama(CHATML, thinks=True) and ".Thinking" not in ollama(CHATML, thinks=False)


def test_a_modelfile_stops_where_the_student_ends_and_breaks_on_no_token() -> None:
    text = ollama(models.TEMPLATE, stops=["<|end|>", 'a"b', "c\nPARAMETER d", "<|end|>", ""])
    assert re.findall(r"^PARAMETER (.*)$", text, re.MULTILINE) == [
        'stop "<|end|>"', "temperature 0.6", "top_k 0", "top_p 0.95", "repeat_penalty 1", "num_ctx 4096",
    ]  # fmt: skip
    assert "<|assistant|><think>\n{{ end }}" in text  # as the student was asked while it learned


# --- the card --------------------------------------------------------------------------------------------------------


class Told(FolderContext):
    """A context whose earlier stages are given."""

    def __init__(self, root: Path, settings: Any, **stages: tuple[Any, dict[str, Any]]) -> None:
        super().__init__(root, Task("run-1", "export", "export", 1, 1, "file:x", settings))
        self.stages = stages

    def told(self, stage: str) -> tuple[Task, dict[str, Any]] | None:
        if stage not in self.stages:
            return None
        settings, result = self.stages[stage]
        return Task("run-1", stage, "any", 1, 1, "file:x", settings), result


def quality(mean: float) -> dict[str, Any]:
    accuracy = {"mean": mean, "interval": [mean - 0.05, mean + 0.05], "n": 500}
    return {"accuracy": accuracy, "kl_to_teacher": 0.25}


def told(tmp_path: Path, *, base: str = "Qwen/Qwen2.5-1.5B", teacher: str = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
         why: str = "wrong answer") -> tuple[FolderContext, ExportSettings]:  # fmt: skip
    licences = {name: LICENCES[name] for name in (base, teacher) if name in LICENCES}
    settings = ExportSettings("train", origin=Origin("1.2.3", "my recipe", "ab" * 32, "evaluate", licences))
    label = LabelSettings(ModelSource(path=teacher), DataSource("data/0123456789ab-algebra.jsonl"), "math", samples=600)
    labelled = {"prompts": 600, "generated": 600, "kept": 431, "dropped": {why: 169}, "tokens": 912345,
                "mass_inside_mean": 0.9876}  # fmt: skip
    train = TrainSettings(ModelSource(path=base), "label", alpha=0.7, temperature=3.0)
    evaluate = EvaluateSettings("train", None, DataSource("data/0123456789ab-test.jsonl"), "math")
    result = {"quality": {"student": quality(0.61), "student_before": quality(0.32), "teacher": None}}
    return Told(tmp_path, settings, label=(label, labelled), train=(train, {}), evaluate=(evaluate, result)), settings


def made(ctx: FolderContext, settings: ExportSettings, **changes: Any) -> str:
    use = card.Use("hf", ("hf",), changes.pop("files", {}))
    given: dict[str, Any] = {"arm": ARM, "parameters": 1_543_714_304, "use": use, **changes}
    return card.card(ctx, settings, card.story(ctx, settings), **given)


def test_the_card_tells_quality_data_training_licences_and_origin(tmp_path: Path) -> None:
    text = made(*told(tmp_path), files={"student-f16.gguf": 3_000_000_000})
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "Qwen/Qwen2.5-1.5B" and front["license"] == "apache-2.0"
    for words in (
        "| this student | 61.0% | 56.0% to 66.0% | 0.250 |", "| the student before | 32.0% |", "500 held-out problems",
        "algebra.jsonl", "431 kept", "169 wrong answer", "98.76%", "`verify: math`", "912,345", "lora, r 8",
        "0.7 · T² KL", "T = 3", "Qwen/Qwen2.5-1.5B", "mit (", "kdcloud 1.2.3", "ab" * 32, "student-f16.gguf",
        "my recipe",
    ):  # fmt: skip
        assert words in text, words
    assert "| the teacher |" not in text and "0123456789ab" not in text


def test_text_of_others_breaks_neither_the_front_matter_nor_the_markdown(tmp_path: Path) -> None:
    plain, nasty = made(*told(tmp_path)), made(*told(tmp_path, base=NASTY, teacher=NASTY, why=NASTY))
    front = yaml.safe_load(nasty.split("\n---\n")[0].removeprefix("---\n"))
    assert front == {"library_name": "transformers", "pipeline_tag": "text-generation",
                     "tags": ["knowledge-distillation", "kdcloud"]}  # fmt: skip
    headings = re.findall(r"^#+ .*$|^---$|^\|.*\|$", nasty, re.MULTILINE)
    assert len(headings) == len(re.findall(r"^#+ .*$|^---$|^\|.*\|$", plain, re.MULTILINE))
    assert "\x1b" not in nasty and not re.search(r"(?<!\\)<script", nasty) and not re.search(r"[^\\]\]\(http", nasty)


def test_a_licence_is_what_the_folder_says_else_the_catalogues_else_unknown(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "README.md").write_text("---\nlicense: other\nlicense_name: house-rules\n---\n# mine\n")
    text = made(*told(tmp_path, base=str(own), teacher="somebody/model"))
    front = yaml.safe_load(text.split("---")[1])
    assert (front["license"], front["license_name"]) == ("other", "house-rules") and "base_model" not in front
    assert "own: house-rules (the README.md in its folder)" in text
    assert "somebody/model: unknown (look at its card: huggingface.co/somebody/model)" in text
    (own / "README.md").write_text("---\n{: no yaml\n---\n")
    assert "ask who gave you that folder" in made(*told(tmp_path, base=str(own)))
    (own / "LICENSE").write_text("MIT")
    assert "see its LICENSE" in made(*told(tmp_path, base=str(own)))


def test_a_card_speaks_of_the_folder_that_it_lies_in(tmp_path: Path) -> None:
    files = {"student-f16.gguf": 3_000_000, "student-q8_0.gguf": 1_500_000}

    def used(folder: str, *made_: str) -> str:
        text = made(*told(tmp_path), use=card.Use(folder, made_, files, ("it is small",)))
        return text.split("## How to run it")[1].split("## Where")[0]

    alone, beside, plain = used("gguf", "gguf"), used("gguf", "hf", "gguf"), used("hf", "hf", "gguf")
    assert "transformers" not in alone and "llama-cli -m student-q8_0.gguf" in alone and "hf/" not in alone
    assert "`hf/` beside this folder" in beside
    assert 'from_pretrained(".")' in plain and "gguf/" in plain and "1.5 MB" in plain
    assert all("Note: it is small." in text for text in (alone, beside, plain))


def test_a_licence_of_ones_own_has_a_name_as_the_hub_wants_it(tmp_path: Path) -> None:
    front = yaml.safe_load(made(*told(tmp_path, base="deepseek-ai/DeepSeek-R1-Distill-Llama-8B")).split("---")[1])
    assert front["license"] == "other" and front["license_name"] == "mit-on-top-of-llama3.1"


def test_a_student_that_thinks_is_sampled_though_it_was_evaluated_greedily(tmp_path: Path) -> None:
    story = card.story(*told(tmp_path))
    assert story.evaluate is not None and story.label is not None and story.evaluate.seeds == 1
    assert export._sampling(story, thinks=False) == (0.0, None)
    assert export._sampling(story, thinks=True) == (story.label.temperature, story.label.top_p)
    several = replace(story, evaluate=replace(story.evaluate, seeds=4, temperature=0.5, top_p=0.9))
    assert export._sampling(several, thinks=True) == (0.5, 0.9)
    greedy = replace(story, label=replace(story.label, temperature=0.0))
    assert export._sampling(greedy, thinks=True) == (0.6, 0.95)


@pytest.mark.parametrize(("template", "thoughts", "thinks"), [(CHATML, 300, True), (CHATML, 90, False), (R1, 0, True)])
def test_a_student_thinks_where_its_template_or_most_of_its_lessons_do(
    tmp_path: Path, template: str, thoughts: int, thinks: bool
) -> None:
    story = card.story(*told(tmp_path))
    story = replace(story, labelled={**story.labelled, "thoughts": thoughts})
    assert export._manner(story, worded(template)).thinks == thinks


def test_ollama_makes_room_for_the_longest_answer_learned_or_judged(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 32768}')
    story = card.story(*told(tmp_path))
    assert story.label is not None and story.evaluate is not None and story.train is not None
    both = replace(
        story, label=replace(story.label, max_new_tokens=512), evaluate=replace(story.evaluate, max_new_tokens=9000)
    )
    assert export._context(tmp_path, both) == 9000 + 1024
    imported = replace(story, label=None, evaluate=None, train=replace(story.train, max_seq_len=16384))
    assert export._context(tmp_path, imported) == 16384
    assert export._context(tmp_path, replace(story, train=None, label=None, evaluate=None)) == 4096


def test_a_card_without_evaluation_or_labels_of_this_run_says_so(tmp_path: Path) -> None:
    ctx, settings = told(tmp_path)
    assert isinstance(ctx, Told)
    del ctx.stages["evaluate"], ctx.stages["label"]
    text = made(ctx, settings)
    assert "It was not evaluated before it was exported." in text
    assert "Labels that were made before this run" in text and "- Teacher: unknown" in text


def test_known_licences_are_of_known_models_and_siblings_with_other_terms_keep_theirs() -> None:
    assert set(LICENCES) <= set(MODELS) and len(LICENCES) > 60
    assert LICENCES["Qwen/Qwen2.5-1.5B"] == LICENCES["Qwen/Qwen2.5-32B-Instruct"] == "apache-2.0"
    assert LICENCES["Qwen/Qwen2.5-3B-Instruct"] == "qwen-research" and LICENCES["Qwen/Qwen2.5-72B"] == "qwen"
    assert LICENCES["deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"] == "mit"
    assert LICENCES["meta-llama/Llama-3.2-1B"] == "llama3.2" and "deepseek-ai/DeepSeek-V3" not in LICENCES


# --- the stage -------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """What a train stage leaves, as far as an export reads it."""
    done, tokenizer = tmp_path / "train" / "done", models.tiny_tokenizer()
    models.save(done / models.MODEL_FOLDER, models.from_architecture(TINY, tokenizer, seed=1), tokenizer)
    (done / STUDENTS_FILE).write_text(json.dumps({"before": {}, "arms": [ARM]}))
    return tmp_path


def test_both_formats_come_out_beside_each_other(trained: Path) -> None:
    settings = ExportSettings("train", formats=("hf", "gguf"))
    ctx = context(trained, "export", "export", settings)
    result = export.run(ctx, settings)
    names = {path.relative_to(ctx.out).as_posix() for path in ctx.out.rglob("*") if path.is_file()}
    assert {"hf/model.safetensors", "hf/README.md", "gguf/student-f16.gguf", "gguf/student-q8_0.gguf", "gguf/Modelfile",
            "gguf/README.md"} <= names  # fmt: skip
    assert result["formats"] == ["hf", "gguf"] and set(result["gguf"]) == {"student-f16.gguf", "student-q8_0.gguf"}
    assert result["bytes"] == sum((ctx.out / name).stat().st_size for name in names)
    assert "FROM ./student-q8_0.gguf" in (ctx.out / "gguf" / "Modelfile").read_text()
    alone = replace(settings, formats=("gguf",))
    ctx = context(trained, "alone", "export", alone)
    assert export.run(ctx, alone)["path"] == "gguf" and not (ctx.out / "hf").exists()


def test_transformers_4_reads_the_same_positions_and_a_tokenizer_that_it_knows(tmp_path: Path) -> None:
    """It takes a base of 10,000 and no scaling where their old names are missing."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=300, max_position_embeddings=128, rope_parameters=rope,
    )  # fmt: skip
    tokenizer = models.tiny_tokenizer()
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    plain.add_special_tokens({"additional_special_tokens": ["<|mark|>"]})
    models.save(tmp_path, LlamaForCausalLM(config), plain)
    before = AutoConfig.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    export._for_older_readers(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    assert told["rope_theta"] == 5e5 and told["torch_dtype"] == told["dtype"]
    assert told["rope_scaling"] == {name: value for name, value in rope.items() if name != "rope_theta"}
    told = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in told
    assert "<|mark|>" in told["additional_special_tokens"]
    after = AutoConfig.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert before[0].rope_parameters == after[0].rope_parameters and before[0].dtype == after[0].dtype
    text = "a 12+3<|mark|>\n"
    assert before[1](text)["input_ids"] == after[1](text)["input_ids"]
    assert before[1].all_special_tokens == after[1].all_special_tokens


def test_a_student_ends_as_it_was_taught_and_has_no_sampling_of_its_base(tmp_path: Path) -> None:
    tokenizer = models.tiny_tokenizer()
    model = models.from_architecture(TINY, tokenizer, seed=1)
    other = tokenizer.eos_token_id + 1
    model.config.eos_token_id = other
    model.generation_config = GenerationConfig(eos_token_id=[other, 2], repetition_penalty=1.1, max_new_tokens=9)
    model.generation_config.temperature = 0.7  # without do_sample: transformers load it, but would not write it
    models.save(tmp_path, model, tokenizer)
    told = json.loads((tmp_path / "generation_config.json").read_text())
    assert told["eos_token_id"] == [tokenizer.eos_token_id, other]  # and not an ordinary word, which stood there too
    assert told["pad_token_id"] == tokenizer.pad_token_id
    assert not told.keys() & {"repetition_penalty", "max_new_tokens", "temperature"}
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id
    export._say_how(tmp_path, export.Manner(True, 0.6, 0.95))
    said = json.loads((tmp_path / "generation_config.json").read_text())
    assert (said["do_sample"], said["temperature"], said["top_p"], said["top_k"]) == (True, 0.6, 0.95, 0)
    assert said["eos_token_id"] == told["eos_token_id"]


def test_the_licence_of_its_model_goes_along_with_the_student(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "LICENSE.txt").write_text("terms")
    (base / "NOTICE").write_text("Built with it")
    settings = ExportSettings("train", formats=("hf", "gguf"))
    ctx = context(trained, "export", "export", settings)
    train = TrainSettings(ModelSource(path=str(base)), "label")
    monkeypatch.setattr(ctx, "told", lambda stage: (Task("r", "train", "train", 1, 1, "file:x", train), {}))
    export.run(ctx, settings)
    for name in ("hf", "gguf"):
        assert (ctx.out / name / "LICENSE.txt").read_text() == "terms" and (ctx.out / name / "NOTICE").is_file()


def test_what_cannot_be_a_gguf_file_is_kept_as_hf_and_told(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tokenizer: Any, *, rows: int) -> None:
        raise TaskError("no GGUF file is written with a SentencePiece tokenizer")

    monkeypatch.setattr(gguf_file, "vocabulary", refuse)
    settings = ExportSettings("train", formats=("hf", "gguf"))
    ctx = context(trained, "export", "export", settings)
    result = export.run(ctx, settings)
    assert result["formats"] == ["hf"] and "SentencePiece" in result["note"] and not (ctx.out / "gguf").exists()
    assert "SentencePiece" in (ctx.out / "hf" / "README.md").read_text()
    with pytest.raises(TaskError, match="SentencePiece"):
        export.run(context(trained, "alone", "export", settings), replace(settings, formats=("gguf",)))


def test_a_stage_reads_what_another_was_asked_and_found_without_its_files(tmp_path: Path) -> None:
    bucket = open_bucket(f"file:{tmp_path / 'bucket'}")
    settings = ExportSettings("train")
    order = Task("run-1", "label", "export", 1, 1, bucket.url, settings)
    ctx = StageContext(replace(order, stage="export"), tmp_path / "work", bucket)
    assert ctx.told("label") is None
    bucket.put(f"label/{TASK_FILE}", order.to_json().encode())
    out = tmp_path / "out"
    out.mkdir()
    (out / RESULT_FILE).write_text('{"kept": 3}')
    (out / "labels-00000.safetensors").write_bytes(b"much")
    assert ctx.told("label") is None  # nothing counts before it is committed
    commit_folder(bucket, out, "label", fence=1)
    assert ctx.told("label") == (order, {"kept": 3})
    assert not list((tmp_path / "work").rglob("labels-*"))
    bucket.put(f"label/{RESULT_FILE}", b'{"kept": 4}')
    with pytest.raises(TaskError, match="corrupt"):
        ctx.told("label")


def test_the_order_with_an_origin_comes_back_the_same() -> None:
    settings = ExportSettings("train", origin=Origin("1", "r", "0" * 64, "evaluate", {"a/b": "mit"}))
    task = Task("run-1", "export", "export", 1, 1, "file:x", settings)
    assert Task.from_json(task.to_json()) == task


# --- what the client knows -------------------------------------------------------------------------------------------


def test_the_client_adds_what_only_it_knows_after_the_plan_is_approved() -> None:
    found = plan(RENTED, *CARDS)
    *before, last = found.stages
    assert isinstance(last.settings, ExportSettings) and last.settings.origin is None  # it is no part of the digest
    settings = with_origin(last, found, RENTED)
    assert isinstance(settings, ExportSettings) and settings.origin is not None
    assert settings.origin.recipe_sha256 == hashlib.sha256(RENTED.encode()).hexdigest()
    assert settings.origin.evaluation == "evaluate"
    assert settings.origin.licences == {
        "Qwen/Qwen2.5-1.5B": "apache-2.0", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": "mit",
    }  # fmt: skip
    assert [with_origin(stage, found, RENTED) for stage in before] == [stage.settings for stage in before]
    late = replace(found, stages=(*before[:2], last, before[2]))  # evaluated after it was exported
    settings = with_origin(last, late, RENTED)
    assert isinstance(settings, ExportSettings) and settings.origin is not None and settings.origin.evaluation is None


def test_gguf_files_are_in_the_plans_time_and_storage() -> None:
    def last(formats: str) -> Any:
        text = RENTED.replace("kind: export, student: train", f"kind: export, student: train, formats: {formats}")
        return plan(text, *CARDS).stages[-1]

    seconds = {text: last(text).hours.expected * 3600 for text in ("[hf]", "[gguf]", "[hf, gguf]")}
    # 1.54e9 parameters: hf is 2 bytes each, f16 and q8_0 together 3.06, at 100 MB/s; 77 s to turn them into both
    assert seconds["[hf, gguf]"] - seconds["[hf]"] > 100
    assert seconds["[hf]"] < seconds["[gguf]"] < seconds["[hf, gguf]"]


def test_a_family_that_llama_cpp_files_are_not_written_for_is_refused_before_anything_is_paid() -> None:
    text = RENTED.replace("Qwen/Qwen2.5-1.5B", "microsoft/phi-4")
    recipe(text)
    says = "formats: gguf is written for qwen2, qwen3, llama, and this student is a phi3"
    with pytest.raises(UsageError, match=says):
        recipe(text.replace("kind: export, student: train", "kind: export, student: train, formats: [hf, gguf]"))
    recipe(SMALL.replace("formats: [hf]", "formats: [hf, gguf]"))  # made from scratch


def test_a_machine_that_exports_has_the_writer() -> None:
    assert packages("export", s3=False)["gguf"].startswith("gguf==")
    assert "gguf" not in packages("train", s3=False)
