"""Train a policy with TRL's RLOO against a reward model: `python -m reward_recipes.rloo`."""

from reward_recipes.policy.rloo import main
from reward_recipes.run import run_cli

if __name__ == "__main__":
    run_cli(main)
