"""Toys built in place: no test needs the network, and none writes into a user's cache."""

import atexit
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Read by the libraries when they are imported, and inherited by the processes that tests start.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="reward-recipes-tests-")
os.environ["HF_DATASETS_CACHE"] = f"{os.environ['HF_HOME']}/datasets"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import pytest
import torch
from datasets import Dataset, Features, Value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from trl.data_utils import _tokenize

from reward_recipes.pairs import Dialogue, Pairs, Text
from reward_recipes.pairs.tokens import load_tokenizer, save_tokenizer
from reward_recipes.score.model import fit_to_tokenizer

torch.set_num_threads(1)  # toys gain nothing from threads, and processes side by side lose by them
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"needs real pairs in {REAL_DATA}")

POSITIONS = 128
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_CORPUS = (
    "\n\nHuman: How do I bake bread?\n\nAssistant: Mix flour, water, salt and yeast, then wait for an hour.",
    "\n\nHuman: Can you help me?\n\nAssistant: Yes, of course. What do you need?\n\nHuman: A story.",
)


def write_jsonl(path: Path, rows: Iterable[dict[str, object]]) -> Path:
    """Write one JSON object a line, make the folders above, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def hh_pairs(count: int, start: int = 0) -> list[dict[str, str]]:
    """Pairs of whole dialogues in the HH format, each with a first turn of its own."""
    turn = "\n\nHuman: What is {0} and {0}?\n\nAssistant: {1}"
    return [
        {"chosen": turn.format(i, f"It is {2 * i}."), "rejected": turn.format(i, "No idea, ask somebody else.")}
        for i in range(start, start + count)
    ]


def as_pairs(rows: Sequence[dict[str, Any]], name: str = "here") -> Pairs:
    """Rows as `load_pairs` reads them from a file, without one."""
    columns = dict.fromkeys(column for row in rows for column in row)
    cells = {column: [row.get(column) for row in rows] for column in columns}
    texts = cells.keys() & {"prompt", "chosen", "rejected"}
    messages = {column for column in texts if any(isinstance(value, list) for value in cells[column])}
    for column in columns.keys() & (messages | {"tools", "chat_template_kwargs"}):
        cells[column] = [value if isinstance(value, str | None) else json.dumps(value) for value in cells[column]]
    kinds = Features({column: Value("float64" if column == "margin" else "string") for column in columns})
    return Pairs(Dataset.from_dict(cells, features=kinds), frozenset(messages), name)


def trl_ids(tokenizer: PreTrainedTokenizerBase, text: Text) -> list[int]:
    """The ids that TRL trains on, of a dialogue up to its final EOS, or with one where it ends otherwise."""
    eos, end = tokenizer.eos_token, tokenizer.eos_token_id
    if isinstance(text, str):
        return _tokenize(tokenizer, text if text.endswith(eos) else text + eos)["input_ids"]
    text = text if isinstance(text, Dialogue) else Dialogue(text)
    ids = _tokenize(tokenizer, text.messages, tools=text.tools, **(text.options or {}))["input_ids"]
    size = len(ids) - ids[::-1].index(end) if end in ids else 0
    return ids[:size] if size and not tokenizer.decode(ids[size:]).strip() else [*ids, end]


def bpe(special: list[str]) -> Tokenizer:
    """A byte-level BPE like GPT-2's; the special tokens get the ids 0, 1, ..."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def _save(model: type[PreTrainedModel], config: PreTrainedConfig, folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model(config).save_pretrained(folder)


def _save_llama(folder: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    _save(LlamaForCausalLM, LlamaConfig(vocab_size=320, max_position_embeddings=POSITIONS, **sizes, **ids), folder)


# tqdm's own lock is shared with forked children: one that is killed while it holds the lock would stop us for ever.
tqdm.set_lock(threading.RLock())


@pytest.fixture(scope="session")
def gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 and its tokenizer: EOS `<|endoftext|>` (id 0), no pad token, 128 positions."""
    folder = tmp_path_factory.mktemp("gpt2")
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe([end]), eos_token=end, bos_token=end, unk_token=end)
    tokenizer.save_pretrained(folder)
    sizes = {"n_positions": POSITIONS, "n_embd": 32, "n_layer": 2, "n_head": 2}
    _save(GPT2LMHeadModel, GPT2Config(vocab_size=320, bos_token_id=0, eos_token_id=0, **sizes), folder)
    return folder


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and its tokenizer: BOS `<s>` (1) opens every text, EOS `</s>` (2) is also the pad token."""
    folder = tmp_path_factory.mktemp("llama")
    backend = bpe(["<unk>", "<s>", "</s>"])
    begun = {"single": "<s> $A", "pair": "<s> $A <s> $B", "special_tokens": [("<s>", 1)]}
    backend.post_processor = processors.TemplateProcessing(**begun)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    _save_llama(folder)
    return folder


@pytest.fixture(scope="session")
def chat_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama for chat: ChatML template, EOS = pad = `<|im_end|>` (2), spare tokens 3 and 4."""
    folder = tmp_path_factory.mktemp("chat")
    backend = bpe(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<spare_0>", "<spare_1>"])
    names = {"unk_token": "<|endoftext|>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|im_end|>", **names)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    _save_llama(folder)
    return folder


def save_reward_model(source: Path, folder: Path, **policy: object) -> Path:
    """Write a reward model with a random head, as a run with that `max_length`, `overlong` and `form` leaves it."""
    tokenizer = load_tokenizer(str(source))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
        fit_to_tokenizer(model, tokenizer)
        torch.nn.init.normal_(model.score.weight, std=0.5)
    model.config.problem_type = "regression"
    model.config.reward_recipes = {"max_length": POSITIONS, "overlong": "drop"} | policy
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder, model.config.reward_recipes["max_length"])
    return folder


@pytest.fixture(scope="session")
def reward_dir(gpt2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 reward model that keeps the last 40 tokens of a text."""
    return save_reward_model(gpt2_dir, tmp_path_factory.mktemp("rewards") / "gpt2", max_length=40, overlong="keep_end")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training pairs, of which a fifth held out leaves 32, 8 steps of 4 an epoch; and 7 test pairs.

    Two test pairs share a prompt, and three are turned round.
    """
    folder = tmp_path_factory.mktemp("pairs")
    write_jsonl(folder / "train.jsonl", hh_pairs(40))
    test = hh_pairs(6, start=100)
    test.append({"chosen": f"{test[5]['chosen']} So.", "rejected": test[5]["rejected"]})
    turned = [{"chosen": row["rejected"], "rejected": row["chosen"]} for row in test[:3]]
    write_jsonl(folder / "test.jsonl", turned + test[3:])
    return folder


@pytest.fixture(scope="session")
def whole(gpt2_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `whole_runs`'s options that nothing disturbed. Nobody writes into it."""
    from whole_runs import arguments, run, sketched_pictures

    output = tmp_path_factory.mktemp("runs") / "whole"
    with sketched_pictures():
        run(*arguments(gpt2_dir, data, output))
    return output


@pytest.fixture(scope="module")
def sketched() -> Iterator[None]:
    """Runs of this module draw no real picture."""
    from whole_runs import sketched_pictures  # here, because it imports all of training

    with sketched_pictures():
        yield
