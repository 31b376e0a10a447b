"""Prompts for a policy are cut from preference data of every form, once each, and never too long."""

from pathlib import Path
from typing import Any

import pytest
from conftest import hh_pairs, write_jsonl
from datasets import Dataset
from trl import ScriptArguments

from reward_recipes.pairs import load_tokenizer
from reward_recipes.policy.prompts import PolicyArguments, load_prompts
from reward_recipes.run import UserError

TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


def prompts_of(
    rows: list[dict[str, Any]], folder: Path, model: Path, limit: int = 100, split: str = "train"
) -> Dataset:
    path = write_jsonl(folder / "data.jsonl", rows)
    script = ScriptArguments(dataset_name=str(path), dataset_train_split=split)
    return load_prompts(script, PolicyArguments(max_prompt_length=limit), load_tokenizer(str(model)))[0]


def test_a_dialogue_is_cut_after_its_last_assistant_mark(gpt2_dir: Path, tmp_path: Path) -> None:
    first = "\n\nHuman: A?\n\nAssistant: B.\n\nHuman: C?\n\nAssistant:"
    prompts = prompts_of([{"chosen": first + " D.", "rejected": first + " E."}, *hh_pairs(1)], tmp_path, gpt2_dir)
    assert prompts.column_names == ["prompt", "input_ids"]
    assert list(prompts["prompt"]) == [first, hh_pairs(1)[0]["chosen"].partition(" It is")[0]]


def test_prompts_come_once_and_long_ones_not_at_all(gpt2_dir: Path, tmp_path: Path) -> None:
    rows = [{"prompt": text, "chosen": "a", "rejected": "b"} for text in ("Why?", "How?", "Why?", "", "Long? " * 50)]
    assert list(prompts_of(rows, tmp_path, gpt2_dir, limit=20)["prompt"]) == ["Why?", "How?"]


def test_conversational_prompts_open_a_reply(chat_dir: Path, tmp_path: Path) -> None:
    """Text before messages is a user's turn, as in training."""
    for row in ({"chosen": TURNS}, {"prompt": "Why?", "chosen": TURNS}, {"prompt": "Why?", "chosen": TURNS[1:]}):
        (found,) = prompts_of([row | {"rejected": row["chosen"]}], tmp_path, chat_dir)
        assert found["prompt"] == TURNS[:1]
        opened = load_tokenizer(str(chat_dir)).decode(found["input_ids"])
        assert opened == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"


def test_a_source_without_prompts_says_so(gpt2_dir: Path, tmp_path: Path) -> None:
    for row, options, complaint in (
        ({"text": "a"}, {}, r"'prompt' or 'chosen', found \['text'\]"),
        ({"prompt": "A long prompt."}, {"limit": 2}, "of at most 2 tokens"),
        ({"prompt": "A prompt."}, {"split": "other"}, r"'other', found \['train'\]"),
        ({"chosen": TURNS, "rejected": TURNS}, {}, "need a chat template"),
        ({"chosen": "no mark", "rejected": "none"}, {}, "found 0 of which none fits; add a column 'prompt'"),
    ):
        with pytest.raises(UserError, match=complaint):
            prompts_of([row], tmp_path, gpt2_dir, **options)
