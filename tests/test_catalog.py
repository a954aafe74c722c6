"""What is known of GPUs and models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.catalog import GPUS, MODELS, UnknownModel, shape_of

# Sums of the sizes of all tensors, as the publishers' safetensors indexes give them.
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-32B": 32_762_123_264,
}


@pytest.mark.parametrize(("name", "params"), PUBLISHED.items())
def test_parameters_counted_from_the_shape_are_the_published_ones(name: str, params: int) -> None:
    assert shape_of(name).params == params


def test_a_tiny_model_has_the_parameters_that_its_matrices_have(tmp_path: Path) -> None:
    # embedding 10*8 + norm 8 + layer: q 8*8+8, k and v 8*4+4 each, o 8*8, mlp 3*8*16, norms 2*8
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "qwen2",
                "hidden_size": 8,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": 10,
                "tie_word_embeddings": True,
            }
        )
    )
    assert shape_of(str(tmp_path)).params == 80 + 8 + 72 + 36 + 36 + 64 + 384 + 16


def test_lora_counts_both_matrices_of_each_target() -> None:
    # 28 layers, r 8: q 1536+1536, k and v 1536+256 each
    assert shape_of("Qwen/Qwen2.5-1.5B").lora_params(8, ("q_proj", "k_proj", "v_proj")) == 28 * 8 * (3072 + 1792 + 1792)


def test_names_are_found_whatever_their_case() -> None:
    assert shape_of("qwen/qwen2.5-1.5b") is MODELS["Qwen/Qwen2.5-1.5B"]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("deepseek-ai/DeepSeek-R1-Distil-Qwen-7B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"),
        ("Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B"),
        ("someone/else", ""),
    ],
)
def test_an_unknown_model_names_the_nearest_and_the_file_that_would_do(name: str, near: str) -> None:
    with pytest.raises(UnknownModel) as caught:
        shape_of(name)
    assert name in caught.value.message
    assert near in caught.value.hint and "config.json" in caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "text",
    ['{"model_type": "mamba"}', '{"model_type": "llama"}', "[]", "{", '{"model_type": "llama", "hidden_size": "8"}'],
)
def test_a_config_that_tells_no_shape_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnknownModel):
        shape_of(str(tmp_path))


def test_every_number_has_a_source() -> None:
    figures = [figure for gpu in GPUS.values() for figure in (gpu.vram_gib, gpu.half_tflops, gpu.bandwidth_gb_s)]
    assert len(figures) == 3 * 13
    assert all(figure.source and figure.value > 0 for figure in figures)
    assert all(shape.source for shape in MODELS.values())


def test_a_card_never_offers_more_memory_than_is_soldered_on() -> None:
    soldered_gb = {
        "T4": 16,
        "V100": 16,
        "L4": 24,
        "A10": 24,
        "A10G": 24,
        "RTX3090": 24,
        "RTX4090": 24,
        "A6000": 48,
        "L40S": 48,
        "A100": 40,
        "A100-80GB": 80,
        "H100": 80,
        "H200": 141,
    }
    assert set(soldered_gb) == set(GPUS)
    for name, gpu in GPUS.items():
        assert 0.9 * soldered_gb[name] < gpu.vram_gib.value < soldered_gb[name]
