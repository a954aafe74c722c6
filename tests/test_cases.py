"""Cases of training and generation, read from JSON lines."""

from __future__ import annotations

import json
from typing import Any

import pytest

from orchestrator.cases import Case, CaseError, Lora, parse_case, parse_cases, read_cases

LLAMA: dict[str, Any] = {
    "name": "l",
    "architecture": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 10,
}
TRAIN: dict[str, Any] = {"id": "a", "task": "train", "model": LLAMA}


def case(**changes: Any) -> Case:
    return parse_case(json.dumps({**TRAIN, **changes}))


def test_what_a_line_leaves_out_is_not_known() -> None:
    made = case(method="lora", lora={"r": 8, "targets": ["q_proj", "lm_head"]}, batch_size=4, compile=False)
    assert made.lora == Lora(8, ("q_proj", "lm_head")) and made.batch_size == 4 and made.compile is False
    assert made.seq_len is None and made.gradient_checkpointing is None and made.measured is None


def test_a_shape_has_as_many_key_heads_and_values_a_head_as_its_config_implies() -> None:
    shape = case().shape
    assert (shape.kv_heads, shape.head_dim, shape.tied, shape.gated) == (4, 2, False, True)
    # embedding and head 10*8 each, norm 8, a layer: 4 matrices 8*8, mlp 3*8*16, norms 2*8
    assert shape.params == 160 + 8 + 2 * (256 + 384 + 16)
    # up and down only
    assert case(model={**LLAMA, "architecture": "phi"}).shape.params == 160 + 8 + 2 * (256 + 256 + 16)


def test_adapters_of_the_head_come_once_and_an_ungated_mlp_has_no_gate() -> None:
    targets = ("gate_proj", "up_proj", "lm_head")
    # 2 layers of gate and up, 8 in and 16 out, and the head, 8 in and 10 out; r 3
    assert case().shape.lora_params(3, targets) == 3 * (2 * 2 * 24 + 18)
    assert case(model={**LLAMA, "architecture": "phi"}).shape.lora_params(3, targets) == 3 * (2 * 24 + 18)


def test_published_parameters_count_where_the_layers_are_others() -> None:
    assert case(model={**LLAMA, "params": 1480}).shape.fixed_params is None  # what the shape gives
    strange = case(model={**LLAMA, "params": 5000}).shape
    assert (strange.params, strange.active_params) == (5000, 5000 - 80)
    # 1400 = the same model tied; as run it has a head of its own
    assert case(model={**LLAMA, "params": 1400}).shape.params == 1480


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": "sleep"}, "task is 'sleep', not one of train, generate"),
        ({"batch_size": 0}, "batch_size is 0, not above 0"),
        ({"batch_size": 1.5}, "batch_size is 1.5, not a whole number"),
        ({"compile": 1}, "compile is 1, not true or false"),
        ({"model": {**LLAMA, "hidden_size": None}}, "model: hidden_size is missing"),
        ({"lora": {"r": 8, "targets": "all"}}, "lora: targets is 'all', not a list of names"),
        ({"measured": {"memory_basis": "guessed"}}, "measured: memory_basis is 'guessed'"),
    ],
)
def test_a_wrong_value_names_its_line_and_key(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CaseError, match="cases line 2") as error:
        parse_cases([json.dumps(TRAIN), json.dumps({**TRAIN, "id": "b", **changes})])
    assert says in error.value.message


def test_an_id_comes_once_and_empty_lines_do_not_count() -> None:
    line = json.dumps(TRAIN)
    with pytest.raises(CaseError, match="line 3: id 'a' is that of line 1"):
        parse_cases([line, "", line])
    with pytest.raises(CaseError, match="line 1: not JSON"):
        parse_cases(["{"])
    with pytest.raises(CaseError, match="cannot read"):
        read_cases("/nowhere/cases.jsonl")


def test_keys_that_nothing_uses_are_told() -> None:
    assert case(tensor_parallel=2, source="x").unused == ("tensor_parallel",)
