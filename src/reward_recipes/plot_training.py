"""Draw a training's picture from its CSV log: `python -m reward_recipes.plot_training reward_model_log.csv`."""

from reward_recipes.evaluate.plot_training import main
from reward_recipes.run import run_cli

if __name__ == "__main__":
    run_cli(main)
