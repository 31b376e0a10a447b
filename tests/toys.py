"""Small models and tokenised pairs built in place; pure functions, for tests and for the processes that tests start."""

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback
from transformers.models.auto import CONFIG_MAPPING

from reward_recipes.config import RewardRecipeConfig
from reward_recipes.pairs.encode import common_prefix_length
from reward_recipes.score.model import Float32Score
from reward_recipes.trainer import ExactRewardTrainer

torch.set_num_threads(1)  # models this small gain nothing from threads and lose to other work on the machine

# Which pairs a model is right about, where exact accuracy and TRL's mean of batch means differ.
SEVEN = [True, False, False, False, True, True, True]  # at batch 4: exactly 4/7, TRL's 5/8
NINE = [True, True, True, False, True, True, False, False, False]  # exactly 5/9, TRL's (3/4 + 2/4 + 0) / 3 = 5/12

EOS, PAD, FIRST = 0, 1, 2  # token ids; those from FIRST on are text
VOCABULARY = 64
POSITIONS = 128

_LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIZES = _LAYERS | {"intermediate_size": 64, "max_position_embeddings": POSITIONS}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS},
    "opt": _LAYERS | {"ffn_dim": 64, "word_embed_proj_dim": 16, "max_position_embeddings": POSITIONS},
    "gpt_neox": _SIZES,
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": _GROUPED | {"head_dim": 8},
    "mistral": _GROUPED | {"sliding_window": None},
    "gemma": _GROUPED | {"head_dim": 8},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": _LAYERS | {"alibi": True},
    "bert": _SIZES,
    "roberta": _SIZES,
    "qwen3_next": _GROUPED | {"layer_types": ["linear_attention", "full_attention"]},
}
DROPOUT_OFF = {
    name: 0.0 for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout", "attention_dropout", "hidden_dropout")
}


def tiny_model(architecture: str, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A `*ForSequenceClassification` of two layers with one label, as `modeling.load_reward_model` would prepare it.

    Weights are larger than a new model's, so that attention is far from uniform and scores are of order 1.
    """
    kind = CONFIG_MAPPING[architecture]
    ids = {"vocab_size": VOCABULARY, "num_labels": 1, "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD}
    settings = kind(**ids | ARCHITECTURES[architecture] | config)
    for name, value in DROPOUT_OFF.items():
        if hasattr(settings, name):
            setattr(settings, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(settings)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    if hasattr(model, "score"):
        model.score.__class__ = Float32Score
    if dtype == torch.float64:
        _let_norms_keep_float64(model)
    return model.to(dtype)


def _let_norms_keep_float64(model: PreTrainedModel) -> None:
    """RMS norms of transformers round to float32 whatever the model's precision, which would hide 9 of 16 digits."""
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            epsilon = getattr(module, "variance_epsilon", None) or module.eps
            module.forward = partial(_rms_norm, module, offset=float(name.startswith("Gemma")), epsilon=epsilon)


def _rms_norm(module: torch.nn.Module, hidden: torch.Tensor, offset: float, epsilon: float) -> torch.Tensor:
    return torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], offset + module.weight, epsilon)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words `w2`, `w3`, ... whose EOS and pad ids are those of the tiny models."""
    words = {"<eos>": EOS, "<pad>": PAD} | {f"w{token}": token for token in range(FIRST, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


def pair(chosen: Sequence[int], rejected: Sequence[int], row: int = 0, **columns: float) -> dict[str, Any]:
    """The record that `pairs.encode_splits` keeps of a pair of token ids without their EOS."""
    left, right = torch.tensor([*chosen, EOS]).numpy(), torch.tensor([*rejected, EOS]).numpy()
    return {
        "chosen_ids": left.tolist(),
        "rejected_ids": right.tolist(),
        "prefix": common_prefix_length(left, right),
        "chosen_length": len(left),
        "rejected_length": len(right),
        "row": row,
        "subset": -1,
        **columns,
    }


def random_pairs(count: int, longest: int = 40, seed: int = 0, margins: bool = False) -> list[dict[str, Any]]:
    """Pairs that share between nothing and all of the shorter text, each text at most `longest` tokens and EOS."""
    rng = random.Random(seed)
    pairs = []
    for row in range(count):
        prefix = rng.choice([0, rng.randrange(longest), longest - 1])
        sides = [
            [rng.randrange(FIRST, VOCABULARY) for _ in range(rng.randrange(longest - prefix + 1))] for _ in range(2)
        ]
        sides[0] = sides[0] or [FIRST]
        shared = [rng.randrange(FIRST, VOCABULARY) for _ in range(prefix)]
        extra = {"margin": rng.choice([0.0, 0.5, 2.0])} if margins else {}
        pairs.append(pair(shared + sides[0], shared + sides[1], row, **extra))
    return pairs


def corner_pairs() -> list[dict[str, Any]]:
    """Nothing in common; one text a prefix of the other, both ways round; one reply empty; one pair of two tokens."""
    text = list(range(FIRST, FIRST + 20))
    sides = [(text, text[::-1]), (text[:8], text), (text, text[:8]), (text, []), ([FIRST], [])]
    return [pair(*both, row) for row, both in enumerate([*sides, (text * 3, [*text, FIRST])])]


def dataset(pairs: list[dict[str, Any]]) -> Dataset:
    """Pairs as a data set, numbered by their order."""
    return Dataset.from_list([record | {"row": row} for row, record in enumerate(pairs)])


def text_score(model: torch.nn.Module, ids: Sequence[int]) -> float:
    """The score of one text on its own: no padding, no packing, no batch."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits.item()


def pairs_judged(model: torch.nn.Module, right: Sequence[bool], seed: int = 7) -> list[dict[str, Any]]:
    """Random pairs, turned round where needed so that the model is right about some and wrong about the others."""
    pairs = []
    for record, wanted in zip(random_pairs(len(right), longest=20, seed=seed), right, strict=True):
        chosen, rejected = record["chosen_ids"], record["rejected_ids"]
        if (text_score(model, chosen) > text_score(model, rejected)) != wanted:
            chosen, rejected = rejected, chosen
        pairs.append(pair(chosen[:-1], rejected[:-1]))
    return pairs


def config(output_dir: Path | str, **fields: Any) -> RewardRecipeConfig:
    """A quiet recipe for the CPU that evaluates, saves and reports only as `fields` say."""
    quiet = {"use_cpu": True, "gradient_checkpointing": False, "bf16": False, "report_to": "none", "disable_tqdm": True}
    defaults = {"max_length": 64, "logging_steps": 1, "eval_strategy": "no", "save_steps": 1000, "train_probe_size": 0}
    return RewardRecipeConfig(output_dir=str(output_dir), **quiet | defaults | fields)


def tiny_trainer(
    model: torch.nn.Module,
    args: RewardRecipeConfig,
    train: list[dict[str, Any]],
    evaluation: list[dict[str, Any]] | None = None,
    **kwargs: Any,
) -> ExactRewardTrainer:
    """Our trainer on lists of pairs; packed if `kwargs` holds `max_tokens_per_row`."""
    return ExactRewardTrainer(
        model=model,
        args=args,
        train_dataset=dataset(train),
        eval_dataset=evaluation and dataset(evaluation),
        processing_class=tiny_tokenizer(),
        **kwargs,
    )


class TurnRound(TrainerCallback):
    """Changes the sign of every score after step 1, so that each judgement is the opposite from then on."""

    def on_step_begin(self, args: object, state: Any, control: object, model: torch.nn.Module, **kwargs: Any) -> None:
        if state.global_step == 1:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "score" in name and parameter.requires_grad:
                        parameter.neg_()
