"""Draw how a reward model's training went from its CSV log, and say it in one line.

Run it as `python -m reward_recipes.plot_training reward_model_log.csv`, during the training or after it.
"""

import argparse
from pathlib import Path

from reward_recipes.evaluate.training_picture import plot_training
from reward_recipes.run import run_cli


def main() -> None:
    """Draw the log named on the command line and print its summary."""
    parser = argparse.ArgumentParser(prog="python -m reward_recipes.plot_training", description=__doc__)
    parser.add_argument("log", type=Path, help="the reward_model_log.csv of a training run")
    parser.add_argument("--output", type=Path, help="PNG to write (training_progress.png beside the log)")
    parser.add_argument("--ceiling", type=float, help="best reachable accuracy, a fraction, if it is known")
    arguments = parser.parse_args()
    output = arguments.output or arguments.log.with_name("training_progress.png")
    print(plot_training(arguments.log, output, arguments.ceiling))


if __name__ == "__main__":
    run_cli(main)
