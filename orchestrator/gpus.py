"""What is known of GPUs? Memory, speed and bandwidth, nominal and reached, every number with its source. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Figure:
    """A number and where it was read."""

    value: float
    source: str


@dataclass(frozen=True)
class Gpu:
    """One card, by SkyPilot's name. Rates in 1e12 operations/s, bandwidths in 1e9 bytes/s.

    `vram_gib`: memory that PyTorch can use of it. `half_tflops`: dense matrix products as the vendor states them, in
    bf16, or in fp16 where there is no bf16, with fp32 accumulation. `reached_*`: what large products and copies reach
    by others' measurement, or a share of the data sheet that the source states. `link_gb_s`: bus bandwidth of NCCL to
    the other cards of its host. `processors`: streaming multiprocessors; `cache_mb`: L2, 1e6 bytes.
    """

    name: str
    vram_gib: Figure
    half_tflops: Figure
    reached_tflops: Figure
    fp32_tflops: Figure
    bandwidth_gb_s: Figure
    reached_gb_s: Figure
    link_gb_s: Figure
    processors: Figure
    cache_mb: Figure
    bf16: bool = True

    @property
    def figures(self) -> tuple[Figure, ...]:
        return (
            self.vram_gib,
            self.half_tflops,
            self.reached_tflops,
            self.fp32_tflops,
            self.bandwidth_gb_s,
            self.reached_gb_s,
            self.link_gb_s,
            self.processors,
            self.cache_mb,
        )


_OOM = "total capacity as PyTorch's out-of-memory messages give it for this card"
_GA102 = "NVIDIA GA102 architecture white paper"
_ADA = "NVIDIA Ada architecture white paper"
_SIZES = "torch.matmul of 1024 to 10240, github.com/zzc0721/torch-performance-test-data"
_COPY = "matmul and copy timed by github.com/chsasank/device-benchmarks (README)"
_MAMF = "maximum achievable matmul, github.com/stas00/ml-engineering (compute/accelerator)"
_MLI = "micro-benchmarks of github.com/mli/transformers-benchmarks (README)"
_GDDR_SHARE = "0.80 of nominal: what the same memory reaches on an A10 (469 of 600), an RTX 3090 0.89 (831 of 936)"
_HBM_SHARE = (
    "0.85 of nominal: a V100 copies at 766 of 900, row kernels run at 3900 of 4800 on an H200 (benchmarks/README.md)"
)
_NVLINK_A100 = "all_reduce_perf of eight and of two cards: 200 and 208 (github.com/NVIDIA/nccl-tests, issues 149, 178)"
_NVLINK_H100 = "what protocols leave of 450, by NCCL's maintainer (github.com/NVIDIA/nccl-tests, issue 212)"
_NVLINK_V100 = "0.68 of the one-way rate of 150, as an A100 reaches of its 300"
_PCIE4 = "PCIe 4.0 x16 between two cards: 0.6 of 32 GB/s, assumed"
_PCIE3 = "PCIe 3.0 x16: 0.6 of 16 GB/s, assumed"
_NO_P2P = "no peer access on GeForce cards, every byte goes through host memory: half of PCIe 4.0, assumed"


def _gpu(
    name: str,
    vram_gib: float,
    half: tuple[float, str],
    reached: tuple[float, str],
    fp32: tuple[float, str],
    nominal_gb_s: float,
    reached_gb_s: tuple[float, str],
    link: tuple[float, str],
    processors: int,
    cache_mb: float,
    *,
    vram: str = _OOM,
    bf16: bool = True,
) -> Gpu:
    return Gpu(
        name,
        Figure(vram_gib, vram),
        Figure(*half),
        Figure(*reached),
        Figure(*fp32),
        Figure(nominal_gb_s, half[1]),
        Figure(*reached_gb_s),
        Figure(*link),
        Figure(processors, half[1]),
        Figure(cache_mb, half[1]),
        bf16,
    )


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu(
            "T4",
            14.6,
            (65, "NVIDIA T4 data sheet (fp16)"),
            (26, "0.4 of nominal, assumed: 42 for a moment (" + _SIZES + ", arXiv:1903.07486), then 70 W throttle it"),
            (4.3, _SIZES),
            320,
            (240, _COPY),
            (9.6, _PCIE3),
            40,
            4,
            bf16=False,
        ),
        _gpu(
            "V100",
            15.7,
            (125, "NVIDIA V100 SXM2 16 GB data sheet (fp16)"),
            (95, _MLI),
            (13.5, _SIZES),
            900,
            (766, _COPY),
            (102, _NVLINK_V100),
            80,
            6,
            bf16=False,
        ),
        _gpu(
            "V100-32GB",
            31.7,
            (125, "NVIDIA V100 SXM2 32 GB data sheet (fp16)"),
            (84, _COPY),
            (13.5, _SIZES),
            900,
            (766, _COPY),
            (102, _NVLINK_V100),
            80,
            6,
            bf16=False,
        ),
        _gpu(
            "L4",
            22.0,
            (121, "NVIDIA L4 data sheet (half of the figure with sparsity)"),
            (58, _SIZES + ", issue 120: 59 and 57 at the two largest sizes, 71 for a moment"),
            (11, _SIZES + ", issue 120"),
            300,
            (240, _GDDR_SHARE),
            (19, _PCIE4),
            58,
            48,
        ),
        _gpu(
            "A10",
            22.0,
            (125, "NVIDIA A10 data sheet"),
            (56, _COPY),
            (14, _COPY),
            600,
            (469, _COPY),
            (19, _PCIE4),
            72,
            6,
        ),
        _gpu(
            "A10G",
            22.0,
            (70, "NVIDIA A10G data sheet (70 dense against 125 for the A10)"),
            (66, _SIZES + ", issue 126: 62 to 69 from 4096 on"),
            (23, _SIZES + ", issue 126"),
            600,
            (480, _GDDR_SHARE),
            (19, _PCIE4),
            80,
            6,
        ),
        _gpu(
            "RTX3090",
            23.6,
            (71, _GA102),
            (76, _SIZES + " (its clock is above the nominal one)"),
            (24.5, _SIZES),
            936,
            (831, _COPY),
            (4, _NO_P2P + "; mostly on boards with 8 lanes a card"),
            82,
            6,
        ),
        _gpu(
            "RTX4090",
            23.6,
            (165, _ADA),
            (160, _SIZES + ", issue 78: 160 and 159 at the two largest sizes"),
            (53, _SIZES + ", issue 78"),
            1008,
            (912, _COPY),
            (8, _NO_P2P),
            128,
            72,
        ),
        _gpu(
            "A6000",
            47.4,
            (155, "NVIDIA RTX A6000 data sheet (half of the figure with sparsity)"),
            (123, _SIZES),
            (23.9, _SIZES),
            768,
            (614, _GDDR_SHARE),
            (19, _PCIE4),
            84,
            6,
        ),
        _gpu(
            "L40S",
            44.4,
            (362, "NVIDIA L40S data sheet (half of the figure with sparsity)"),
            (269, _SIZES),
            (46.9, _SIZES),
            864,
            (691, _GDDR_SHARE),
            (19, _PCIE4),
            142,
            96,
        ),
        _gpu(
            "A100",
            39.4,
            (312, "NVIDIA A100 40 GB data sheet"),
            (246, _SIZES),
            (18, _SIZES),
            1555,
            (1320, _HBM_SHARE),
            (205, _NVLINK_A100),
            108,
            40,
        ),
        _gpu(
            "A100-80GB",
            79.1,
            (312, "NVIDIA A100 80 GB PCIe data sheet (SXM: 2039 GB/s)"),
            (253, _MAMF + ", PCIe form: 253 to 256"),
            (19, _COPY),
            1935,
            (1640, _HBM_SHARE),
            (205, _NVLINK_A100),
            108,
            40,
        ),
        _gpu(
            "A100-80GB-SXM",
            79.1,
            (312, "NVIDIA A100 80 GB SXM data sheet"),
            (266, _MAMF + ", SXM form: 268; " + _SIZES + ": 264.5"),
            (19.2, _SIZES),
            2039,
            (1735, _HBM_SHARE),
            (205, _NVLINK_A100),
            108,
            40,
        ),
        _gpu(
            "H100",
            79.1,
            (756, "NVIDIA H100 PCIe data sheet, the slower of the two forms"),
            (530, "0.7 of nominal: limited to 350 W, the SXM form reaches 0.8 of its own with 700 W"),
            (40, "0.8 of the data sheet's 51, as the SXM form reaches of its own"),
            2000,
            (1700, _HBM_SHARE),
            (30, "PCIe 5.0 x16 between two cards: 0.5 of 64 GB/s, assumed"),
            114,
            50,
        ),
        _gpu(
            "H100-SXM",
            79.1,
            (989, "NVIDIA H100 SXM data sheet (half of the figure with sparsity)"),
            (786, _SIZES + ": 784 to 789; " + _MAMF + ": 792"),
            (52, _SIZES),
            3350,
            (2850, _HBM_SHARE),
            (370, _NVLINK_H100),
            132,
            50,
        ),
        _gpu(
            "H200",
            139.7,
            (989, "NVIDIA H200 data sheet (half of the figure with sparsity)"),
            (790, _SIZES),
            (51, _SIZES),
            4800,
            (3900, "row kernels over 5 and 7.5 GB of logits (benchmarks/README.md)"),
            (370, _NVLINK_H100),
            132,
            50,
        ),
    )
}

_OTHER_NAMES = {
    "A100-40GB": "A100",
    "A100-SXM4-40GB": "A100",
    "A100-80GB-SXM4": "A100-80GB-SXM",
    "A800": "A100-80GB-SXM",  # the same chip with two thirds of the links
    "H800": "H100-SXM",
    "A100-SXM4-80GB": "A100-80GB-SXM",
    "H100-PCIE": "H100",
    "H100-SXM5": "H100-SXM",
    "H100-80GB-HBM3": "H100-SXM",
    "H200-SXM": "H200",
    "RTXA6000": "A6000",
    "RTX-A6000": "A6000",
    "RTX-3090": "RTX3090",
    "RTX-4090": "RTX4090",
    "V100-16GB": "V100",
    "TESLA-T4": "T4",
}


def gpu_named(name: str, instance: str = "") -> Gpu | None:
    """The card of that name as clouds and papers write it; None when it is not known.

    `instance` tells the two forms of an A100-80GB and an H100 apart where it names one (SXM, PCIe).
    """
    return _gpu_named(name, "SXM" in instance.upper())


@lru_cache(1024)
def _gpu_named(name: str, sxm: bool) -> Gpu | None:
    plain = name.strip().upper().removeprefix("NVIDIA").strip(" -_").replace(" ", "-").replace("_", "-")
    found = GPUS.get(_OTHER_NAMES.get(plain, plain))
    if found is not None and sxm:
        return GPUS.get(f"{found.name}-SXM", found)
    return found
