"""Prompts for a policy, cut from preference data of every form."""

from pathlib import Path

import pytest
from conftest import hh_pairs, write_jsonl
from trl import ScriptArguments

from reward_recipes.pairs.tokens import load_tokenizer
from reward_recipes.policy.prompts import load_prompts
from reward_recipes.run.errors import UserError


def prompts_of(rows: list[dict[str, object]], folder: Path, tokenizer: Path, limit: int = 100) -> list[object]:
    path = write_jsonl(folder / "data.jsonl", rows)
    script = ScriptArguments(dataset_name=str(path))
    prompts = load_prompts(script, None, load_tokenizer(str(tokenizer)), limit)
    assert prompts.column_names == ["prompt", "input_ids"]
    return list(prompts["prompt"])


def test_a_dialogue_is_cut_after_its_last_assistant_mark(gpt2_dir: Path, tmp_path: Path) -> None:
    first = "\n\nHuman: A?\n\nAssistant: B.\n\nHuman: C?\n\nAssistant:"
    rows = [{"chosen": first + " D.", "rejected": first + " E."}, *hh_pairs(1)]
    assert prompts_of(rows, tmp_path, gpt2_dir) == [first, hh_pairs(1)[0]["chosen"].partition(" It is")[0]]


def test_prompts_come_once_and_long_ones_not_at_all(gpt2_dir: Path, tmp_path: Path) -> None:
    rows = [{"prompt": text, "chosen": "a", "rejected": "b"} for text in ("Why?", "How?", "Why?", "", "Long? " * 50)]
    assert prompts_of(rows, tmp_path, gpt2_dir, limit=20) == ["Why?", "How?"]


def test_conversational_prompts_open_a_reply(chat_dir: Path, tmp_path: Path) -> None:
    user, reply = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
    path = write_jsonl(tmp_path / "data.jsonl", [{"chosen": [user, reply], "rejected": [user, reply]}])
    tokenizer = load_tokenizer(str(chat_dir))
    (row,) = load_prompts(ScriptArguments(dataset_name=str(path)), None, tokenizer, 100)
    assert row["prompt"] == [user]
    assert tokenizer.decode(row["input_ids"]) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"


def test_a_source_without_prompts_says_so(gpt2_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a column 'prompt' or 'chosen', found \\['text'\\]"):
        prompts_of([{"text": "a"}], tmp_path, gpt2_dir)
    with pytest.raises(UserError, match="of at most 2 tokens"):
        prompts_of([{"prompt": "A long prompt."}], tmp_path, gpt2_dir, limit=2)
    script = ScriptArguments(dataset_name=str(tmp_path / "data.jsonl"), dataset_train_split="other")
    with pytest.raises(UserError, match="expected a split 'other', found \\['train'\\]"):
        load_prompts(script, None, load_tokenizer(str(gpt2_dir)), 10)


def test_text_before_messages_is_a_users_turn_as_in_training(chat_dir: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    for chosen in (turns, turns[1:]):
        path = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "Why?", "chosen": chosen, "rejected": chosen}])
        (row,) = load_prompts(ScriptArguments(dataset_name=str(path)), None, load_tokenizer(str(chat_dir)), 100)
        assert row["prompt"] == turns[:1]


def test_dialogues_need_a_template(gpt2_dir: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    with pytest.raises(UserError, match="need a chat template"):
        prompts_of([{"chosen": turns, "rejected": turns}], tmp_path, gpt2_dir)
    with pytest.raises(UserError, match="expected prompts, found none"):
        prompts_of([{"chosen": "no mark", "rejected": "none"}], tmp_path, gpt2_dir)
