"""What one step, one evaluation, the preparation and the scoring take beside stock TRL and `transformers.pipeline`."""

import multiprocessing
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, pipeline
from trl import ModelConfig, RewardConfig, RewardTrainer, ScriptArguments

from reward_recipes.config import RewardRecipeConfig
from reward_recipes.evaluate import table
from reward_recipes.packing import row_limit
from reward_recipes.pairs import Pairs, encode_splits, load_pairs
from reward_recipes.run import keep_freed_memory, quiet_libraries
from reward_recipes.score import Scorer, load_reward_model
from reward_recipes.trainer import ExactRewardTrainer

# The second is stock TRL with our setting of the C library. The third packs as other tools do: each prompt twice.
STOCK, KEPT, UNSHARED, PACKED = SIDES = ("stock TRL", "stock TRL, memory kept", "packed, prompt twice", "packed")
SCORED_TEXTS = 2000
PIPELINE_BATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Setup:
    """What all sides share; the numbers are those of `BenchmarkArguments`."""

    script: ScriptArguments
    config: RewardRecipeConfig
    model_args: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    pairs: Dataset
    train_pairs: int
    eval_pairs: int
    repeats: int


def build_trainer(setup: Setup, side: str, batch_size: int) -> RewardTrainer:
    """A trainer of that side with its own copy of the model, loaded from the same seed."""
    config, pairs, is_stock = setup.config, setup.pairs, side in (STOCK, KEPT)
    names = ("output_dir", "max_length", "learning_rate", "seed", "bf16", "use_cpu", "dataloader_pin_memory")
    fields = {name: getattr(config, name) for name in names}
    fields |= {"max_steps": max(1, setup.train_pairs // batch_size)}
    fields |= {"per_device_train_batch_size": batch_size}
    fields |= {"per_device_eval_batch_size": batch_size if is_stock else config.per_device_eval_batch_size}
    fields |= {"gradient_checkpointing": False, "save_strategy": "no", "logging_steps": 10**6}
    args = RewardConfig(**fields, report_to="none", disable_tqdm=True)
    if is_stock:
        pairs = pairs.select_columns(["chosen_ids", "rejected_ids"])
    options = {
        "model": load_reward_model(setup.model_args, config, setup.tokenizer),
        "args": args,
        "train_dataset": pairs,
        "eval_dataset": pairs.select(range(min(setup.eval_pairs, len(pairs)))),
        "processing_class": setup.tokenizer,
    }
    if is_stock:
        return RewardTrainer(**options)
    layout, limit = "unshared" if side == UNSHARED else "shared", row_limit(config.max_tokens_per_row, config.device)
    return ExactRewardTrainer(**options, max_tokens_per_row=limit, layout=layout)


_trainer: RewardTrainer  # of the process that `in_process` starts
_loaded: int  # bytes that it took before training


def in_process(setup: Setup, side: str, batch_size: int) -> ProcessPoolExecutor:
    """A process for one side, since what the C library does with freed memory is a setting of the process."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, initializer=begin, initargs=(setup, side, batch_size))


def begin(setup: Setup, side: str, batch_size: int) -> None:
    """Make this process's trainer, and run one step of it for what is slow only once."""
    global _trainer, _loaded
    quiet_libraries()
    if side != STOCK:
        keep_freed_memory()
    _trainer = build_trainer(setup, side, batch_size)
    on_gpu = _trainer.args.device.type == "cuda"
    _loaded = torch.cuda.memory_allocated() if on_gpu else _resident("VmRSS")
    _trainer.args.max_steps, steps = 1, _trainer.args.max_steps
    train()
    _trainer.args.max_steps = steps


def train() -> float:
    """Pairs a second of a training run."""
    return _trainer.args.max_steps * _trainer.args.per_device_train_batch_size / _seconds(_trainer.train)


def evaluate() -> float:
    """Pairs a second of an evaluation."""
    return len(_trainer.eval_dataset) / _seconds(_trainer.evaluate)


def tokens() -> tuple[int, int]:
    """Tokens computed in a training run, padding included; and the pairs' unique ones, 0 in stock TRL."""
    batches = list(islice(_trainer.get_train_dataloader(), _trainer.args.max_steps))
    unique = sum(int(batch["tokens"][1]) for batch in batches if "tokens" in batch)
    return sum(batch["input_ids"].numel() for batch in batches), unique


def peak_memory() -> int:
    """Bytes at the peak of training and evaluation, above what the loaded model takes; on a CPU Linux only."""
    on_gpu = _trainer.args.device.type == "cuda"
    return (torch.cuda.max_memory_allocated() if on_gpu else _resident("VmHWM")) - _loaded


def _resident(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def _seconds(work: Callable[[], object]) -> float:
    """How long `work` takes; what it prints is thrown away."""
    with redirect_stdout(StringIO()):
        start = time.perf_counter()
        work()
        return time.perf_counter() - start


def compare(setup: Setup, batch_size: int) -> dict[str, Any]:
    """Time all sides in turn at one batch size.

    Returns:
        `pairs_per_second`, `eval_pairs_per_second`, `tokens_computed` (in one run) and `peak_memory_bytes` by side;
        `ratio`, `eval_ratio`: medians over the repeats of each side's speed over stock TRL's in the same repeat;
        `bound`: stock's tokens, padding included, over the pairs' unique tokens, the ratio that token counting allows.
    """
    speeds, eval_speeds = pd.DataFrame(columns=SIDES, dtype=float), pd.DataFrame(columns=SIDES, dtype=float)
    with ExitStack() as stack:
        processes = {side: stack.enter_context(in_process(setup, side, batch_size)) for side in SIDES}
        for repeat in range(setup.repeats):
            for side, process in processes.items():
                speeds.loc[repeat, side] = process.submit(train).result()
                eval_speeds.loc[repeat, side] = process.submit(evaluate).result()
        counts = {side: process.submit(tokens).result() for side, process in processes.items()}
        peaks = {side: process.submit(peak_memory).result() for side, process in processes.items()}
    return {
        "batch_size": batch_size,
        "pairs_per_second": speeds.median().to_dict(),
        "ratio": speeds.div(speeds[STOCK], axis=0).median().to_dict(),
        "eval_pairs_per_second": eval_speeds.median().to_dict(),
        "eval_ratio": eval_speeds.div(eval_speeds[STOCK], axis=0).median().to_dict(),
        "tokens_computed": {side: computed for side, (computed, _) in counts.items()},
        "tokens_unique": counts[PACKED][1],
        "bound": counts[STOCK][0] / counts[PACKED][1],
        "peak_memory_bytes": peaks,
    }


def time_preparation(setup: Setup, wanted: int) -> dict[str, float]:
    """Pairs a second from text to token ids and of the tokenizer alone, in turn, on texts that no cache knows yet.

    They are the recipe's pairs, repeated with changed first words. Medians; `share` is that of each repeat's ratio.
    """
    script, config, tokenizer = setup.script, setup.config, setup.tokenizer
    raw = load_pairs(script.dataset_name, script.dataset_config, config.dataset_data_dirs)[script.dataset_train_split]

    def new_texts(mark: str) -> dict[str, list[str]]:
        rows = (raw.rows[row % len(raw.rows)] for row in range(wanted))
        pairs = [(f"{mark}{row} {pair['chosen']}", f"{mark}{row} {pair['rejected']}") for row, pair in enumerate(rows)]
        return dict(zip(("chosen", "rejected"), map(list, zip(*pairs, strict=True)), strict=True))

    def tokenise(texts: list[str]) -> None:
        for start in range(0, len(texts), 1000):
            tokenizer(texts[start : start + 1000], return_attention_mask=False, verbose=False)

    speeds = pd.DataFrame(columns=["prepared", "tokenizer"], dtype=float)
    for repeat in range(setup.repeats):
        texts = new_texts(f"a{repeat}")
        alone = partial(tokenise, [*texts["chosen"], *texts["rejected"]])
        speeds.loc[repeat, "tokenizer"] = wanted / _seconds(alone)
        pairs = {"": Pairs(Dataset.from_dict(new_texts(f"b{repeat}")), frozenset(), "benchmark")}
        encode = partial(encode_splits, pairs, tokenizer, config.max_length, config.overlong, [])
        speeds.loc[repeat, "prepared"] = wanted / _seconds(encode)
    return speeds.median().to_dict() | {"share": (speeds["prepared"] / speeds["tokenizer"]).median()}


def time_scoring(setup: Setup) -> dict[str, float]:
    """Texts a second, on the replies of the pairs: the scorer's, and those of a pipeline at its best batch size."""
    tokenizer = setup.tokenizer
    model = load_reward_model(setup.model_args, setup.config, tokenizer).to(setup.config.device).eval()
    scorer = Scorer(model, tokenizer, setup.config.max_length)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, function_to_apply="none")
    pairs = (setup.pairs[row % len(setup.pairs)] for row in range(SCORED_TEXTS))
    texts = [tokenizer.decode(pair["chosen_ids"][pair["prefix"] : -1]) for pair in pairs]
    ended = [text + tokenizer.eos_token for text in texts]
    speeds = {size: SCORED_TEXTS / _seconds(partial(classify, ended, batch_size=size)) for size in PIPELINE_BATCHES}
    best = max(speeds, key=speeds.get)
    scorer_speed = SCORED_TEXTS / _seconds(partial(scorer.score, texts))
    return {"scorer": scorer_speed, "pipeline": speeds[best], "pipeline_batch_size": best}


def measure_steps(setup: Setup, batch_sizes: list[int], prepare_pairs: int) -> dict[str, Any]:
    """All of the above."""
    return {
        "preparation_pairs_per_second": time_preparation(setup, prepare_pairs),
        "scoring_texts_per_second": time_scoring(setup),
        "rows": [compare(setup, batch_size) for batch_size in batch_sizes],
    }


def format_steps(report: dict[str, Any]) -> str:
    """A Markdown table with a line a batch size, and a line for each measurement beside it."""
    head = ["pairs a step", "stock TRL, pairs/s", "packed, pairs/s", "ratio", "ratio of tokens", "memory kept by both"]
    head += ["ratio without prefix sharing", "evaluation ratio", "peak memory"]
    lines = []
    for row in report["rows"]:
        speed, ratio, peaks = row["pairs_per_second"], row["ratio"], row["peak_memory_bytes"]
        cells = [str(row["batch_size"]), f"{speed[STOCK]:.1f}", f"{speed[PACKED]:.1f}", f"**{ratio[PACKED]:.2f}**"]
        cells += [f"{row['bound']:.2f}", f"{ratio[PACKED] / ratio[KEPT]:.2f}", f"{ratio[UNSHARED]:.2f}"]
        lines.append([*cells, f"{row['eval_ratio'][PACKED]:.2f}", f"{peaks[PACKED] / peaks[STOCK]:.2f}"])
    speeds = pd.DataFrame([row["eval_pairs_per_second"] for row in report["rows"]])
    best = speeds[PACKED].median() / speeds[STOCK].max()  # here, batches do not depend on the option
    scoring, preparation = report["scoring_texts_per_second"], report["preparation_pairs_per_second"]
    return "\n".join(
        [
            table(head, lines),
            f"evaluation against stock's fastest batch: {best:.2f}",
            f"preparation: {preparation['prepared']:,.0f} pairs/s, {preparation['share']:.0%} of the tokenizer's rate",
            f"scoring: {scoring['scorer'] / scoring['pipeline']:.1f} times the pipeline's speed at its best batch size",
        ]
    )
