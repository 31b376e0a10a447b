"""A reward model as a reward function of TRL's RLOO and GRPO trainers."""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from accelerate import PartialState

from reward_recipes.pairs import TEMPLATE_VALUES, as_turns, join, with_template_values
from reward_recipes.run import UserError
from reward_recipes.score import Scorer, Text, load_scorer


class RewardFunction:
    """Scores completions of a policy as they were scored in training: at EOS.

    TRL, given a reward model's folder, would read the score of a text at another token, because it appends no EOS. A
    reply that was cut off before its EOS is scored as in PPO: at its last token, less `missing_eos_penalty`. Texts over
    the model's `max_length` keep their end. Logs of TRL name the function after its model: `outputs_demo_run`.

    Args:
        model: folder or hub id of a reward model, or a scorer, which stays on its device.
        missing_eos_penalty: subtracted from the reward of a completion without EOS.
        eos_token_id: the policy's, one or several, which say whether a completion ended; by default the reward model's.
        max_tokens_per_batch: most tokens, padding included, that the model computes at once, which bounds its memory; a
            longer text is computed alone. By default the scorer's.
        **options: of `load_scorer`, such as `dtype`, and `device`, by default that of the process when first called.
    """

    def __init__(
        self,
        model: str | Path | Scorer,
        missing_eos_penalty: float = 0.0,
        eos_token_id: int | Sequence[int] | None = None,
        max_tokens_per_batch: int | None = None,
        **options: str,
    ) -> None:
        self._is_placed = isinstance(model, Scorer) or "device" in options
        self.scorer = copy(model) if isinstance(model, Scorer) else load_scorer(model, **{"device": "cpu"} | options)
        self.scorer.overlong, self.scorer.cells = "keep_end", max_tokens_per_batch or self.scorer.cells
        name = self.scorer.model.config.name_or_path if isinstance(model, Scorer) else str(model)
        self.__name__ = "_".join(part for part in Path(name).parts if part != "/")
        self.missing_eos_penalty = missing_eos_penalty
        eos = self.scorer.tokenizer.eos_token_id if eos_token_id is None else eos_token_id
        self.eos_token_ids = {eos} if isinstance(eos, int) else {*eos}

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
        if not self._is_placed:  # before the trainer is made, a process may not know which device is its own
            self.scorer.model.to(PartialState().device)
            self._is_placed = True
        texts = [self._joined(*texts) for texts in zip(prompts, completions, strict=True)]
        given = {name: columns[name] for name in TEMPLATE_VALUES if name in columns}
        rows = [{name: values[row] for name, values in given.items()} for row in range(len(texts))]
        ids = [self._encoded(with_template_values(*each)) for each in zip(texts, rows, strict=True)]
        ended = [True] * len(ids)
        if completion_ids is not None:
            ended = [not self.eos_token_ids.isdisjoint(reply) for reply in completion_ids]
        groups: list[list[list[int]]] = []
        for row, (text, whole) in enumerate(zip(ids, ended, strict=True)):
            if row == 0 or prompts[row] != prompts[row - 1]:  # TRL keeps the replies to a prompt together
                groups.append([])
            added = not (whole or self.scorer.as_is or len(text) == 1)  # an EOS that the reply has not
            groups[-1].append(text[:-1] if added else text)
        rewards = chain.from_iterable(self.scorer.score_ids(groups))
        penalties = [0.0 if whole else self.missing_eos_penalty for whole in ended]
        return [reward - penalty for reward, penalty in zip(rewards, penalties, strict=True)]

    def _encoded(self, text: Text) -> list[int]:
        """Token ids; a turn without content, of calls alone say, has an empty one where the template insists."""
        try:
            return self.scorer.encode([text])[0]
        except UserError:
            if isinstance(text, str):
                raise
            filled = [turn | {"content": turn.get("content") or ""} for turn in text.messages]
            return self.scorer.encode([replace(text, messages=filled)])[0]

    def _joined(self, prompt: Text, reply: Text) -> Text:
        """Texts are put together even if the reply repeats the prompt, as PPO does."""
        if self.scorer.form == "messages":
            prompt = as_turns(self.scorer.tokenizer, prompt)
        return prompt + reply if isinstance(prompt, str) and isinstance(reply, str) else join(prompt, [reply])[0]
