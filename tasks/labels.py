"""How are teacher labels stored? Shards of safetensors with a header, and the set of them that training reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tasks.contract import TaskError

LABELS_SCHEMA = 2  # 1 kept ids as int32: 396 bytes a token
TOKENIZER_FOLDER = "tokenizer"
SOFT = ("topk_ids", "topk_logprobs", "log_tail_mass", "log_mass_at_t")
PACKED_ROWS = 2048  # packed together: at k = 64 half a MiB of ids
LOWEST_8_BIT = -40.0  # log-probability; below it 8 bit are clamped


@dataclass(frozen=True)
class Header:
    """What every label of a shard has in common. Shards of one stage have equal headers."""

    teacher: str
    ordinary_sha256: str  # id -> bytes of the ordinary vocabulary
    special_sha256: str  # special tokens and template
    top_k: int  # 0 = hard labels only
    temperature: float  # T of log_mass_at_t
    vocabulary: int  # every id is below it
    logprob_bits: int = 16  # or 8
    schema: int = LABELS_SCHEMA

    @property
    def id_bits(self) -> int:
        """Bits of a packed id: as few as hold the vocabulary and, all ones, the empty place of a short row."""
        return self.vocabulary.bit_length()


@dataclass(frozen=True)
class Sample:
    """One kept completion with its soft labels; row j is the teacher's distribution of completion_ids[j]."""

    key: str
    prompt_ids: Tensor  # [P]
    completion_ids: Tensor  # [C], end of sequence included
    topk_ids: Tensor  # [C, k] int32, -1 where there are fewer than k
    topk_logprobs: Tensor  # [C, k] at T = 1, -inf where there are fewer
    log_tail_mass: Tensor  # [C] fp32, T = 1
    log_mass_at_t: Tensor  # [C] fp32


@dataclass(frozen=True)
class Rounding:
    """How far stored log-probabilities are from those that were told, measured as they were written."""

    values: int = 0
    total: float = 0.0
    worst: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / max(1, self.values)

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(self.values + other.values, self.total + other.total, max(self.worst, other.worst))


def shard_name(index: int) -> str:
    return f"labels-{index:05d}.safetensors"


# --- packing ---------------------------------------------------------------------------------------------------------


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """[N, k] integers as [N, ceil(k * bits / 8)] uint8: the low `bits` of value j are bits j * bits onwards.

    Any bits from 1 to 25: with its up to 7 bits of shift a value then lies within 4 bytes, and two of them within 8.
    """
    return torch.from_numpy(_packed(values.numpy(), bits))


