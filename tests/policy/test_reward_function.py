"""A reward function of TRL's trainers scores as training did, at EOS, and penalises a reply that was cut off."""

import math
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import save_reward_model
from datasets import Dataset
from transformers import GPT2LMHeadModel
from trl import GRPOConfig, GRPOTrainer, ModelConfig

from reward_recipes import RewardFunction
from reward_recipes.pairs import encode_texts
from reward_recipes.policy import reward_function
from reward_recipes.policy.common import load_policy_tokenizer
from reward_recipes.score import load_scorer

PROMPT = "\n\nHuman: How?\n\nAssistant:"


def test_a_reply_is_scored_at_eos_or_penalised_at_its_last_token(reward_dir: Path) -> None:
    scorer, reward = load_scorer(str(reward_dir)), RewardFunction(str(reward_dir), missing_eos_penalty=5.0)
    prompts, replies = [PROMPT, PROMPT, ""], [" So.", " No.", ""]
    expected = scorer.score([prompt + reply for prompt, reply in zip(prompts, replies, strict=True)])
    same = pytest.approx(expected, abs=1e-6)
    assert reward(prompts, replies) == same
    assert reward(prompts, replies, completion_ids=[[9, 9, 0], [9, 0], [0]], state=None) == same
    (ids,) = encode_texts(scorer.tokenizer, [PROMPT + " So."])
    ((cut_off,),) = scorer.score_ids([[ids[:-1]]])
    rewards = reward(prompts, replies, completion_ids=[[9, 9], [9, 0], [9]])
    assert rewards == pytest.approx([cut_off - 5.0, expected[1], expected[2] - 5.0], abs=1e-5)
    several = RewardFunction(scorer, missing_eos_penalty=5.0, eos_token_id=[7, 9])  # any of them ends a reply
    rewards = several(prompts[:2], replies[:2], completion_ids=[[5, 9], [5, 0]])
    assert rewards[0] == pytest.approx(expected[0], abs=1e-5) and rewards[1] < expected[1] - 3


def test_dialogues_and_overlong_texts_keep_their_end_whatever_training_did(chat_dir: Path, tmp_path: Path) -> None:
    scorer = load_scorer(str(save_reward_model(chat_dir, tmp_path, max_length=32, overlong="drop")))
    long = " What do you need?" * 30
    (ids,) = encode_texts(scorer.tokenizer, [PROMPT + long])
    assert RewardFunction(scorer)([PROMPT], [long]) == pytest.approx(scorer.score_ids([[ids[-32:]]])[0], abs=1e-5)
    assert scorer.score([PROMPT + long]) == [None]
    prompt, reply = [{"role": "user", "content": "How?"}], [{"role": "assistant", "content": "So."}]
    assert RewardFunction(scorer)([prompt], [reply]) == pytest.approx(scorer.score([prompt + reply]), abs=1e-5)


def test_a_turn_without_content_is_an_empty_one_where_the_template_reads_it(chat_dir: Path, tmp_path: Path) -> None:
    reward, asked = RewardFunction(save_reward_model(chat_dir, tmp_path)), [{"role": "user", "content": "How?"}]
    replies = [[{"role": "assistant"} | content] for content in ({}, {"content": None}, {"content": ""})]
    silent, none, empty = reward([asked] * 3, replies)
    assert [silent, none] == pytest.approx([empty, empty], rel=1e-6)


def test_memory_is_bounded_by_the_tokens_of_a_batch(gpt2_dir: Path, tmp_path: Path) -> None:
    """Whether replies share their prompt or stand alone; the rewards are the same."""
    folder, cells, limit = save_reward_model(gpt2_dir, tmp_path), [], 128
    reward, free = RewardFunction(folder, max_tokens_per_batch=limit), RewardFunction(folder)
    replies = [f" So, {'yes, ' * (number % 7)}so." for number in range(60)]
    prompts = [PROMPT] * 50 + [f"{PROMPT} {number}" for number in range(10)]
    expected = free(prompts, replies)
    reward(prompts[:2], replies[:2])  # finds out whether sharing is exact
    reward.scorer.model.register_forward_pre_hook(
        lambda _, args, kwargs: cells.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    assert reward(prompts, replies) == pytest.approx(expected, abs=1e-5)
    assert limit / 2 < max(cells) <= limit


def test_a_model_goes_to_the_device_that_its_process_has_when_it_is_first_called(
    reward_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may be known only once the trainer is made, and says how rows are packed. One that was asked for stays."""
    late, told = RewardFunction(reward_dir), RewardFunction(reward_dir, device="cpu")
    monkeypatch.setattr(reward_function, "PartialState", lambda: SimpleNamespace(device=torch.device("meta")))
    replies = [[PROMPT] * 2, [" So.", " No."]]
    told(*replies)
    with suppress(NotImplementedError, RuntimeError):  # scores on this device cannot be read
        late(*replies)
    assert (late.scorer.model.device.type, told.scorer.model.device.type) == ("meta", "cpu")
    assert late.scorer._limit < told.scorer._limit == math.inf


def test_a_name_of_its_own_for_each_model(reward_dir: Path, gpt2_dir: Path, tmp_path: Path) -> None:
    other = save_reward_model(gpt2_dir, tmp_path / "a" / "run")
    names = {RewardFunction(model).__name__ for model in (reward_dir, other, load_scorer(other))}
    assert len(names) == 2 and f"{tmp_path.name}_a_run" in " ".join(names)


def test_grpo_trains_on_it(gpt2_dir: Path, reward_dir: Path, tmp_path: Path) -> None:
    class Recorded(RewardFunction):
        def __call__(self, *args: object, **columns: object) -> list[float]:
            seen.extend(rewards := super().__call__(*args, **columns))
            return rewards

    seen: list[float] = []
    quiet = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    sizes = {"max_steps": 1, "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 6}
    trainer = GRPOTrainer(
        model=str(gpt2_dir),
        reward_funcs=Recorded(str(reward_dir), missing_eos_penalty=1.0),
        args=GRPOConfig(str(tmp_path), **quiet, **sizes),
        train_dataset=Dataset.from_dict({"prompt": [PROMPT, "\n\nHuman: Why?\n\nAssistant:"]}),
        processing_class=load_policy_tokenizer(ModelConfig(model_name_or_path=str(gpt2_dir))),
    )
    trainer.train()
    name = "_".join(reward_dir.parts[1:])
    assert trainer.state.log_history[0][f"rewards/{name}/mean"] == pytest.approx(sum(seen) / len(seen), abs=1e-5)
    before = GPT2LMHeadModel.from_pretrained(gpt2_dir).state_dict()
    assert any((tensor != before[name]).any() for name, tensor in trainer.model.state_dict().items())
