"""Which model and tokenizer does a stage work with, on which device? Ordinary Hugging Face ones, safetensors only."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import math
import os
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tasks import hub
from tasks.contract import Architecture, LoraSettings, ModelSource, TaskError, build, install_hint
from tasks.stage import Context

varlen_attn: Any = None  # torch has it from 2.10 on
with suppress(ImportError):
    varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn

MODEL_FOLDER = "model"  # where pretrain and train put what later stages load
STUDENT_FILE = "student.json"  # beside an adapter: which base it belongs to

# Opens the thinking in the generation prompt and drops it from past turns, as the R1-Distill templates do.
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|assistant|>' + m['content'].split('</think>')[-1] + '<|end|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"
)
_PROBES = (
    "The answer is 42, isn't it?\n\n  x^2 + y_1 = \\frac{3}{4}",
    "12345678901234567890 + 99 = 1.5e-7",
    "蒸馏 知识 émigré Ωmega",
    "def f(a, b):\n\treturn [a, *b]  # done",
)


# --- devices ---------------------------------------------------------------------------------------------------------


def set_threads(threads: int | None) -> None:
    if threads:
        torch.set_num_threads(threads)


def pick_device() -> torch.device:
    """cuda, else mps, else cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def working_dtype(device: torch.device, precision: str = "auto") -> torch.dtype:
    """bf16 where the device computes in it (auto), or as asked. Raises TaskError."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "fp32" or (precision == "auto" and not has_bf16):
        return torch.float32
    if precision not in ("auto", "bf16"):
        raise TaskError(f"unknown precision {precision}", hint="use auto, bf16 or fp32")
    return torch.bfloat16


def reset_peak(device: torch.device) -> None:
    """Starts a new measurement of `peak_gib` where the system can (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib(device: torch.device) -> float:
    """Peak memory, GiB: what torch allocated on the GPU, or the resident size of this whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20  # kB
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**30 if sys.platform == "darwin" else 2**20)


# --- tokenizers ------------------------------------------------------------------------------------------------------


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of single bytes (no merges), with a chat template that opens `<think>`.

    Its class is Qwen2's, since AutoTokenizer loads every folder of model type qwen2 with that class, whatever
    tokenizer_config.json names (transformers 5.23).
    """
    from tokenizers import AddedToken, pre_tokenizers
    from transformers import Qwen2Tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = {"eos_token": "<|end|>", "pad_token": "<|pad|>", "unk_token": "<|end|>"}
    tokenizer = Qwen2Tokenizer(
        vocab={char: i for i, char in enumerate(alphabet)}, merges=[], **special, chat_template=TEMPLATE,
        padding_side="left", clean_up_tokenization_spaces=False, extra_special_tokens=["<|user|>", "<|assistant|>"],
    )  # fmt: skip
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in ("<think>", "</think>")])
    return tokenizer


@dataclass(frozen=True)
class VocabularyHashes:
    """Two hashes of a tokenizer: labels fit every model with the same `ordinary` one."""

    ordinary: str  # id -> token of all ordinary ids
    special: str  # added tokens, template, end of sequence


def ordinary_vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """id -> token without the added ones. In byte-level vocabularies a token spells its bytes one to one."""
    added = tokenizer.added_tokens_decoder
    return {i: token for token, i in tokenizer.get_vocab().items() if i not in added}


def byte_vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[bytes, int]:
    """bytes -> id, of all tokens whose bytes no other token has; empty unless the vocabulary is a byte-level one."""
    # The table of GPT-2: printable characters of Latin-1 stand for their byte, the others follow from 256 on.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    of_char = {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
    spelled: dict[bytes, list[int]] = {}
    for i, token in ordinary_vocabulary(tokenizer).items():
        if not all(char in of_char for char in token):
            return {}
        spelled.setdefault(bytes(of_char[char] for char in token), []).append(i)
    for i, token in added_vocabulary(tokenizer).items():
        spelled.setdefault(token.encode(), []).append(i)
    return {text: ids[0] for text, ids in spelled.items() if len(ids) == 1}


def added_vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}


def vocabulary_hashes(tokenizer: PreTrainedTokenizerBase) -> VocabularyHashes:
    special = [sorted(added_vocabulary(tokenizer).items()), tokenizer.chat_template, tokenizer.eos_token_id]
    return VocabularyHashes(_sha(sorted(ordinary_vocabulary(tokenizer).items())), _sha(special))


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=True, default=str).encode()).hexdigest()