def _packed(values: np.ndarray, bits: int) -> np.ndarray:
    """Two values side by side at a time: memory is passed over four times, not once for every byte of every value."""
    list(_lanes(bits))  # raises where it cannot be
    rows, k = values.shape
    groups = -(-k // 8)  # of eight values, in `bits` bytes
    whole = np.zeros((rows, 8 * groups), "<u4") if k % 8 else np.empty((rows, k), "<u4")
    whole[:, :k] = values.astype(np.int32, copy=False).view(np.uint32) & np.uint32((1 << bits) - 1)
    both = whole.view("<u8")  # [N, 4 * groups]: two values, 32 bits apart
    both = (both & 0xFFFFFFFF) | (both >> 32 << bits)
    if bits < 8:  # then a group is one word
        word = both[:, 0::4] | both[:, 1::4] << 2 * bits | both[:, 2::4] << 4 * bits | both[:, 3::4] << 6 * bits
        packed = word[:, :, None].view(np.uint8)[:, :, :bits].reshape(rows, groups * bits)
    else:  # words at least 8 bytes apart do not overlap
        flat = np.zeros(rows * groups * bits + 8, np.uint8)  # so that the last word ends inside
        for pair in range(4 if both.size else 0):
            first, shift = divmod(2 * bits * pair, 8)
            words = np.ndarray((rows, groups), "<u8", flat, first, (groups * bits, bits))
            words |= both[:, pair::4] << shift
        packed = flat[: rows * groups * bits].reshape(rows, groups * bits)
    return packed[:, : _width(k, bits)]


def unpack_bits(packed: Tensor, k: int, bits: int) -> Tensor:
    """The [N, k] int32 values of `pack_bits`."""
    return torch.from_numpy(_unpacked(packed.numpy(), k, bits))


def _unpacked(packed: np.ndarray, k: int, bits: int) -> np.ndarray:
    rows, width = packed.shape
    flat = np.append(packed, np.zeros(4, np.uint8))  # so that the last word ends inside
    values = np.empty((rows, k), np.int32)
    for lane, first, shift in _lanes(bits):
        out = values[:, lane::8]
        if out.size:
            words = np.ndarray(out.shape, "<u4", flat, first, (width, bits))  # unaligned; torch has no such view
            out[:] = (words >> shift) & ((1 << bits) - 1)
    return values


def _lanes(bits: int) -> Iterator[tuple[int, int, int]]:
    """Eight values fill `bits` bytes: (j, first byte, first bit there) of values j, j + 8, ... in each group."""
    if not 1 <= bits <= 25:
        raise ValueError(f"{bits} bits a value; 1 to 25 are possible")
    for lane in range(8):
        yield lane, *divmod(lane * bits, 8)


def _width(k: int, bits: int) -> int:
    return -(-k * bits // 8)


def _packed_ids(ids: np.ndarray, header: Header) -> np.ndarray:
    """An empty place, -1, becomes all ones."""
    if ids.size and not -1 <= ids.min() <= ids.max() < header.vocabulary:
        raise ValueError(f"an id is outside the vocabulary of {header.vocabulary}")
    return _packed(ids, header.id_bits)


def _packed_logprobs(logprobs: np.ndarray, bits: int) -> np.ndarray:
    if bits == 16:
        return np.maximum(logprobs, -65504.0).astype(np.float16)
    code = np.sqrt(np.clip(logprobs, LOWEST_8_BIT, 0.0) / np.float32(LOWEST_8_BIT)) * 255
    return np.rint(code).astype(np.uint8)


def _unpacked_logprobs(stored: np.ndarray) -> np.ndarray:
    if stored.dtype == np.float16:
        return stored.astype(np.float32)
    table = np.square(np.arange(256, dtype=np.float32) / 255) * np.float32(LOWEST_8_BIT)
    return table[stored]


# --- writing ---------------------------------------------------------------------------------------------------------


def write_shard(path: Path, header: Header, samples: Sequence[Sample]) -> None:
    """Writes one shard: ids packed into `id_bits`, masses fp32 (from rounded numbers they would be off by far).

    Log-probabilities in fp16 are within 0.05 % (below -65,504 clamped to there). In 8 bit, log p is
    -40 * (code / 255)^2, off by at most sqrt(40 * |log p|) / 255: 0.08 at -10. On peaked random rows, k = 64
    (tests/test_labels.py): fp16 mean 0.0018, worst 0.0078, and the loss moves by 3e-6 of itself at T = 1, 8e-8 at 2;
    8 bit mean 0.038, worst 0.13, the loss by 2e-4 and 2e-5.
    """
    if header.logprob_bits not in (8, 16):
        raise ValueError(f"{header.logprob_bits} bits a log-probability; 8 and 16 are possible")

    def joined(name: str, dtype: torch.dtype) -> Tensor:
        parts = [getattr(s, name) for s in samples]
        return torch.cat(parts).to(dtype) if parts else torch.zeros(0, dtype=dtype)

    ids, logprobs, rounding = _soft(samples, header)
    tensors = {
        "prompt_ids": joined("prompt_ids", torch.int32),
        "prompt_offsets": _offsets([len(s.prompt_ids) for s in samples]),
        "completion_ids": joined("completion_ids", torch.int32),
        "completion_offsets": _offsets([len(s.completion_ids) for s in samples]),
        "topk_ids": ids,
        "topk_logprobs": logprobs,
        "log_tail_mass": joined("log_tail_mass", torch.float32),
        "log_mass_at_t": joined("log_mass_at_t", torch.float32),
    }
    told = {"header": asdict(header), "keys": [s.key for s in samples], "rounding": asdict(rounding)}
    save_file(tensors, path, metadata={"kdcloud": json.dumps(told)})  # one key: safetensors keeps no order of several


def _soft(samples: Sequence[Sample], header: Header) -> tuple[Tensor, Tensor, Rounding]:
    """Packed ids and log-probabilities of all rows, [N, ...], and how far they are from the exact ones.

    A few samples at a time, so that what is computed stays in the processor's cache; and in the calling thread, since
    torch's own would wait for each other where others need the cores.
    """
    rows, k = sum(len(s.completion_ids) for s in samples), header.top_k
    ids = np.empty((rows, _width(k, header.id_bits)), np.uint8)
    logprobs = np.empty((rows, k), np.float16 if header.logprob_bits == 16 else np.uint8)
    at, part, rounding = 0, list[Sample](), Rounding()
    for i, sample in enumerate(samples):
        part.append(sample)
        n = sum(len(s.completion_ids) for s in part)
        if n >= PACKED_ROWS or i == len(samples) - 1:
            its_ids = np.concatenate([s.topk_ids.numpy() for s in part])
            exact = np.concatenate([s.topk_logprobs.numpy() for s in part])
            ids[at : at + n] = _packed_ids(its_ids, header)
            logprobs[at : at + n] = stored = _packed_logprobs(exact, header.logprob_bits)
            rounding += _rounding(exact, stored, its_ids >= 0)
            at, part = at + n, []
    return torch.from_numpy(ids), torch.from_numpy(logprobs), rounding


def _rounding(exact: np.ndarray, stored: np.ndarray, there: np.ndarray) -> Rounding:
    if not there.any():
        return Rounding()
    error = _unpacked_logprobs(stored)
    with np.errstate(invalid="ignore"):  # -inf less what stands for it, in empty places
        error -= exact
    np.abs(error, out=error)
    error[~there] = 0.0
    return Rounding(int(there.sum()), float(error.sum(dtype=np.float64)), float(error.max()))


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """All samples of a label stage, by key: sample i owns rows completion_offsets[i]:completion_offsets[i + 1].

    Token ids are in memory. Soft labels stay in the mapped shards, in the order of the files, until asked for.
    """

    header: Header
    rounding: Rounding | None  # of all shards; None: one of them does not tell
    keys: list[str]  # a prompt with several kept samples is there several times
    prompt_ids: Tensor
    prompt_offsets: Tensor
    completion_ids: Tensor
    completion_offsets: Tensor
    _shards: list[dict[str, np.ndarray]]  # SOFT of each, as stored
    _shard_rows: Tensor  # [shards + 1] rows of all shards before
    _starts: Tensor  # [samples] a sample's first row among the rows of all shards, end to end

    def __len__(self) -> int:
        return len(self.keys)

    def tokens(self, index: int) -> tuple[Tensor, Tensor]:
        """Prompt ids and completion ids of a sample."""
        p, c = (slice(*o[index : index + 2].tolist()) for o in (self.prompt_offsets, self.completion_offsets))
        return self.prompt_ids[p], self.completion_ids[c]

    def sample(self, index: int) -> Sample:
        rows = torch.arange(*self.completion_offsets[index : index + 2].tolist())
        return Sample(self.keys[index], *self.tokens(index), *self.soft_rows(rows))

    def soft_rows(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """topk_ids [N, k] int32, topk_logprobs [N, k], log_tail_mass [N], log_mass_at_t [N], fp32, of rows [N] int64.

        Reads these rows only, in the calling thread: torch's own threads would wait for each other where others
        need the cores. An empty place has id -1 and log-probability -inf.
        """
        at = self._places(rows)
        packed, stored, tail, mass = (self._stored(name, at) for name in SOFT)
        ids = _unpacked(packed, self.header.top_k, self.header.id_bits)
        logprobs = _unpacked_logprobs(stored)
        empty = ids == (1 << self.header.id_bits) - 1
        if empty.any():
            ids[empty] = -1
            logprobs[empty] = -np.inf
        return torch.from_numpy(ids), torch.from_numpy(logprobs), torch.from_numpy(tail), torch.from_numpy(mass)

    def log_tail_masses(self) -> Tensor:
        """log_tail_mass of all rows."""
        at = self._places(torch.arange(len(self.completion_ids)))
        return torch.from_numpy(self._stored("log_tail_mass", at))

    def _places(self, rows: Tensor) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(shard, which of `rows` it holds, their rows in it)."""
        wanted = rows.numpy()
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self.completion_ids):
            raise IndexError(f"rows are below {len(self.completion_ids)}")
        offsets, before = self.completion_offsets.numpy(), self._shard_rows.numpy()
        sample = np.searchsorted(offsets, wanted, side="right") - 1
        at = self._starts.numpy()[sample] + wanted - offsets[sample]
        shard = np.searchsorted(before, at, side="right") - 1
        order = shard.argsort(kind="stable")
        which, first = np.unique(shard[order], return_index=True)
        parts = zip(which.tolist(), np.split(order, first[1:]), strict=True) if len(wanted) else ()
        return [(index, places, at[places] - before[index]) for index, places in parts]

    def _stored(self, name: str, places: list[tuple[int, np.ndarray, np.ndarray]]) -> np.ndarray:
        """These rows of a tensor of the shards."""
        first = self._shards[0][name]
        found = np.empty((sum(len(to) for _, to, _ in places), *first.shape[1:]), first.dtype)
        for index, to, at in places:
            found[to] = self._shards[index][name][at]
        return found


def read_labels(folder: Path) -> Labels:
    """Every shard of `folder`, ordered by sample key, so that nothing depends on how the shards were cut.

    Raises TaskError when there are none, one is damaged, or they do not belong together.
    """
    paths = sorted(folder.glob("labels-*.safetensors"))
    if not paths:
        raise TaskError(f"{folder} holds no labels", hint="name a label stage under labels")
    headers: list[Header] = []
    keys: list[str] = []
    parts: list[dict[str, Tensor]] = []
    rounding: Rounding | None = Rounding()
    for path in paths:
        header, its_keys, tensors, its_rounding = _read_shard(path)
        rounding = rounding + its_rounding if rounding is not None and its_rounding is not None else None
        headers.append(header)
        keys += its_keys
        parts.append(tensors)
    if any(header != headers[0] for header in headers):
        raise TaskError(f"the shards in {folder} were made with different settings", hint="label again in a new run")
    if not keys:
        raise TaskError("no sample was kept, so there is nothing to learn from", hint="label more prompts")
    order = sorted(range(len(keys)), key=keys.__getitem__)
    prompts, prompt_offsets, _ = _in_order(parts, "prompt", order)
    completions, completion_offsets, starts = _in_order(parts, "completion", order)
    return Labels(
        headers[0], rounding, [keys[i] for i in order], prompts, prompt_offsets, completions, completion_offsets,
        [{name: part[name].numpy() for name in SOFT} for part in parts],
        _offsets([len(part["completion_ids"]) for part in parts]), starts,
    )  # fmt: skip


def _in_order(parts: list[dict[str, Tensor]], what: str, order: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids of all samples in `order`, their offsets, and where each sample began before."""
    ids = torch.cat([part[f"{what}_ids"] for part in parts])
    lengths = torch.cat([part[f"{what}_offsets"].diff() for part in parts])
    starts = (lengths.cumsum(0) - lengths)[order]
    offsets = _offsets(lengths[order].tolist())
    moved = (starts - offsets[:-1]).repeat_interleave(lengths[order]) + torch.arange(len(ids))
    return ids[moved], offsets, starts


def _read_shard(path: Path) -> tuple[Header, list[str], dict[str, Tensor], Rounding | None]:
    """Header, keys, tensors, which are views of the mapped file: read when used, and rounding where it is told."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise TaskError(f"{path.name} is damaged: {error}", hint="label again in a new run") from error
    if "kdcloud" not in metadata:
        raise TaskError(f"{path.name} has no header of kdcloud labels", hint="name a label stage under labels")
    told = json.loads(metadata["kdcloud"])
    raw = told["header"]
    if raw.get("schema") != LABELS_SCHEMA:
        raise TaskError(
            f"{path.name} has label schema {raw.get('schema')}, this kdcloud reads {LABELS_SCHEMA}",
            hint="label again in a new run, or use the kdcloud version that wrote it",
        )
    header = Header(**raw)
    rows = len(tensors["completion_ids"])
    shapes = {
        "topk_ids": (rows, _width(header.top_k, header.id_bits)), "topk_logprobs": (rows, header.top_k),
        "log_tail_mass": (rows,), "log_mass_at_t": (rows,), "completion_offsets": (len(told["keys"]) + 1,),
    }  # fmt: skip
    if any(tuple(tensors[name].shape) != shape for name, shape in shapes.items()):
        raise TaskError(f"{path.name} is damaged: its tensors do not fit together", hint="label again in a new run")
    return header, told["keys"], tensors, Rounding(**told["rounding"]) if "rounding" in told else None
