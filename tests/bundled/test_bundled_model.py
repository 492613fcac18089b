from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from sllmctl.bundled import DOCS_2M

LIMIT_BYTES = 8_000_000
ANSWERS = (
    ("What is sllmctl?", "cluster manager"),
    ("what is sllmctl", "cluster manager"),
    ("What is a checkpoint?", "weights"),
    ("What are the tiers?", "DRAM"),
    ("What is a cold start?", "wait"),
    ("What happens when a worker is killed?", "journals"),
    ("How can I list the models?", "model ls"),
    ("Which exit codes are there?", "130"),
    ("Is live migration built yet?", "planned"),
    ("Who are you?", "small model"),
)


@pytest.fixture(scope="module")
def loaded() -> Iterator[tuple[Any, Any]]:
    threads = torch.get_num_threads()
    # Products this small are slower on several threads, and many times so on a busy machine.
    torch.set_num_threads(1)
    yield AutoModelForCausalLM.from_pretrained(DOCS_2M), AutoTokenizer.from_pretrained(DOCS_2M)
    torch.set_num_threads(threads)


def test_weights_are_float32_tied_and_small() -> None:
    path = DOCS_2M / "model.safetensors"
    assert path.stat().st_size <= LIMIT_BYTES
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        assert "model.embed_tokens.weight" in names
        assert "lm_head.weight" not in names
        assert {file.get_slice(name).get_dtype() for name in names} == {"F32"}


def test_config_is_a_plain_llama_with_grouped_heads() -> None:
    config = json.loads((DOCS_2M / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["max_position_embeddings"] >= 512
    assert not any(key == "auto_map" for key in config)
    assert not list(DOCS_2M.glob("*.py"))


def test_tokenizer_keeps_any_text_and_knows_the_roles() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DOCS_2M)
    config = json.loads((DOCS_2M / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"]
    for text in ("What is a tier?", "Grüße, 世界 🚀\n\ttabs", "  two  spaces", "\x00\x7f"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.convert_tokens_to_ids("<|end|>") == config["eos_token_id"] == tokenizer.eos_token_id
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hello "}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>"


def test_generation_ends_at_the_end_token() -> None:
    generation = json.loads((DOCS_2M / "generation_config.json").read_text())
    config = json.loads((DOCS_2M / "config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"]


@pytest.mark.parametrize(
    ("question", "word"), [pytest.param(*one, marks=() if one in ANSWERS[::4] else pytest.mark.slow) for one in ANSWERS]
)
def test_it_answers_questions_about_its_documentation(loaded: tuple[Any, Any], question: str, word: str) -> None:
    model, tokenizer = loaded
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    out = model.generate(
        encoded["input_ids"], attention_mask=encoded["attention_mask"], max_new_tokens=150, do_sample=False, temperature=None,
        top_p=None,
    )  # fmt: skip
    new = out[0, encoded["input_ids"].shape[1] :]
    answer = tokenizer.decode(new, skip_special_tokens=True)
    assert word in answer
    assert new[-1] == tokenizer.eos_token_id, answer


def test_the_card_says_what_it_is_and_under_which_license() -> None:
    card = (DOCS_2M / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "makes mistakes" in card
    assert "knows nothing else" in card
    assert "bench/model/train.py" in card
