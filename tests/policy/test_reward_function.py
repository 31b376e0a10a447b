"""A reward function of TRL's trainers scores as training did, at EOS, and penalises a reply that was cut off."""

from pathlib import Path

import pytest
from conftest import save_reward_model
from datasets import Dataset
from transformers import GPT2LMHeadModel
from trl import GRPOConfig, GRPOTrainer, ModelConfig

from reward_recipes import RewardFunction
from reward_recipes.pairs import encode_texts
from reward_recipes.policy.common import load_policy_tokenizer
from reward_recipes.score import load_scorer

PROMPT = "\n\nHuman: How?\n\nAssistant:"


def test_a_reply_is_scored_at_eos_or_penalised_at_its_last_token(reward_dir: Path) -> None:
    scorer, reward = load_scorer(str(reward_dir)), RewardFunction(str(reward_dir), missing_eos_penalty=5.0)
    prompts, replies = [PROMPT, PROMPT, ""], [" So.", " No.", ""]
    expected = scorer.score([prompt + reply for prompt, reply in zip(prompts, replies, strict=True)])
    assert reward(prompts, replies) == pytest.approx(expected)
    assert reward(prompts, replies, completion_ids=[[9, 9, 0], [9, 0], [0]], state=None) == pytest.approx(expected)
    (ids,) = encode_texts(scorer.tokenizer, [PROMPT + " So."])
    ((cut_off,),) = scorer.score_ids([[ids[:-1]]])
    rewards = reward(prompts, replies, completion_ids=[[9, 9], [9, 0], [9]])
    assert rewards == pytest.approx([cut_off - 5.0, expected[1], expected[2] - 5.0], abs=1e-5)


def test_dialogues_and_overlong_texts_keep_their_end_whatever_training_did(chat_dir: Path, tmp_path: Path) -> None:
    scorer = load_scorer(str(save_reward_model(chat_dir, tmp_path, max_length=32, overlong="drop")))
    long = " What do you need?" * 30
    (ids,) = encode_texts(scorer.tokenizer, [PROMPT + long])
    assert RewardFunction(scorer)([PROMPT], [long]) == pytest.approx(scorer.score_ids([[ids[-32:]]])[0], abs=1e-5)
    assert scorer.score([PROMPT + long]) == [None]
    prompt, reply = [{"role": "user", "content": "How?"}], [{"role": "assistant", "content": "So."}]
    assert RewardFunction(scorer)([prompt], [reply]) == pytest.approx(scorer.score([prompt + reply]), abs=1e-5)


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
