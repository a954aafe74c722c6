"""How long single kernels take: rooflines as tables of sums."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.duration_kernels import all_reduce_s, attention_s, memory_s, product_s, products_s
from orchestrator.gpus import GPUS, Gpu

A100, H200, RTX4090 = GPUS["A100-80GB-SXM"], GPUS["H200"], GPUS["RTX4090"]
CARDS = st.sampled_from(list(GPUS.values()))
SIZES = st.integers(1, 20_000)


def test_a_large_product_runs_at_the_measured_rate() -> None:
    """8192 cubed on an A100: 64 x 64 tiles on 108 processors are 37.9 waves; 1.0995e12 operations at 0.9 x 266e12."""
    waves = 64 * 64 / 108
    expected = 2 * 8192**3 / (0.9 * 266e12 * waves / (waves + 0.2)) + 4e-6
    assert product_s(A100, 8192, 8192, 8192) == pytest.approx(expected)


def test_a_product_of_few_rows_reads_its_weights() -> None:
    """One row: 4096 x 4096 weights of 2 bytes and two rows, at 1735 GB/s."""
    assert product_s(A100, 1, 4096, 4096) == pytest.approx(2 * (4096 * 4096 + 2 * 4096) / 1735e9 + 4e-6)


def test_the_heads_products_on_an_h200_take_what_was_measured() -> None:
    """Forward 6.3 ms, backward 5.3 and 6.7 for 8192 x 1536 x 151936; the last one adds to what is there, 1.6 ms
    (benchmarks/README.md)."""
    three = products_s(H200, 8192, [(1536, 151936)] * 3)
    assert three == pytest.approx((6.3 + 5.3 + 6.7 - 1.6) / 1e3, rel=0.05)


@given(CARDS, SIZES, SIZES, SIZES, st.booleans())
def test_a_larger_product_never_takes_less(card: Gpu, m: int, k: int, n: int, half: bool) -> None:
    small = product_s(card, m, k, n, half=half)
    assert product_s(card, m, 2 * k, n, half=half) >= small
    assert product_s(card, 2 * m, k, 2 * n, half=half) >= small * 0.999
    assert small >= 2 * m * k * n / (card.reached_tflops.value * 1e12)


def test_what_the_cache_holds_is_not_read_again() -> None:
    """Two tensors of 36 MB fill the 72 MB of an RTX 4090: half the bytes stay there; with 72 MB each a quarter does."""
    slow = 912e9 * 0.75
    assert memory_s(RTX4090, 1e9) == pytest.approx(1e9 / slow)
    assert memory_s(RTX4090, 1e9, 36e6) == pytest.approx(0.5e9 / slow)
    assert memory_s(RTX4090, 1e9, 72e6) == pytest.approx(0.75e9 / slow)
    assert memory_s(RTX4090, 1e9, 72e6, kernels=1000) == pytest.approx(0.75e9 / slow + 4e-3)


def test_attention_is_quadratic_and_eager_attention_goes_through_memory() -> None:
    """Fused: 2 x tokens x length x width operations, half of the square; eager: all of it, and 24 bytes a score."""
    one = attention_s(A100, 2048, 2048, 4096, eager=False, half=True, heads=32)
    assert one == pytest.approx(2 * 2048 * 2048 * 4096 / (266e12 * 0.71 * 2048 / 2798))
    assert 3 * one < attention_s(A100, 4096, 4096, 4096, eager=False, half=True, heads=32) < 4 * one
    eager = attention_s(A100, 2048, 2048, 4096, eager=True, half=True, heads=32)
    assert eager == pytest.approx(4 * 2048 * 2048 * 4096 / (266e12 * 0.6) + 2048 * 2048 * 32 * 24 / (1735e9 * 0.75))


def test_traffic_of_a_ring() -> None:
    """Eight ranks pass 2 x 7/8 of the bytes; one passes none."""
    assert all_reduce_s(A100, 22e9, 8) == pytest.approx(2 * 7 / 8 * 22 / 205)
    assert all_reduce_s(A100, 22e9, 1) == 0.0
