"""A policy trained against the reward model with TRL's PPO or RLOO, and the reward function for its other trainers.

The room alone knows which prompts are asked and how a cut-off reply is scored. PPO stands in a module of its own,
`policy.ppo`, because only TRL 1.12 has it.
"""

from reward_recipes.policy.reward_function import RewardFunction