def check_compatible(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, *, teacher_hash: str, head_rows: int
) -> list[int]:
    """Ids that mean another special token to the teacher than to the student: their rows have to be trained.

    Labels fit when both map every ordinary id to the same bytes and cut text alike. Special tokens may differ: the
    student then works with the teacher's tokenizer. A head wider than the vocabulary is fine and never resized.
    Raises TaskError when the base vocabularies differ or the head is too narrow.
    """
    hint = "take a student of the teacher's family (same tokenizer), or label again with a teacher of the student's"
    if vocabulary_hashes(student).ordinary != vocabulary_hashes(teacher).ordinary:
        raise TaskError("the labels were made with another base vocabulary than the student's", hint=hint)
    if teacher_hash != vocabulary_hashes(teacher).ordinary:
        raise TaskError("the labels do not belong to the tokenizer stored beside them", hint="label again")
    for text in _PROBES:
        if teacher.encode(text, add_special_tokens=False) != student.encode(text, add_special_tokens=False):
            raise TaskError("teacher and student share a vocabulary but cut text differently", hint=hint)
    needed = 1 + max(teacher.get_vocab().values())
    if head_rows < needed:
        raise TaskError(f"the student's head has {head_rows} rows, the teacher's vocabulary needs {needed}", hint=hint)
    known = added_vocabulary(student)
    return sorted(i for i, token in added_vocabulary(teacher).items() if known.get(i) != token)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The generation prompt of one user turn, as token ids; plain text when the tokenizer has no template."""
    if tokenizer.chat_template is None:
        return list(tokenizer.encode(text))
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer.encode(rendered, add_special_tokens=False))


def opens_thinking(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the generation prompt ends inside an opened `<think>`."""
    text = tokenizer.decode(prompt_ids(tokenizer, "1"), skip_special_tokens=False)
    return text.rfind("<think>") > text.rfind("</think>")


# --- models ----------------------------------------------------------------------------------------------------------


