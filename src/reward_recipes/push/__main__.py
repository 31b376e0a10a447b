"""Publish a finished run on the Hub. `python -m reward_recipes.push DIR --repo_id user/name`."""

import argparse
from pathlib import Path

from reward_recipes.push.upload import push_run
from reward_recipes.run import run_cli


def main() -> None:
    """Upload the run named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m reward_recipes.push", description=__doc__)
    parser.add_argument("run", type=Path, help="the output_dir of a run")
    parser.add_argument("--repo_id", required=True, help="user/name on the Hub; made if there is none")
    parser.add_argument("--private", choices=("true", "false"), help="of a new repository; the Hub decides if left out")
    parser.add_argument("--license", help="of the model, for its card: apache-2.0, say; one that is there stays")
    parser.add_argument("--language", nargs="+", default=(), help="codes for its card: en, say; those there stay")
    arguments = parser.parse_args()
    private = None if arguments.private is None else arguments.private == "true"
    card = {"license": arguments.license, "language": arguments.language}
    print(f"pushed to {push_run(arguments.run, arguments.repo_id, private, **card)}")


if __name__ == "__main__":
    run_cli(main)
