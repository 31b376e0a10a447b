"""Say how good a trained reward model is, and how far to trust it: `python -m reward_recipes.evaluate`."""

from pathlib import Path

from reward_recipes.evaluate import best_of_n, evaluation
from reward_recipes.pairs import SeveralAnswers
from reward_recipes.run import join_processes, output, parse_arguments, run_cli


def main() -> None:
    """Evaluate what the command line names and print the headline, in two lines."""
    arguments, _ = parse_arguments([evaluation.EvaluationArguments], page="evaluate")
    state = join_processes()
    try:
        told, written = evaluation.headline(evaluation.evaluate(arguments)), output.EVALUATION_PAGE
    except SeveralAnswers:
        told, written = best_of_n.headline(best_of_n.evaluate_best_of_n(arguments)), output.BEST_OF_N_PAGE
    state.print(told.replace("; ", "\n"))
    state.print(f"report: {Path(arguments.output_dir) / written}")


if __name__ == "__main__":
    run_cli(main)