@dataclass
class Loaded:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def from_architecture(arch: Architecture, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    """A model with random weights (the same for the same seed) over `tokenizer`, fp32."""
    values = asdict(arch)
    kind = values.pop("model_type")
    torch.manual_seed(seed)
    try:
        config = AutoConfig.for_model(
            kind, vocab_size=len(tokenizer), max_position_embeddings=4096, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            # The usual 0.02 suits widths in the thousands; narrow models start slowly from it.
            initializer_range=0.5 / math.sqrt(arch.hidden_size), **values,
        )  # fmt: skip
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except ValueError as error:
        hint = "check the sizes of the model in the recipe"
        raise TaskError(f"cannot make a {kind} model: {error}", hint=hint) from error


def load(ctx: Context, source: ModelSource, *, dtype: torch.dtype, four_bit: bool = False) -> Loaded:
    """Model and tokenizer of a path or of an earlier stage; adapters are merged. Not for architectures.

    `four_bit`: the weights of its layers as NF4, on the current GPU where there is one, for computing in `dtype`.
    Raises TaskError when it cannot be had, or has no safetensors.
    """
    if source.stage is not None:
        return load_stage(ctx.input(source.stage), ctx, dtype=dtype, four_bit=four_bit)
    if source.path is None:
        raise TaskError("a model from scratch cannot be loaded", hint="name a path or an earlier stage")
    fetch(ctx, source)
    return Loaded(_pretrained(source, dtype, four_bit), load_tokenizer(source))


def fetch(ctx: Context, source: ModelSource) -> None:
    """The weights of a hub id on this machine's disk. How long it takes depends on the network, and on no card."""
    ctx.progress("fetch", declared=True)
    hub.local_path(source)
    ctx.progress("load", declared=True)


def bits_and_bytes(what: str) -> Any:
    """The module bitsandbytes, which `what` of the recipe needs. Raises TaskError where it is not installed."""
    try:
        import bitsandbytes
    except ImportError as error:
        hint = f"{install_hint('quantized')}, or leave that setting out"
        raise TaskError(f"{what} needs bitsandbytes, which is not installed here", hint=hint) from error
    return bitsandbytes


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or folder. Raises TaskError."""
    assert source.path is not None
    if source.path.startswith(("/", ".", "~")) and not Path(source.path).expanduser().is_dir():
        raise TaskError(f"there is no folder {source.path}", hint="name a tokenizer's folder, or a model on the hub")
    place = hub.local_path(source, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            place, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _unloadable("tokenizer", source.path, error) from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _pretrained(source: ModelSource, dtype: torch.dtype, four_bit: bool = False) -> PreTrainedModel:
    place = hub.local_path(source)
    how: dict[str, Any] = {}
    if four_bit:
        bits_and_bytes("method: qlora")
        quantized = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        how = {"quantization_config": quantized}  # it goes to the current GPU by itself
    try:
        return AutoModelForCausalLM.from_pretrained(
            place, revision=source.revision, trust_remote_code=source.trust_remote_code,
            use_safetensors=True, dtype=dtype, **how,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise _unloadable("model", source.path, error) from error


def _unloadable(what: str, path: str | None, error: Exception) -> TaskError:
    first = str(error).strip().split("\n")[0]
    return TaskError(
        f"cannot load the {what} {path}: {first}",
        hint="check the name and the network; weights must be safetensors, and code of others runs only with "
        "trust_remote_code: true",
    )


def load_stage(
    folder: Path, ctx: Context, *, dtype: torch.dtype, name: str = MODEL_FOLDER, four_bit: bool = False
) -> Loaded:
    """What an earlier pretrain or train stage left in `folder/name`: a whole model, or an adapter with its base."""
    place = folder / name
    if not place.is_dir():
        raise TaskError(f"the stage left no {name}", hint="name a pretrain or train stage")
    tokenizer = load_tokenizer(ModelSource(path=str(place)))
    description = place / STUDENT_FILE
    if not description.exists():
        return Loaded(_pretrained(ModelSource(path=str(place)), dtype, four_bit), tokenizer)
    if four_bit:
        raise TaskError("qlora starts from a whole model, and that stage left an adapter", hint="use method: lora")
    from peft import PeftModel

    base = load(ctx, build(ModelSource, json.loads(description.read_text())["base"]), dtype=dtype)
    model = PeftModel.from_pretrained(base.model, str(place)).merge_and_unload()
    return Loaded(model, tokenizer)


def save(
    folder: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, base: ModelSource | None = None,
    values: dict[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Writes model (or adapter, which needs its `base`) and tokenizer with save_pretrained, safetensors.

    `values`: the weights, where the model itself holds a part of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if base is not None:
        # The base is named in student.json; peft would look for it on the hub to compare vocabularies.
        model.save_pretrained(folder, save_embedding_layers=False)  # type: ignore[operator]
        (folder / STUDENT_FILE).write_text(json.dumps({"base": asdict(base)}))
    else:
        as_taught(model, tokenizer)
        model.save_pretrained(folder, state_dict=values)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)


def as_taught(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """It ends as the tokenizer of its lessons does, or as it did before; sampling and limits of its base's are gone.

    A base's generation_config that transformers load and would not write again (a temperature without `do_sample`)
    goes with them.
    """
    from transformers import GenerationConfig

    before = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    others = before if isinstance(before, list) else [] if before is None else [before]
    marks = [i for i in others if i in tokenizer.added_tokens_decoder]  # no default of a configuration's class
    ends = list(dict.fromkeys(i for i in (tokenizer.eos_token_id, *marks) if i is not None))
    told = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(eos_token_id=ends[0] if len(ends) == 1 else ends or None, **told)
    for name, value in {"eos_token_id": tokenizer.eos_token_id, **told}.items():
        if value is not None:  # some configurations take none
            setattr(model.config, name, value)


def with_lora(model: PreTrainedModel, settings: LoraSettings, *, special_ids: list[int], seed: int) -> nn.Module:
    """`model` with trainable adapters (fp32), its own weights frozen; rows of `special_ids` are trained too.

    A tied head follows the embedding; an untied one gets trained rows of its own.
    """
    from peft import LoraConfig, get_peft_model

    rows: dict[str, list[int]] | None = None
    if special_ids:
        names = {module: name for name, module in model.named_modules()}
        layers = [model.get_input_embeddings()]
        if not tied(model):
            layers.append(model.get_output_embeddings())
        rows = {names[layer].rsplit(".", 1)[-1]: special_ids for layer in layers}
    torch.manual_seed(seed)
    config = LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout,
        target_modules=list(settings.targets), trainable_token_indices=rows, task_type="CAUSAL_LM",
    )  # fmt: skip
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise TaskError(f"LoRA does not fit this model: {error}", hint="check lora.targets in the recipe") from error


def tied(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def causal(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


Runs = tuple[tuple[int, int], ...]  # a row of samples end to end: (how many, tokens of each), and again


class Packing:
    """Where the samples of a row begin, for `packed_attention`: one kernel's offsets, or runs of alike samples.

    No dataclass, of which a compiled layer would look at every value, and be compiled anew for every mix of lengths.
    """

    def __init__(self, runs: Runs, offsets: Tensor | None = None, longest: int = 0) -> None:
        self.runs = runs
        self.offsets = offsets  # int32 [samples + 1]
        self.longest = longest  # tokens, a power of two


def hidden_states(model: nn.Module, ids: Tensor, mask: Tensor | None = None, runs: Runs = ()) -> Tensor:
    """What the head sees at each place [B, L, H]. Right-padded rows need no mask: attention looks back only.

    With `runs`, ids [1, sum of count * length] are samples end to end, each as if alone; the model must be one that
    `packs`.
    """
    packed: dict[str, Any] = {}
    if mask is not None and packs(model):
        raise ValueError("a model that packs takes no mask")
    if runs:
        if not packs(model):
            raise ValueError("samples laid end to end would see each other: use_packing first")
        lengths = torch.tensor([length for count, length in runs for _ in range(count)])
        positions = torch.cat([torch.arange(length).repeat(count) for count, length in runs])
        packing = Packing(runs)
        if has_varlen(next(model.parameters())):
            offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
            longest = 1 << (int(lengths.max()) - 1).bit_length()
            packing = Packing(runs, offsets.to(ids.device, non_blocking=True), longest)
        packed = {"position_ids": positions.to(ids.device, non_blocking=True)[None], "packing": packing}
    return causal(model).base_model(input_ids=ids, attention_mask=mask, use_cache=False, **packed).last_hidden_state


PACKING_NOISE = 0.25  # two kernels round apart, in bf16 by a few hundredths of what samples in sight would change
PACKED_ATTENTION = "kdcloud_packed"  # no mask is made for a name that transformers has no mask function for


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    packing: Packing | None = None, **rest: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Each sample with itself: query [1, heads, T, D] to [1, T, heads, D]. One kernel for all of them where there is
    one (FlashAttention's for uneven lengths), else sdpa, a run of alike samples a call.

    A block-diagonal mask, transformers' own way, is T x T and keeps sdpa from its flash kernels.
    """
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **rest)
    half = query.dtype in (torch.bfloat16, torch.float16)
    if packing.offsets is not None and half and not rest.get("dropout"):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        starts, longest = packing.offsets, packing.longest
        out = varlen_attn(q, k, v, starts, starts, longest, longest, scale=rest.get("scaling"), **_VARLEN)
        return out[None], None
    outs, at = [], 0
    for count, length in packing.runs:
        end = at + count * length
        parts = [x[0, :, at:end].unflatten(1, (count, length)).transpose(0, 1) for x in (query, key, value)]
        outs.append(sdpa_attention_forward(module, *parts, None, **rest)[0].flatten(0, 1))
        at = end
    return (outs[0] if len(outs) == 1 else torch.cat(outs))[None], None


