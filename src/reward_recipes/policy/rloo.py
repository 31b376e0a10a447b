"""Train a policy with TRL's RLOO against a reward model. `python -m reward_recipes.rloo`."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, RLOOConfig, RLOOTrainer, ScriptArguments

from reward_recipes.policy.common import (
    PolicyArguments,
    check_lengths,
    init_options,
    load_policy_tokenizer,
    parse_policy_recipe,
)
from reward_recipes.policy.log import PolicyLogCallback
from reward_recipes.policy.prompts import load_prompts
from reward_recipes.policy.reward_function import RewardFunction
from reward_recipes.policy.samples import Samples
from reward_recipes.run import fit_to_device, renamed_fields_unwarned
from reward_recipes.score import adapter_settings, max_positions

LOG = "rloo_progress.csv"


@dataclass
class RLOORecipeConfig(RLOOConfig):
    """TRL's `RLOOConfig` with the reward model."""

    reward_model_path: str = field(default="", metadata={"help": "A reward model's folder or hub id."})
    missing_eos_penalty: float = field(
        default=1.0, metadata={"help": "Subtracted from the score of a reply that was cut off before EOS."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Off, as in TRL's PPO: else even an untrained policy differs from itself."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Steps between rows of the log."})
    save_strategy: str = field(default="no", metadata={"help": "The policy is saved at the end."})

    def __post_init__(self) -> None:
        fit_to_device(self)
        with renamed_fields_unwarned():
            super().__post_init__()


def train(
    script: ScriptArguments, config: RLOORecipeConfig, model_args: ModelConfig, policy_args: PolicyArguments
) -> None:
    """Run a recipe from its prompts to the policy, the log, the picture and the samples in `output_dir`.

    Raises:
        UserError: a mistake in recipe, data or models, before anything is trained.
    """
    tokenizer = load_policy_tokenizer(model_args)
    prompts = load_prompts(script, policy_args.dataset_data_dirs, tokenizer, policy_args.max_prompt_length)
    reward = RewardFunction(
        config.reward_model_path, config.missing_eos_penalty, tokenizer.eos_token_id, device=str(config.device)
    )
    config.model_init_kwargs = init_options(model_args) | (config.model_init_kwargs or {})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # which peft sets as the model's layers ask
        trainer = _trainer(config, model_args, reward, prompts, tokenizer)
    positions = max_positions(trainer.accelerator.unwrap_model(trainer.model))
    check_lengths(prompts, config.max_completion_length, {"the policy's positions": positions})
    sampling = (config.temperature, config.max_completion_length, config.seed)
    samples = Samples(prompts, policy_args.sample_prompts, tokenizer, reward, *sampling)
    samples.take(trainer.accelerator.unwrap_model(trainer.model), "before")
    trainer.train()
    folder = Path(config.output_dir)
    trainer.save_model(str(folder))
    samples.take(trainer.accelerator.unwrap_model(trainer.model), "after")
    if trainer.accelerator.is_main_process:
        # Pickles may hold tokens in clear text; peft's draft of a card names local paths.
        for path in (*folder.rglob("training_args.bin"), *folder.rglob("README.md")):
            path.unlink()
        samples.write(folder)
        print(f"policy, {LOG}, its picture and samples: {folder}")


def _trainer(
    config: RLOORecipeConfig,
    model_args: ModelConfig,
    reward: RewardFunction,
    prompts: Dataset,
    tokenizer: PreTrainedTokenizerBase,
) -> RLOOTrainer:
    return RLOOTrainer(
        model=model_args.model_name_or_path,  # by name: TRL loads the reference model from it too
        reward_funcs=reward,
        args=config,
        train_dataset=prompts.select_columns("prompt"),
        processing_class=tokenizer,
        peft_config=adapter_settings(model_args, "CAUSAL_LM"),
        callbacks=[PolicyLogCallback(Path(config.output_dir) / LOG)],
    )


def main() -> None:
    """Parse the recipe and train."""
    train(*parse_policy_recipe(RLOORecipeConfig, LOG))
