"""What PPO and RLOO share: options, the policy and its tokenizer, and a training with samples before and after."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, Trainer
from trl import ModelConfig, ScriptArguments

from reward_recipes.policy.log import PolicyLogCallback
from reward_recipes.policy.prompts import PolicyArguments
from reward_recipes.policy.samples import Samples
from reward_recipes.run import (
    UserError,
    check_processes,
    expect,
    first_line,
    fit_to_device,
    option,
    parse_arguments,
    quiet_trainer,
)


@dataclass
class RewardFields:
    """Fields that PPO's and RLOO's configs share. In the list of bases it stands before TRL's config."""

    reward_model_path: str = option("", "A reward model's folder or hub id.")
    missing_eos_penalty: float | None = option(1.0, "Subtracted from the score of a reply that was cut off before EOS.")
    save_strategy: str = option("no", "When to save checkpoints; `no`: only the final policy. No run can be resumed.")

    def __post_init__(self) -> None:
        fit_to_device(self)
        super().__post_init__()


class PolicyRecipe(NamedTuple):
    """What a recipe says; `config` is PPO's or RLOO's."""

    script: ScriptArguments
    config: Any
    model: ModelConfig
    policy: PolicyArguments


def parse_policy_recipe(config_type: type[RewardFields], log: str, args: Sequence[str] | None = None) -> PolicyRecipe:
    """Read a recipe of `ppo` or `rloo` and check what both need.

    Raises:
        UserError: a field that is missing, unknown or out of range, or a folder that holds the `log` of another run.
    """
    script, config, model_args, policy_args, _ = parse_arguments(
        (ScriptArguments, config_type, ModelConfig, PolicyArguments), args, page=log.split("_")[0]
    )
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise UserError("load_in_4bit and load_in_8bit would have no effect here; remove them")
    for name, part in (("dataset_name", script), ("model_name_or_path", model_args), ("reward_model_path", config)):
        expect(getattr(part, name), name, f"a hub id or a folder (--{name})", getattr(part, name))
    expect(config.temperature > 0, "temperature", "more than 0", config.temperature)
    if config.push_to_hub:
        raise UserError("push_to_hub would push at every save; train first, then upload output_dir with `hf upload`")
    check_processes()
    engine = PartialState().distributed_type
    if engine in (DistributedType.FSDP, DistributedType.DEEPSPEED):  # no process could sample from its shard alone
        raise UserError(f"expected one process or DDP for a policy, found {engine.value}; use multi_gpu.yaml")
    if (Path(config.output_dir) / log).exists() and not policy_args.overwrite_output_dir:
        mend = "give another output_dir, or replace its files with --overwrite_output_dir true"
        raise UserError(f"{config.output_dir} holds another run ({log}); {mend}")
    return PolicyRecipe(script, config, model_args, policy_args)


def load_policy_tokenizer(model_args: ModelConfig) -> PreTrainedTokenizerBase:
    """The policy's own tokenizer, padding on the left, with EOS if it has no pad token.

    Raises:
        UserError: no tokenizer, a broken one, or a model that is no policy.
    """
    name = model_args.model_name_or_path
    options = {"revision": model_args.model_revision, "trust_remote_code": False}
    try:
        architectures = AutoConfig.from_pretrained(name, **options).architectures or []
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", **options)
    except Exception as error:  # a broken tokenizer.json raises nothing narrower
        raise UserError(f"tokenizer of {name}: {first_line(error)}") from error
    if any("SequenceClassification" in kind for kind in architectures):
        raise UserError(f"{name}: expected a language model as policy, found {architectures[0]}")
    if tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]:
        raise UserError(f"{name}: expected a policy's tokenizer, found one that ends each prompt in EOS; take another")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def init_options(model_args: ModelConfig) -> dict[str, Any]:
    """How a policy's weights are loaded, as arguments of `from_pretrained`."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype or "float32",
        "trust_remote_code": False,
        "use_safetensors": True,
    }


def check_lengths(prompts: Sequence[Dataset], reply_length: int, limits: dict[str, int | None]) -> None:
    """Raise `UserError` if the longest prompt and a whole reply exceed one of the limits, in tokens by their names."""
    longest = max(len(ids) for part in prompts for ids in part["input_ids"]) + reply_length
    for what, limit in limits.items():
        if limit is not None and longest > limit:
            found = f"up to {longest}; lower max_prompt_length or the reply's length"
            raise UserError(f"expected prompts and replies within {what} ({limit} tokens), found {found}")


def train_between_samples(trainer: Trainer, samples: Samples, log: str, sample_steps: int) -> None:
    """Sample from the policy, train it with a `log`, save it, sample again; write the samples beside the policy."""
    folder = Path(trainer.args.output_dir)
    quiet_trainer(trainer)
    trainer.add_callback(PolicyLogCallback(log, samples, sample_steps))
    samples.take(trainer.model, "before")
    trainer.train()
    if trainer.accelerator.is_main_process:
        for stale in folder.glob("adapter_*"):  # of an earlier run; a model beside them would not be read
            stale.unlink()
    trainer.save_model(str(folder))
    samples.take(trainer.model, "after")
    if trainer.accelerator.is_main_process:
        # The pickle may hold tokens in clear text; the card that peft drafts names local paths.
        for saved in (folder, *folder.glob("checkpoint-*")):
            (saved / "training_args.bin").unlink(missing_ok=True)
            (saved / "README.md").unlink(missing_ok=True)
        samples.write(folder)
        print(f"policy, log, picture and samples: {folder}")
