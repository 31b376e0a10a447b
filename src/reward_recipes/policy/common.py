"""What PPO and RLOO share around TRL's trainers: arguments, the policy and its tokenizer, and what must fit both."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from trl import ModelConfig, ScriptArguments

from reward_recipes.run import (
    UserError,
    check_output_dir,
    check_processes,
    check_source,
    check_types,
    first_line,
    parse_arguments,
)


@dataclass
class PolicyArguments:
    """What a policy is asked, besides TRL's own fields."""

    dataset_data_dirs: list[str] | None = field(
        default=None, metadata={"help": "Folders inside the dataset whose prompts to take."}
    )
    max_prompt_length: int = field(default=256, metadata={"help": "Longer prompts, in tokens, are left out."})
    sample_prompts: int = field(default=16, metadata={"help": "Prompts to answer before and after; 0: none."})

    def __post_init__(self) -> None:
        if isinstance(self.dataset_data_dirs, str):  # YAML reads one name as no list
            self.dataset_data_dirs = [self.dataset_data_dirs]
        check_types(self)
        for name, least in (("max_prompt_length", 1), ("sample_prompts", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}: expected {least} or more, found {getattr(self, name)}")


def parse_policy_recipe(
    config_type: type[TrainingArguments], log: str, args: Sequence[str] | None = None
) -> tuple[ScriptArguments, TrainingArguments, ModelConfig, PolicyArguments]:
    """Read a recipe of `ppo` or `rloo` and hold it to what both need.

    Raises:
        UserError: a field that is missing, unknown or out of range, or a folder that holds the `log` of another run.
    """
    script, config, model_args, policy_args = parse_arguments(
        (ScriptArguments, config_type, ModelConfig, PolicyArguments), args
    )
    for part in (script, config, model_args):
        check_types(part)
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise UserError("load_in_4bit and load_in_8bit would have no effect here; remove them")
    if config.temperature <= 0:
        raise UserError(f"temperature: expected more than 0, found {config.temperature}")
    for name, part in (("dataset_name", script), ("model_name_or_path", model_args), ("reward_model_path", config)):
        if not getattr(part, name):
            raise UserError(f"{name}: expected a hub id or a folder, found none; add --{name}")
    check_output_dir(config.output_dir)
    if config.push_to_hub:
        raise UserError("push_to_hub would push at every save; train first, then upload output_dir with `hf upload`")
    check_processes()
    check_engine()
    if (Path(config.output_dir) / log).exists():
        raise UserError(f"{config.output_dir} holds another run ({log}); give another output_dir")
    return script, config, model_args, policy_args


def load_policy_tokenizer(model_args: ModelConfig) -> PreTrainedTokenizerBase:
    """The policy's own tokenizer, padding on the left; without a pad token it pads with EOS.

    Raises:
        UserError: none there, a broken one, one without an EOS token, or a model that is no policy.
    """
    name = model_args.model_name_or_path
    check_source("model_name_or_path", name)
    try:
        config = AutoConfig.from_pretrained(name, revision=model_args.model_revision, trust_remote_code=False)
        if any("SequenceClassification" in kind for kind in config.architectures or []):
            raise UserError(f"{name}: expected a language model as policy, found {config.architectures[0]}")
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=model_args.model_revision, padding_side="left", trust_remote_code=False
        )
    except UserError:
        raise
    except Exception as error:  # a broken tokenizer.json raises nothing narrower
        raise UserError(f"tokenizer of {name}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name}: expected a policy whose tokenizer has an EOS token, found none")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def init_options(model_args: ModelConfig) -> dict[str, Any]:
    """How a policy's weights are loaded, as `from_pretrained` takes it."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype or "float32",
        "trust_remote_code": False,
        "use_safetensors": True,
    }


def check_engine() -> None:
    """Policies train on one process or under DDP.

    Raises:
        UserError: FSDP or DeepSpeed, whose shards no single process could sample from.
    """
    engine = PartialState().distributed_type
    if engine in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UserError(f"expected one process or DDP for a policy, found {engine.value}; use multi_gpu.yaml")


def check_lengths(prompts: Dataset, reply_length: int, limits: dict[str, int | None]) -> None:
    """Hold the longest prompt with a whole reply to limits in tokens, by what they are.

    Raises:
        UserError: they are too long.
    """
    longest = max(len(ids) for ids in prompts["input_ids"]) + reply_length
    for what, limit in limits.items():
        if limit is not None and longest > limit:
            raise UserError(
                f"expected at most {limit} tokens, {what}, found prompts and replies "
                f"of up to {longest}; lower max_prompt_length or the reply's length"
            )


def load_policy(model_args: ModelConfig) -> PreTrainedModel:
    """The policy's causal language model.

    Raises:
        UserError: nothing there, broken weights, or not a language model.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **init_options(model_args))
    except Exception as error:  # weights that are broken, or of other shapes, raise almost anything
        raise UserError(f"policy {model_args.model_name_or_path}: {first_line(error)}") from error
