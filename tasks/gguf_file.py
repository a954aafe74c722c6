"""How does a student become one GGUF file for llama.cpp? Weights and tokenizer of a Hugging Face folder, exactly.

What llama.cpp would compute or cut otherwise than transformers is refused in words. Weights go through memory one at a
time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase

from tasks import models
from tasks.contract import GGUF_FAMILIES, TaskError, install_hint

FORMS = ("f16", "q8_0")  # what an export writes; f32 is there for comparisons
BLOCK = 32  # values that share a scale in q8_0
Moved = Callable[[int, int], None]  # tensors written, of how many

# How a byte-level tokenizer cuts text before its merges, and llama.cpp's name for it.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_CUTS = {
    (("split", _QWEN2), ("bytes", False)): "qwen2",
    (("split", _LLAMA3), ("bytes", False)): "llama-bpe",
    (("bytes", True),): "gpt-2",
    (("digits", True), ("bytes", True)): "smollm",
}
_WHOLE_WORDS = "llama-bpe"  # it takes a word that is a token as it is, before any merge
_BY_MERGES = {"llama-bpe": "dbrx"}  # the same cuts, by merges alone
NO_MERGES = ["<none> <none>"]  # llama.cpp wants some: before the first merge text is single bytes, so none is met
_CONVERT = "use formats: [hf]; llama.cpp's own convert_hf_to_gguf.py may know this model"


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE tokenizer in llama.cpp's terms."""

    tokens: list[str]
    types: list[int]  # gguf.TokenType
    merges: list[str]
    cut: str  # tokenizer.ggml.pre
    bos: int | None
    eos: int | None
    pad: int | None
    add_bos: bool
    template: str | None
    notes: tuple[str, ...]  # where llama.cpp cuts text otherwise, in words


def library() -> Any:
    """The module gguf. Raises TaskError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        hint = f"{install_hint('local')}, or leave gguf out of formats"
        raise TaskError("export to gguf needs the package gguf, which is not installed here", hint=hint) from error
    return gguf


def check(config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises TaskError for a model or tokenizer that a file would not reproduce exactly."""
    library()
    _check_model(config)
    vocabulary(tokenizer, rows=config.vocab_size)


def write(
    folder: Path, target: Path, form: str, tokenizer: PreTrainedTokenizerBase, *, name: str = "student",
    moved: Moved = lambda done, total: None,
) -> Vocabulary:  # fmt: skip
    """The model in `folder` (config.json and safetensors) as the file `target`. Raises TaskError."""
    gguf = library()
    config = AutoConfig.from_pretrained(folder)
    _check_model(config)
    words = vocabulary(tokenizer, rows=config.vocab_size)
    arch = gguf.MODEL_ARCH[config.model_type.upper()]
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[arch])
    _describe(writer, config, form, name)
    _describe_words(writer, words)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    weights = [_Weight.of(one, names, config, form) for one in _stored(folder, config)]
    factors = _rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for weight in weights:
        kind = weight.kind(gguf)
        size = math.prod(gguf.quants.quant_shape_to_byte_shape(weight.shape, kind))
        writer.add_tensor_info(weight.name, weight.shape, np.dtype(np.float32), size, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for count, weight in enumerate(weights, 1):
            writer.write_tensor_data(weight.data(gguf))
            moved(count, len(weights))
    finally:
        writer.close()
    return words


# --- the model -------------------------------------------------------------------------------------------------------


def _check_model(config: Any) -> None:
    kind = config.model_type
    if kind not in GGUF_FAMILIES:
        text = f"GGUF files are written for the Qwen2, Qwen3 and Llama families, and this model is of type {kind}"
        raise TaskError(text, hint=_CONVERT)
    layers = set(getattr(config, "layer_types", None) or ())
    rope = _rope(config)
    troubles = {
        "attention over a sliding window": not layers.issubset({"full_attention"}),
        f"activation {config.hidden_act}": config.hidden_act != "silu",
        "biases": bool(getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)),
        f"positions of type {rope['rope_type']}": rope["rope_type"] not in _ropes_of(kind),
        "positions on a part of each head": rope.get("partial_rotary_factor", 1.0) != 1.0,
    }
    for what, there in troubles.items():
        if there:
            raise TaskError(f"no GGUF file is written for a {kind} model with {what}", hint=_CONVERT)


