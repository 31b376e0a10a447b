"""The reward model: loading it with one score, computing that score in float32, merging its adapter."""

import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.activations import NewGELUActivation
from transformers.utils import logging as transformers_logging
from trl import ModelConfig, RewardConfig, get_peft_config, get_quantization_config

from reward_recipes.run import UserError, check_source, expect, first_line, source_hint

NEW_HEAD = ("score", "classifier", "pooler")  # what a model that is yet to be trained may lack
WHOLE = {"load_in_4bit": False, "load_in_8bit": False}  # to merge into rounded weights would lose more


class Float32Score(nn.Linear):
    """A score head that computes in float32, or a float64 model's in float64, and never under autocast.

    In bf16 scores near 2 would step by 1/64, and close pairs would tie.
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., hidden size) of any dtype to (..., 1) float32 or float64."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype)
            return nn.functional.linear(hidden.to(dtype), self.weight.to(dtype), bias)


class FusedGELU(NewGELUActivation):
    """GPT-2's activation in one kernel, where transformers' class takes eight and keeps what each of them made."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Any shape to the same, by the formula of transformers' class."""
        return nn.functional.gelu(input, approximate="tanh")


def load_reward_model(
    model_args: ModelConfig, config: RewardConfig, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Load `*ForSequenceClassification` with one label, ready to be scored at EOS and trained.

    The head is new (and seeded by `config.seed`) unless the folder holds a reward model.

    Raises:
        UserError: what `load_classifier` raises, or `max_length` beyond the model's positions.
    """
    set_seed(config.seed)
    options = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "quantization_config": get_quantization_config(model_args),
        "trust_remote_code": config.trust_remote_code,
    }
    options.update(config.model_init_kwargs or {})
    model = load_classifier(model_args.model_name_or_path, may_lack=NEW_HEAD, **options)
    positions = max_positions(model)
    fits = positions is None or config.max_length <= positions
    expect(fits, "max_length", f"at most {positions}, the model's positions", config.max_length)
    fit_to_tokenizer(model, tokenizer)
    model.config.problem_type = "regression"  # a pipeline then gives the score itself
    model.config.reward_recipes = {"max_length": config.max_length, "overlong": getattr(config, "overlong", "drop")}
    return model


def max_positions(model: PreTrainedModel) -> int | None:
    """Most tokens of a text that the model has positions for; None without a limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def fit_to_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model the tokenizer's pad token, an embedding for it, a score in float32 and a fast activation."""
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    embedding = model.get_input_embeddings()
    if getattr(embedding, "padding_idx", None) is not None:
        embedding.padding_idx = tokenizer.pad_token_id  # it stops gradients: an EOS that was padding would not train
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    # Classes change in place, so names of weights, adapters and hooks stay those of transformers.
    head = getattr(model, "score", None)
    if type(head) is nn.Linear:
        head.__class__ = Float32Score
    for module in model.modules():
        if type(module) is NewGELUActivation:
            module.__class__ = FusedGELU


def load_classifier(name: str, may_lack: tuple[str, ...] = (), **options: Any) -> PreTrainedModel:
    """Load `*ForSequenceClassification` with one label from safetensors, by hub id or folder.

    Weights whose names begin as `may_lack` says may be new.

    Raises:
        UserError: nothing there, an architecture without such a head, a head with several labels, or weights that are
            missing or do not fit.
    """
    check_source("model", name)
    if (Path(name) / "adapter_config.json").is_file() and not any(Path(name).glob("model*.safetensors")):
        raise UserError(f"{name}: expected a model, found an adapter; name the run's folder, which holds it merged")
    options.setdefault("trust_remote_code", False)
    # A pickle of others may hold code.
    options.update(num_labels=1, use_safetensors=True, output_loading_info=True)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the report always names a new head; what else it says is checked below
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(name, **options)
    except Exception as error:  # a broken file makes transformers raise almost anything
        raise UserError(_explain(name, error)) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    lost = sorted(key for key in report["missing_keys"] if not key.startswith(may_lack))
    if lost:
        kind = f"trained {type(model).__name__}"
        raise UserError(f"{name}: expected a {kind}, found no weights of {lost[0]} ({len(lost)} missing in all)")
    return model


def _explain(name: str, error: Exception) -> str:
    if "ignore_mismatched_sizes" in str(error):
        return f"{name}: expected a head with num_labels=1, found weights of another shape; start from the base model"
    if "file named model.safetensors" in str(error):
        kind = "AutoModelForCausalLM"
        with suppress(OSError, ValueError, TypeError):  # the class that holds all weights, a head among them
            kind = AutoConfig.from_pretrained(name, trust_remote_code=False).architectures[0]
        way_out = f"transformers.{kind}.from_pretrained({name!r}, use_safetensors=False).save_pretrained(NEW)"
        return f"{name}: expected weights in model.safetensors, found none; convert a pickle that you trust: {way_out}"
    return f"model {name}: {first_line(error)}{source_hint(error, name, 'model_name_or_path')}"


def peft_config(model_args: ModelConfig, task_type: str = "SEQ_CLS") -> PeftConfig | None:
    """TRL's adapter settings as peft reads them; None without `use_peft`.

    With the task type SEQ_CLS the score head is trained and saved with the adapter.
    """
    config = get_peft_config(model_args)
    if config is not None:
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # peft sets it to fit the model's layers
        config.task_type = task_type
        config.revision = model_args.model_revision  # of the base model: whoever loads the adapter needs the same
        if isinstance(config.target_modules, str) and config.target_modules.isidentifier():
            # TRL unwraps a list of one name, which peft then takes for a pattern of whole paths.
            config.target_modules = {config.target_modules}
    return config


def merge_adapter(
    adapter: Path, model_args: ModelConfig, config: RewardConfig, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The base model with a saved adapter and its score head merged in: an ordinary model of transformers."""
    base = load_reward_model(replace(model_args, **WHOLE), config, tokenizer)
    return PeftModel.from_pretrained(base, adapter).merge_and_unload()


def load_merged(
    folder: Path, model_args: ModelConfig, config: RewardConfig, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """What `merge_adapter` gave, from the folder where it was saved."""
    saved = replace(model_args, model_name_or_path=str(folder), model_revision="main", **WHOLE)
    return load_reward_model(saved, config, tokenizer)


def write_random_gpt2(shape: str, tokenizer: PreTrainedTokenizerBase, folder: Path, seed: int) -> None:
    """Write a GPT-2 of LAYERSxWIDTH (heads 64 wide, 1,024 positions) with weights drawn by `seed`, and its tokenizer.

    Raises `UserError` for a shape that GPT-2 cannot have.
    """
    try:
        layers, width = (int(number) for number in shape.split("x"))
        config = GPT2Config(vocab_size=len(tokenizer), n_layer=layers, n_embd=width, n_head=max(1, width // 64))
        set_seed(seed)
        model = GPT2LMHeadModel(config)
    except ValueError as error:
        raise UserError(f"random_gpt2: expected LAYERSxWIDTH such as 6x256, found {shape!r}") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