def has_varlen(weight: Tensor) -> bool:
    """Whether attention over samples of any length is one kernel here: CUDA from Ampere on, torch from 2.10 on."""
    return bool(_VARLEN) and weight.is_cuda and torch.cuda.get_device_capability(weight.device) >= (8, 0)


def _varlen_options() -> dict[str, Any]:
    """Causal attention with fewer heads of keys than of queries, as this torch calls it; empty where it has none."""
    if varlen_attn is None:
        return {}
    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return {**causal, **({"enable_gqa": True} if "enable_gqa" in known else {})}


_VARLEN = _varlen_options()


def packs(model: nn.Module) -> bool:
    """Whether samples may be laid end to end."""
    return causal(model).config._attn_implementation == PACKED_ATTENTION


def use_packing(model: nn.Module) -> bool:
    """Lets `model` take samples end to end where its attention is plain sdpa over the whole past, and says so.

    From then on it takes no mask: not for generating in batches.
    """
    inner = causal(model)
    config = inner.config
    if packs(model):
        return True
    whole = {"full_attention"}.issuperset(getattr(config, "layer_types", None) or ())
    if config._attn_implementation != "sdpa" or not whole or getattr(config, "sliding_window", None) is not None:
        return False
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    inner.set_attn_implementation(PACKED_ATTENTION)
    training = model.training
    model.eval()
    apart, rounding = _packing_probe(model)
    model.train(training)
    if rounding > PACKING_NOISE * apart:
        inner.set_attn_implementation("sdpa")  # code of its own, which takes no such hint
    return packs(model)


