"""Say how good a trained reward model is, and how far to trust it: `python -m reward_recipes.evaluate`."""

from pathlib import Path

from reward_recipes.evaluate.evaluation import EvaluationArguments, evaluate, headline
from reward_recipes.run import output, parse_arguments, run_cli


def main() -> None:
    """Evaluate what the command line names and print the headline, in two lines."""
    arguments, _ = parse_arguments([EvaluationArguments])
    report = evaluate(arguments)
    print(headline(report).replace("; ", "\n"))
    print(f"report: {Path(arguments.output_dir) / output.EVALUATION_PAGE}")


if __name__ == "__main__":
    run_cli(main)
