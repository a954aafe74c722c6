"""What is known of cards."""

from __future__ import annotations

import pytest

from orchestrator.gpus import GPUS, gpu_named

SOLDERED_GB = {
    "T4": 16,
    "V100": 16,
    "V100-32GB": 32,
    "L4": 24,
    "A10": 24,
    "A10G": 24,
    "RTX3090": 24,
    "RTX4090": 24,
    "A6000": 48,
    "L40S": 48,
    "A100": 40,
    "A100-80GB": 80,
    "A100-80GB-SXM": 80,
    "H100": 80,
    "H100-SXM": 80,
    "H200": 141,
}


def test_every_figure_has_a_source() -> None:
    figures = [figure for gpu in GPUS.values() for figure in gpu.figures]
    assert len(figures) == 9 * 16
    assert all(len(figure.source) > 10 and figure.value > 0 for figure in figures)


def test_a_card_never_offers_more_memory_than_is_soldered_on() -> None:
    assert set(SOLDERED_GB) == set(GPUS)
    for name, gpu in GPUS.items():
        assert 0.9 * SOLDERED_GB[name] < gpu.vram_gib.value < SOLDERED_GB[name]


def test_no_card_reaches_more_than_it_could() -> None:
    """An RTX 3090's clock is above the one its nominal rate is given at, by up to a tenth."""
    for gpu in GPUS.values():
        assert 0.3 < gpu.reached_tflops.value / gpu.half_tflops.value < 1.1
        assert 0.7 < gpu.reached_gb_s.value / gpu.bandwidth_gb_s.value < 0.95
        assert gpu.fp32_tflops.value < gpu.reached_tflops.value


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("A100-40GB", "A100"),
        ("RTXA6000", "A6000"),
        ("NVIDIA L40S", "L40S"),
        ("rtx 3090", "RTX3090"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("V100-16GB", "V100"),
        ("MI300X", None),
        ("", None),
    ],
)
def test_a_card_is_known_however_its_name_is_written(written: str, name: str | None) -> None:
    found = gpu_named(written)
    assert (found.name if found else None) == name


def test_the_instance_tells_the_two_forms_of_a_card_apart() -> None:
    assert gpu_named("H100", "gpu_8x_h100_sxm5") is GPUS["H100-SXM"]
    assert gpu_named("H100", "gpu_1x_h100_pcie") is GPUS["H100"]
    assert gpu_named("A100-80GB", "gpu_8x_a100_80gb_sxm4") is GPUS["A100-80GB-SXM"]
    assert gpu_named("H200", "1x H200 SXM") is GPUS["H200"]
    assert GPUS["H100"].reached_tflops.value < GPUS["H100-SXM"].reached_tflops.value