@torch.no_grad()
def _packing_probe(model: nn.Module) -> tuple[float, float]:
    """How far two samples in a row are from each alone: were they to see each other, and as they are (rounding)."""
    ids = torch.tensor([[1, 2, 3, 4]], device=next(model.parameters()).device)
    alone = torch.cat([hidden_states(model, ids[:, :2]), hidden_states(model, ids[:, 2:])], 1).float()
    joined, together = hidden_states(model, ids), hidden_states(model, ids, runs=((2, 2),))
    return float((joined.float() - alone).norm()), float((together.float() - alone).norm())


MLP_PARTS = 4


def checkpoint_layers(model: nn.Module, *, frozen: bool) -> None:
    """Keeps of each decoder layer its input only, and computes it once more for the backward pass.

    What a layer then takes at once is mostly its MLP: gate, up, and as much again for their gradients. With `frozen`
    weights, which gather no gradients, its rows go through in parts, whose gradients' work space is a part as large.
    """
    inner = causal(model)
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in getattr(inner.base_model, "layers", ()) if frozen else ():
        mlp = getattr(layer, "mlp", None)
        if mlp is not None and all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")):
            mlp.forward = _in_parts(mlp.forward)


def _in_parts(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def parts(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(x)
        return torch.cat([forward(rows) for rows in x.flatten(0, -2).chunk(MLP_PARTS)]).reshape(x.shape)

    return parts


def compile_layers(model: nn.Module) -> None:
    """Compiles the decoder layers (one graph for all of them, any length); the first calls take their time.

    What is left of a transformers layer after its matrix products, norms, rotations and activations each a kernel of
    their own, is a third of its time (measured: benchmarks/scoring.py, benchmarks/training.py).
    """
    for layer in causal(model).base_model.layers:
        layer.forward = _compiled(layer)


def _compiled(layer: nn.Module) -> Callable[..., Any]:
    """The layer's forward pass; what repeats it in the backward pass stays outside of the graph.

    transformers repeats a layer in its `forward` (5.23) or in its `__call__` (5.17).
    """
    repeats = getattr(type(layer).forward, "__code__", None)
    if repeats is None or repeats.co_name != "forward_with_checkpointing":
        return torch.compile(layer.forward, dynamic=True)
    plain = inspect.unwrap(type(layer).forward, stop=_is_plain)
    inner = torch.compile(MethodType(plain, layer), dynamic=True)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if layer.gradient_checkpointing and layer.training:
            return layer._gradient_checkpointing_func(partial(inner, **kwargs), *args)  # type: ignore[operator]
        return inner(*args, **kwargs)

    return forward


def _is_plain(function: Any) -> bool:
    return function.__code__.co_name != "forward_with_checkpointing"


def is_compiled(model: nn.Module) -> bool:
    layers = getattr(causal(model).base_model, "layers", None) or [model]
    return "forward" in vars(layers[0])


def head_weight(model: nn.Module) -> Tensor:
    """The head's weight [V, H], with trained rows of special tokens put in."""
    head = causal(model).get_output_embeddings()
    adapter = getattr(head, "token_adapter", None)
    if adapter is None:
        return head.weight
    return adapter.get_merged_weights(adapter.active_adapters)


def check_plain_head(model: nn.Module) -> None:
    """Raises TaskError when the model does more to its logits than head @ hidden (scaling, soft caps, a bias)."""
    ids = torch.tensor([[1, 2, 3, 4]], device=next(model.parameters()).device)
    training = model.training
    model.eval()
    with torch.no_grad():
        whole = causal(model)(input_ids=ids).logits.float()
        ours = (hidden_states(model, ids) @ head_weight(model).T).float()
    model.train(training)
    if not torch.allclose(whole, ours, rtol=1e-2, atol=1e-2 * whole.abs().max().item()):
        raise TaskError(
            "this model changes its logits after the head (scaling, soft cap or bias)",
            hint="take a model of the Qwen2 or Llama family",
        )


def quiet() -> None:
    """No progress bars and no advice of the libraries in the log."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