def _ropes_of(kind: str) -> tuple[str, ...]:
    """llama.cpp reads the factors of Llama 3 in its own family's files only."""
    return ("default", "linear", "llama3") if kind == "llama" else ("default", "linear")


def _rope(config: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, **(getattr(config, "rope_parameters", None) or {})}


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _describe(writer: Any, config: Any, form: str, name: str) -> None:
    gguf = library()
    rope, head = _rope(config), _head_size(config)
    writer.add_type("model")
    writer.add_name("".join(char for char in name if char.isprintable()))
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if form == "f32" else f"MOSTLY_{form.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _rope_factors(config: Any) -> Any:
    """What each frequency of a Llama 3.1 is divided by, [head / 2] fp32; None where nothing is scaled.

    As transformers works them out (_compute_llama3_parameters): so both compute the same positions.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if _rope(config)["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    places = torch.arange(0, _head_size(config), 2, dtype=torch.float32) / _head_size(config)
    return (1.0 / (_rope(config)["rope_theta"] ** places) / scaled.float()).numpy()


# --- weights ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stored:
    """A tensor of a safetensors file, still on the disk."""

    path: Path
    name: str
    shape: tuple[int, ...]

    def load(self) -> Tensor:
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(self.name)


def _stored(folder: Path, config: Any) -> Iterator[_Stored]:
    """Every weight of the model; a head that is tied to the embedding is none."""
    found = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                found += 1
                yield _Stored(path, name, tuple(file.get_slice(name).get_shape()))
    if not found:
        raise TaskError(f"{folder} has no weights in safetensors", hint="export with formats: [hf] first")


@dataclass(frozen=True)
class _Weight:
    """A tensor as the file will have it."""

    stored: _Stored
    name: str
    form: str
    heads: int | None  # rotated in pairs of neighbours: rows of each head are put in that order

    @staticmethod
    def of(stored: _Stored, names: Any, config: Any, form: str) -> _Weight:
        name = names.get_name(key=stored.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise TaskError(f"no GGUF file is written for a model with a weight {stored.name}", hint=_CONVERT)
        heads = None
        if config.model_type == "llama":  # transformers turn the first half of a head against the second
            turned = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            heads = turned.get(stored.name.split(".")[-2])
        return _Weight(stored, name, form, heads)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def kind(self, gguf: Any) -> Any:
        """Vectors stay fp32; matrices are as asked, where their rows are whole blocks."""
        types = gguf.GGMLQuantizationType
        if len(self.shape) < 2 or self.form == "f32":
            return types.F32
        return types.Q8_0 if self.form == "q8_0" and self.shape[-1] % BLOCK == 0 else types.F16

    def data(self, gguf: Any) -> Any:
        """numpy, in its type. Raises TaskError where a value is beyond it."""
        tensor = self.stored.load()
        if self.heads is not None:
            tensor = tensor.unflatten(0, (self.heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        kind = self.kind(gguf)
        if kind == gguf.GGMLQuantizationType.F16:
            half = tensor.half()
            if not torch.isfinite(half).all():
                text = f"{self.stored.name} has values that 16-bit floats of GGUF cannot hold"
                raise TaskError(text, hint="use formats: [hf]")
            return half.contiguous().numpy()
        values = tensor.float().contiguous().numpy()
        return values if kind == gguf.GGMLQuantizationType.F32 else gguf.quants.quantize(values, kind)


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def vocabulary(tokenizer: PreTrainedTokenizerBase, *, rows: int) -> Vocabulary:
    """The tokenizer as it works here, whatever its files say; `rows` of the embedding may be more than it has ids.

    Raises TaskError for any but a byte-level BPE whose cuts llama.cpp knows.
    """
    gguf = library()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TaskError("no GGUF file is written with a tokenizer in Python code", hint=_CONVERT)
    described = json.loads(backend.to_str())
    merges, cut = _merges(described["model"]), _cut(described)
    notes = _normalization(described.get("normalizer"))
    known, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    spelled = {i: token for token, i in known.items()}
    if spelled and max(spelled) >= rows:
        raise TaskError(f"the tokenizer has ids up to {max(spelled)}, the embedding {rows} rows", hint=_CONVERT)
    kinds, tokens, types = gguf.TokenType, [], []
    for i in range(rows):
        if i in added:
            token = added[i]
            special = token.special or _looks_special(token.content)
            tokens.append(token.content)
            types.append(int(kinds.CONTROL if special else kinds.USER_DEFINED))
            if token.lstrip or token.rstrip or token.single_word:
                notes = (*notes, f"{token.content!r} takes spaces beside it along, which llama.cpp does not do")
        else:
            tokens.append(spelled.get(i, f"[PAD{i}]"))
            types.append(int(kinds.NORMAL if i in spelled else kinds.UNUSED))
    if cut == _WHOLE_WORDS and not described["model"].get("ignore_merges"):
        cut = _BY_MERGES[cut]
    elif cut != _WHOLE_WORDS and described["model"].get("ignore_merges"):
        raise TaskError(f"no GGUF file is written with a tokenizer of kind {cut} that ignores merges", hint=_CONVERT)
    # llama.cpp puts it before what a template made, unless that begins with it: as in the student's own prompts.
    prompt, bos = models.prompt_ids(tokenizer, "1"), tokenizer.bos_token_id
    return Vocabulary(
        tokens, types, merges, cut, bos=bos, eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id,
        add_bos=bos is not None and prompt[:1] == [bos], template=template_of(tokenizer), notes=notes,
    )  # fmt: skip


def template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template, of several the default one."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _merges(model: Mapping[str, Any]) -> list[str]:
    if model["type"] != "BPE" or model.get("byte_fallback"):
        text = (
            "no GGUF file is written with a SentencePiece tokenizer"
            if model.get("byte_fallback")
            else (f"no GGUF file is written with a tokenizer of type {model['type']}")
        )
        raise TaskError(text, hint=_CONVERT)
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise TaskError("no GGUF file is written with a BPE of subword marks or dropout", hint=_CONVERT)
    pairs: Sequence[Any] = model["merges"]
    return [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]


def _cut(described: Mapping[str, Any]) -> str:
    """llama.cpp's name for how text is cut. Raises TaskError where it has none."""
    steps = tuple(_steps(described.get("pre_tokenizer")))
    if steps not in _CUTS:
        raise TaskError("llama.cpp does not know how this tokenizer cuts text", hint=_CONVERT)
    return _CUTS[steps]


