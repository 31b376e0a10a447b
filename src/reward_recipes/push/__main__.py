"""Publish a finished run on the Hub. `python -m reward_recipes.push DIR --repo_id user/name`."""

import argparse
from functools import partial
from pathlib import Path

from reward_recipes.push.upload import push_run
from reward_recipes.run import run_cli
from reward_recipes.shipped import help_page


def main() -> None:
    """Upload the run named on the command line."""
    parser = argparse.ArgumentParser(prog="reward-recipes push")
    parser.format_help, parser.format_usage = partial(help_page, "push"), str  # an error is one line
    run = parser.add_mutually_exclusive_group(required=True)
    run.add_argument("output_dir", nargs="?", type=Path)
    run.add_argument("--output_dir", dest="named", type=Path)
    # The second names are those that a recipe has.
    parser.add_argument("--repo_id", "--hub_model_id", required=True)
    parser.add_argument("--private", "--hub_private_repo", choices=("true", "false"))
    parser.add_argument("--license")
    parser.add_argument("--language", nargs="+", default=())
    arguments = parser.parse_args()
    private = None if arguments.private is None else arguments.private == "true"
    card = {"license": arguments.license, "language": arguments.language}
    print(f"pushed to {push_run(arguments.output_dir or arguments.named, arguments.repo_id, private, **card)}")


if __name__ == "__main__":
    run_cli(main)
