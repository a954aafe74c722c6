"""What is known of models."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from orchestrator.catalog import MODELS, UnknownModel, cached_config, shape_from_config, shape_of

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
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "deepseek-ai/DeepSeek-R1": 671_026_419_200,  # without the layer that predicts a second token
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "mistralai/Mistral-Nemo-Base-2407": 12_247_782_400,
    "mistralai/Mistral-Small-24B-Base-2501": 23_572_403_200,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "microsoft/phi-4": 14_659_507_200,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
}

# (config.json as far as it decides, published parameters)
CONFIGS = {
    "microsoft/phi-2": (
        {"model_type": "phi", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "vocab_size": 51200, "tie_word_embeddings": False},
        2_779_683_840,
    ),
    "EleutherAI/pythia-2.8b": (
        {"model_type": "gpt_neox", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "vocab_size": 50304, "tie_word_embeddings": False},
        2_775_208_960,
    ),
    "google/gemma-7b": (
        {"model_type": "gemma", "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28}
        | {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "vocab_size": 256000},
        8_537_680_896,
    ),
    "google/gemma-2-2b": (
        {"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
        | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000},
        2_614_341_888,
    ),
    "google/gemma-3-1b-pt": (
        {"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26}
        | {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144},
        999_885_952,
    ),
    "Qwen/Qwen1.5-MoE-A2.7B": (
        {"model_type": "qwen2_moe", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24}
        | {"num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 151936, "num_experts": 60}
        | {"num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
        14_315_784_192,
    ),
    "deepseek-ai/DeepSeek-V2-Lite": (
        {"model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944, "num_hidden_layers": 27}
        | {"num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 102400, "q_lora_rank": None}
        | {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
        | {"n_routed_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 1408, "n_shared_experts": 2}
        | {"first_k_dense_replace": 1},
        15_706_484_224,
    ),
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


def test_every_shape_has_a_source() -> None:
    assert len(MODELS) > 80
    assert all(shape.source for shape in MODELS.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_counted_from_a_config_are_the_published_ones(name: str) -> None:
    config, params = CONFIGS[name]
    assert shape_from_config(name, config).params == params


def test_a_vision_models_text_part_is_read() -> None:
    config, params = CONFIGS["google/gemma-3-1b-pt"]
    assert shape_from_config("x", {"model_type": "gemma3", "text_config": config}).params == params


def test_a_token_goes_through_its_experts_only() -> None:
    """128 experts of 768, 8 of them: 120 x 3 x 2048 x 768 a layer are not passed; the head's matrix is, once."""
    moe = MODELS["Qwen/Qwen3-30B-A3B"]
    idle = 48 * 120 * 3 * 2048 * 768
    assert moe.active_params == moe.params - idle - 151936 * 2048 - 2048
    assert 36e9 < MODELS["deepseek-ai/DeepSeek-R1"].active_params < 38e9  # "37B active" of the model card


def test_the_compressed_cache_is_small() -> None:
    """61 layers x (512 + 64) values x 2 bytes; Llama 3.1 8B: 2 x 32 layers x 8 heads x 128 x 2 bytes."""
    assert MODELS["deepseek-ai/DeepSeek-R1"].kv_bytes(2) == 61 * 576 * 2 == 70_272
    assert MODELS["meta-llama/Llama-3.1-8B"].kv_bytes(2) == 131_072


def cache(folder: Path, revision: str, config: dict[str, object]) -> Path:
    place = folder / "hub" / "models--org--tiny" / "snapshots" / revision
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(config))
    return place / "config.json"


def test_a_model_in_the_hubs_cache_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    config, params = CONFIGS["google/gemma-2-2b"]
    new = cache(tmp_path, "bbb", config)
    old = cache(tmp_path, "aaa", {"model_type": "mamba"})  # of another branch, fetched later
    os.utime(old, (2e9, 2e9))
    (tmp_path / "hub" / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "hub" / "models--org--tiny" / "refs" / "main").write_text("bbb")
    assert cached_config("org/tiny") == new != old
    assert shape_of("org/tiny").params == params


def test_offline_it_says_which_file_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    with pytest.raises(UnknownModel) as caught:
        shape_of("org/tiny")
    assert "hf download org/tiny config.json" in caught.value.hint
