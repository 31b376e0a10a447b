"""A reward model as a reward function of TRL's RLOO and GRPO trainers."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from reward_recipes.pairs import join
from reward_recipes.score import Scorer, Text, load_scorer


class RewardFunction:
    """Scores completions of a policy as they were scored in training: at EOS.

    TRL given a reward model's folder would read the score of another token, because it appends no EOS. As in PPO, a
    reply that was cut off before its EOS is scored at its last token and loses `missing_eos_penalty`. Texts over the
    model's `max_length` keep their end.

    Args:
        model: folder or hub id of a reward model, or a scorer.
        missing_eos_penalty: subtracted from the reward of a completion without EOS.
        eos_token_id: the policy's, which says whether a completion ended; by default the reward model's.
        **options: of `scoring.load_scorer`, such as `dtype` and `device`.
    """

    __name__ = "reward_model"  # what TRL calls it in its logs

    def __init__(
        self,
        model: str | Path | Scorer,
        missing_eos_penalty: float = 0.0,
        eos_token_id: int | None = None,
        **options: str,
    ) -> None:
        scorer = model if isinstance(model, Scorer) else load_scorer(model, **options)
        self.scorer = Scorer(scorer.model, scorer.tokenizer, scorer.max_length, overlong="keep_end")
        self.missing_eos_penalty = missing_eos_penalty
        self.eos_token_id = scorer.tokenizer.eos_token_id if eos_token_id is None else eos_token_id

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Rewards of n completions.

        Args:
            prompts: n texts, or n lists of messages.
            completions: likewise.
            completion_ids: the policy's token ids, EOS included where it was generated; without them every completion
                counts as ended.
            **columns: what else TRL hands to reward functions; not used.
        """
        texts = [join(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        ended = [ids is None or self.eos_token_id in ids for ids in completion_ids or [None] * len(texts)]
        encoded = self.scorer.encode(texts)
        ids = [text if whole or len(text) == 1 else text[:-1] for text, whole in zip(encoded, ended, strict=True)]
        in_order = iter(ids)
        groups = [[next(in_order) for _ in same] for _, same in groupby(prompts)]  # TRL keeps one prompt's together
        rewards = [reward for group in self.scorer.score_ids(groups) for reward in group]
        return [
            reward - (0 if whole else self.missing_eos_penalty) for reward, whole in zip(rewards, ended, strict=True)
        ]
