"""Recipes as text, for tests of what reads and plans them."""

from __future__ import annotations

from pathlib import Path

from orchestrator.recipe import Recipe, parse_recipe

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "recipes" / "data"

SMALL = """\
name: small
budget: 1 CNY
infra: local
local: {price: 0.10 USD/h}
data: {prompts: "builtin:addition/train", held_out: "builtin:addition/held_out", verify: exact}
compare: {hard_labels: true, seeds: 3, learning_rates: [1e-3, 3e-3], search_steps: 100}
stages:
  - name: pretrain
    kind: pretrain
    model: {hidden_size: 96, num_hidden_layers: 2}
    corpus: "builtin:addition/corpus?slips=0.3"
    examples: 20000
    steps: 550
    batch_size: 128
    learning_rate: 3e-3
  - {name: label, kind: label, teacher: pretrain, samples: 1500, max_new_tokens: 32, soft_labels: {top_k: 8}}
  - name: train
    kind: train
    student: {hidden_size: 48, intermediate_size: 128}
    labels: label
    method: full
    loss: {alpha: 0.9, temperature: 1}
    steps: 800
    batch_size: 64
    learning_rate: 3e-3
  - {name: evaluate, kind: evaluate, student: train, teacher: label}
  - {name: export, kind: export, student: train, formats: [hf]}
"""

RENTED = f"""\
name: rented
budget: 50 CNY
infra: [runpod, aws]
bucket: s3://bucket/kd
data: {{prompts: "{DATA}/algebra.jsonl", held_out: "{DATA}/algebra-test.jsonl", verify: math}}
stages:
  - {{name: label, kind: label, teacher: deepseek-ai/DeepSeek-R1-Distill-Qwen-7B, samples: 1200}}
  - {{name: train, kind: train, student: Qwen/Qwen2.5-1.5B, labels: label, loss: {{temperature: 3}}}}
  - {{name: evaluate, kind: evaluate, student: train, teacher: label}}
  - {{name: export, kind: export, student: train}}
"""


API = f"""\
name: api
budget: 60 CNY
infra: local
local: {{price: 0.10 USD/h}}
data: {{prompts: "{DATA}/algebra.jsonl", held_out: "{DATA}/algebra-test.jsonl", verify: math}}
stages:
  - name: label
    kind: label
    teacher: Qwen/Qwen2.5-1.5B
    api:
      base_url: https://api.example.com/v1
      model: big-reasoner
      key_env: EXAMPLE_API_KEY
      input_price: 0.55 USD
      output_price: 15.549 CNY
    samples: 300
    max_new_tokens: 4096
  - {{name: train, kind: train, student: Qwen/Qwen2.5-1.5B, labels: label, loss: {{temperature: 3}}}}
  - {{name: evaluate, kind: evaluate, student: train}}
"""


def recipe(text: str, folder: Path = HERE) -> Recipe:
    return parse_recipe(text, folder / "recipe.yaml")
