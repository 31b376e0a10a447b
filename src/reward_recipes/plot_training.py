"""Draw how a reward model's training went from its CSV log, and sum it up in three lines.

Run it as `python -m reward_recipes.plot_training RUN`, during the training or after it.
"""

import argparse
from functools import partial
from pathlib import Path

from reward_recipes.evaluate.training_picture import plot_training
from reward_recipes.run import output, run_cli
from reward_recipes.shipped import help_page


def main() -> None:
    """Draw the log named on the command line and print its summary."""
    parser = argparse.ArgumentParser(prog="reward-recipes plot")
    parser.format_help, parser.format_usage = partial(help_page, "plot_training"), str  # an error is one line
    parser.add_argument("log", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--ceiling", "--known_ceiling", type=float)
    arguments = parser.parse_args()
    log = arguments.log / output.LOG if arguments.log.is_dir() else arguments.log
    print(plot_training(log, arguments.output or log.with_name(output.PICTURE), arguments.ceiling))


if __name__ == "__main__":
    run_cli(main)
