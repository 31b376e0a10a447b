"""Train a policy with TRL's PPO against a reward model: `python -m reward_recipes.ppo`."""

import sys

from reward_recipes.run import run_cli

try:
    from reward_recipes.policy.ppo import main
except ImportError as error:
    sys.exit(f"error: {error}")

if __name__ == "__main__":
    run_cli(main)
