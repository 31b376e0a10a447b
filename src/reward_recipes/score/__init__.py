"""From texts to rewards: the model with its float32 score head, and how files, reports and samples are scored.

The room alone knows how a reward model is loaded and at which token its score is read.
"""

from reward_recipes.score.model import (
    load_merged,
    load_reward_model,
    max_positions,
    merge_adapter,
    peft_config,
    write_random_gpt2,
)
from reward_recipes.score.rows import texts_of
from reward_recipes.score.scorer import Scorer, Text, by_all_processes, load_scorer
