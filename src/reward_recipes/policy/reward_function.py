"""A reward model as a reward function of TRL's RLOO and GRPO trainers."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from reward_recipes.pairs import TEMPLATE_VALUES, as_turns, join, with_template_values
from reward_recipes.score import Scorer, Text, load_scorer


class RewardFunction:
    """Scores completions of a policy as they were scored in training: at EOS.

    TRL, given a reward model's folder, would read the score at another token, because it appends no EOS. A reply that
    was cut off before its EOS is scored as in PPO: at its last token, less `missing_eos_penalty`. Texts over the
    model's `max_length` keep their end.

    Args:
        model: folder or hub id of a reward model, or a scorer.
        missing_eos_penalty: subtracted from the reward of a completion without EOS.
        eos_token_id: the policy's, which says whether a completion ended; by default the reward model's.
        **options: of `load_scorer`, such as `dtype` and `device`.
    """

    __name__ = "reward_model"  # TRL's name for it in its logs

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
            **columns: what else TRL hands to reward functions; of them `tools` and `chat_template_kwargs` (n each) go
                to the chat template.
        """
        texts = [self._joined(*texts) for texts in zip(prompts, completions, strict=True)]
        given = {name: columns[name] for name in TEMPLATE_VALUES if name in columns}
        rows = [{name: values[row] for name, values in given.items()} for row in range(len(texts))]
        ids = self.scorer.encode([with_template_values(*each) for each in zip(texts, rows, strict=True)])
        ended = (
            [True] * len(ids) if completion_ids is None else [self.eos_token_id in reply for reply in completion_ids]
        )
        groups: list[list[list[int]]] = []
        for row, (text, whole) in enumerate(zip(ids, ended, strict=True)):
            if row == 0 or prompts[row] != prompts[row - 1]:  # TRL keeps the replies to a prompt together
                groups.append([])
            groups[-1].append(text if whole or len(text) == 1 else text[:-1])  # the scorer ends every text in EOS
        rewards = chain.from_iterable(self.scorer.score_ids(groups))
        penalties = [0.0 if whole else self.missing_eos_penalty for whole in ended]
        return [reward - penalty for reward, penalty in zip(rewards, penalties, strict=True)]

    def _joined(self, prompt: Text, reply: Text) -> Text:
        """Texts are put together even if the reply repeats the prompt, as PPO does."""
        if self.scorer.form == "messages":
            prompt = as_turns(self.scorer.tokenizer, prompt)
        return prompt + reply if isinstance(prompt, str) and isinstance(reply, str) else join(prompt, [reply])[0]
