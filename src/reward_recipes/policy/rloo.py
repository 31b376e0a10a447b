"""Train a policy with TRL's RLOO against a reward model. `python -m reward_recipes.rloo`."""

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import set_seed
from trl import RLOOConfig, RLOOTrainer

from reward_recipes.policy.common import (
    PolicyRecipe,
    RewardFields,
    check_lengths,
    init_options,
    load_policy_tokenizer,
    parse_policy_recipe,
    train_between_samples,
)
from reward_recipes.policy.prompts import load_prompts
from reward_recipes.policy.reward_function import RewardFunction
from reward_recipes.policy.samples import Measure, Samples
from reward_recipes.run import check_model_init, expect, option
from reward_recipes.score import max_positions, peft_config

LOG = "rloo_progress.csv"


@dataclass
class RLOORecipeConfig(RewardFields, RLOOConfig):
    """TRL's `RLOOConfig` with the reward model."""

    disable_dropout: bool = option(True, "Turn dropout off, as TRL's PPO does.")
    logging_steps: float = option(1, "Steps between rows of the log.")


def train(recipe: PolicyRecipe, measures: Mapping[str, Measure] | None = None) -> None:
    """Run a recipe, from its prompts to what stands in `output_dir`; raises `UserError` before anything is trained.

    `measures` are what `samples.csv` and the log say of sampled replies beside the score, by their columns' names.
    """
    script, config, model_args, policy_args = recipe
    steps, logged = policy_args.sample_steps, config.logging_steps
    expect(steps % logged == 0, "sample_steps", f"a multiple of logging_steps ({logged:g})", steps)
    check_model_init(config.model_init_kwargs or {})
    tokenizer = load_policy_tokenizer(model_args)
    prompts, asked = load_prompts(script, policy_args, tokenizer)
    penalty, device = config.missing_eos_penalty or 0.0, str(config.device)
    reward = RewardFunction(config.reward_model_path, penalty, tokenizer.eos_token_id, device=device)
    config.model_init_kwargs = init_options(model_args) | (config.model_init_kwargs or {})
    samples = Samples(asked[:], tokenizer, reward, config, config.max_completion_length, measures or {})
    set_seed(config.seed)  # TRL draws an adapter's weights before it seeds
    trainer = RLOOTrainer(
        model=model_args.model_name_or_path,  # by name, from which TRL also loads the reference model
        reward_funcs=reward,
        args=config,
        train_dataset=prompts.select_columns("prompt"),
        processing_class=tokenizer,
        peft_config=peft_config(model_args, "CAUSAL_LM"),
    )
    limits = {"the policy's positions": max_positions(trainer.model)}
    check_lengths([prompts, asked], config.max_completion_length, limits)
    train_between_samples(trainer, samples, LOG, steps)


def main() -> None:
    """Parse the recipe and train."""
    train(parse_policy_recipe(RLOORecipeConfig, LOG))
