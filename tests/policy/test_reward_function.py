"""The reward model as a reward function of TRL's trainers."""

from pathlib import Path

import pytest
from conftest import CHATML, save_reward_model
from datasets import Dataset
from transformers import GPT2LMHeadModel
from trl import GRPOConfig, GRPOTrainer

from reward_recipes import RewardFunction
from reward_recipes.pairs.tokens import encode_texts
from reward_recipes.policy.common import load_policy_tokenizer
from reward_recipes.score.scorer import load_scorer

PROMPT = "\n\nHuman: How?\n\nAssistant:"


def test_an_ended_reply_is_scored_at_eos(reward_dir: Path) -> None:
    scorer = load_scorer(str(reward_dir))
    reward = RewardFunction(str(reward_dir), missing_eos_penalty=5.0)
    expected = scorer.score([PROMPT + " So.", PROMPT + " No."])
    ids = [[9, 9, 0], [9, 0]]
    assert reward([PROMPT] * 2, [" So.", " No."], completion_ids=ids, trainer_state=None) == pytest.approx(expected)
    assert reward([PROMPT] * 2, [" So.", " No."]) == pytest.approx(expected)


def test_a_reply_without_eos_is_scored_at_its_last_token_and_penalised(reward_dir: Path) -> None:
    scorer = load_scorer(str(reward_dir))
    reward = RewardFunction(scorer, missing_eos_penalty=5.0)
    ids = encode_texts(scorer.tokenizer, [PROMPT + " So."])[0]
    (cut_off,) = scorer.score_ids([[ids[:-1]]])[0]
    rewards = reward([PROMPT] * 2, [" So.", " So."], completion_ids=[[9, 9], [9, 0]])
    assert rewards == pytest.approx([cut_off - 5.0, scorer.score([PROMPT + " So."])[0]], abs=1e-5)
    assert reward(["", ""], ["", "a"], completion_ids=[[9], [9]])[0] == pytest.approx(
        scorer.score([""])[0] - 5.0, abs=1e-5
    )


def test_overlong_texts_keep_their_end_whatever_training_did(gpt2_dir: Path, tmp_path: Path) -> None:
    folder = save_reward_model(gpt2_dir, tmp_path / "drop", max_length=16, overlong="drop")
    scorer = load_scorer(str(folder))
    long = " What do you need?" * 30
    ids = encode_texts(scorer.tokenizer, [PROMPT + long])[0]
    assert RewardFunction(str(folder))([PROMPT], [long]) == pytest.approx(scorer.score_ids([[ids[-16:]]])[0], abs=1e-5)
    assert scorer.score([PROMPT + long]) == [None]


def test_conversational_completions(chat_dir: Path, tmp_path: Path) -> None:
    folder = save_reward_model(chat_dir, tmp_path / "chat")
    reward = RewardFunction(str(folder))
    assert reward.scorer.tokenizer.chat_template == CHATML
    prompt, reply = [{"role": "user", "content": "How?"}], [{"role": "assistant", "content": "So."}]
    assert reward([prompt], [reply]) == pytest.approx(load_scorer(str(folder)).score([prompt + reply]), abs=1e-5)


def test_grpo_trains_on_it(gpt2_dir: Path, reward_dir: Path, tmp_path: Path) -> None:
    class Recorded(RewardFunction):
        def __call__(self, prompts: list[str], completions: list[str], **columns: object) -> list[float]:
            rewards = super().__call__(prompts, completions, **columns)
            seen.append((list(prompts), list(completions), list(columns["completion_ids"]), rewards))
            return rewards

    seen: list[tuple[list[str], list[str], list[list[int]], list[float]]] = []
    reward = Recorded(str(reward_dir), missing_eos_penalty=1.0)
    args = GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    model = GPT2LMHeadModel.from_pretrained(gpt2_dir)
    tokenizer = load_policy_tokenizer(type("Args", (), {"model_name_or_path": str(gpt2_dir), "model_revision": "main"}))
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    data = Dataset.from_dict({"prompt": [PROMPT, "\n\nHuman: Why?\n\nAssistant:"]})
    trainer = GRPOTrainer(model=model, reward_funcs=reward, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/reward_model/mean"] == pytest.approx(
        sum(seen[0][3]) / len(seen[0][3]), abs=1e-5
    )
    assert any((tensor != before[name]).any() for name, tensor in trainer.model.named_parameters())