def _steps(step: Mapping[str, Any] | None) -> Iterator[tuple[str, Any]]:
    match step:
        case None:
            return
        case {"type": "Sequence"}:
            for one in step["pretokenizers"]:
                yield from _steps(one)
        case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": pattern}}:
            yield "split", pattern
        case {"type": "ByteLevel", "add_prefix_space": False}:
            yield "bytes", step.get("use_regex", True)
        case {"type": "Digits"}:
            yield "digits", step["individual_digits"]
        case _:
            yield step["type"], None


def _normalization(step: Mapping[str, Any] | None) -> tuple[str, ...]:
    if step is None or (step["type"] == "Sequence" and not step["normalizers"]):
        return ()
    if step["type"] == "NFC":
        return ("llama.cpp does not compose Unicode (NFC): compose text from elsewhere before it goes in",)
    raise TaskError(f"no GGUF file is written with a tokenizer that changes text ({step['type']})", hint=_CONVERT)


def _looks_special(token: str) -> bool:
    """Marks of turns, which some models do not call special: llama.cpp shows them to nobody either."""
    return (token.startswith("<|") and token.endswith("|>")) or (token.startswith("<｜") and token.endswith("｜>"))


def _describe_words(writer: Any, words: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.cut)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges(words.merges or NO_MERGES)
    for add, token in (
        (writer.add_bos_token_id, words.bos),
        (writer.add_eos_token_id, words.eos),
        (writer.add_pad_token_id, words.pad),
    ):
        if token is not None:
            add(token)
    writer.add_add_bos_token(words.add_bos)
    writer.add_add_eos_token(False)
    if words.template is not None:
        writer.add_chat_template(words.template)
