"""Print what is in a recipe's preference pairs, without training: `python -m reward_recipes.audit`."""

from reward_recipes.config import parse_recipe
from reward_recipes.data import VALIDATION, prepare_data
from reward_recipes.pairs import format_audit, load_pairs, load_recipe_tokenizer
from reward_recipes.run import run_cli


def main() -> None:
    """Print the audit of a recipe's data."""
    script, config, model, _ = parse_recipe()
    tokenizer = load_recipe_tokenizer(config, model)
    splits = load_pairs(script.dataset_name, script.dataset_config, config.dataset_data_dirs, config.columns)
    if not (config.eval_splits or config.validation_fraction or {VALIDATION, script.dataset_test_split} & {*splits}):
        config.eval_strategy = "no"  # a source without another split is audited too
    data = prepare_data(script, config, tokenizer)
    print(format_audit(data.audit))


if __name__ == "__main__":
    run_cli(main)
