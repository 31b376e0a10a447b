"""How fast training is beside stock TRL, by step and by whole run: same model, pairs and order, in turn.

Run it as `python recipes/benchmark/benchmark.py`; `runs.py` holds the whole runs. Fields of recipes apply too, so a
recipe can be timed as it stands: `--config RECIPE.yaml --batch_sizes 8 16`. In steps, dropout and gradient
checkpointing are off on all sides.
"""

import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset, disable_progress_bars
from runs import SCALES, compare_runs, format_runs
from transformers import PreTrainedTokenizerBase, pipeline
from transformers.utils import logging as transformers_logging
from trl import ModelConfig, RewardConfig, RewardTrainer, ScriptArguments

from reward_recipes.config import RewardRecipeConfig, parse_recipe
from reward_recipes.data import prepare_data
from reward_recipes.evaluate import table
from reward_recipes.pairs import Pairs, encode_splits, load_pairs, load_recipe_tokenizer
from reward_recipes.run import expect, made_with, run_cli, save_json
from reward_recipes.score import Scorer, load_reward_model, write_random_gpt2
from reward_recipes.trainer import ExactRewardTrainer

# The second side is packing as other tools do it: pairs packed without padding, each prompt computed twice.
STOCK, UNSHARED, PACKED = SIDES = ("stock TRL", "packed, prompt twice", "packed")
SCORED_TEXTS = 2000
PIPELINE_BATCHES = (1, 2, 4, 8, 16)


@dataclass
class BenchmarkArguments:
    """What to time."""

    batch_sizes: list[int] = field(default_factory=lambda: [4, 8, 16, 32], metadata={"help": "Pairs a step."})
    train_pairs: int = field(default=128, metadata={"help": "Pairs of a timed run, after a step that is not timed."})
    repeats: int = field(default=3, metadata={"help": "Runs of each side, in turn; medians are reported."})
    eval_pairs: int = field(default=64, metadata={"help": "Pairs of a timed evaluation."})
    prepare_pairs: int = field(default=6000, metadata={"help": "Pairs of the timed data preparation."})
    random_gpt2: str | None = field(default=None, metadata={"help": "Time a random GPT-2 of this LAYERSxWIDTH."})
    parts: list[str] = field(default_factory=lambda: ["steps", "runs"], metadata={"help": "`steps`, `runs` or both."})
    runs: list[str] = field(default_factory=lambda: [*SCALES], metadata={"help": "Whole runs, by name."})
    run_repeats: int = field(default=3, metadata={"help": "Whole runs of each side, in turn."})
    run_scale: float = field(default=1.0, metadata={"help": "Size of the whole runs, as a share of their usual one."})
    best_eval_batch: int = field(
        default=4, metadata={"help": "Stock TRL's fastest evaluation batch, run once more; 0: not."}
    )


@dataclass(frozen=True)
class Setup:
    """What all sides share."""

    script: ScriptArguments
    config: RewardRecipeConfig
    model_args: ModelConfig
    bench: BenchmarkArguments
    tokenizer: PreTrainedTokenizerBase
    pairs: Dataset


def build_trainer(setup: Setup, side: str, batch_size: int) -> RewardTrainer:
    """A trainer of that side with its own copy of the model, loaded from the same seed."""
    config, pairs = setup.config, setup.pairs
    names = ("output_dir", "max_length", "learning_rate", "seed", "bf16", "use_cpu", "dataloader_pin_memory")
    fields = {name: getattr(config, name) for name in names}
    fields |= {"max_steps": max(1, setup.bench.train_pairs // batch_size)}
    fields |= {"per_device_train_batch_size": batch_size}
    fields |= {"per_device_eval_batch_size": batch_size if side == STOCK else config.per_device_eval_batch_size}
    fields |= {"gradient_checkpointing": False, "save_strategy": "no", "logging_steps": 10**6}
    args = RewardConfig(**fields, report_to="none", disable_tqdm=True)
    if side == STOCK:
        pairs = pairs.select_columns(["chosen_ids", "rejected_ids"])
    options = {
        "model": load_reward_model(setup.model_args, config, setup.tokenizer),
        "args": args,
        "train_dataset": pairs,
        "eval_dataset": pairs.select(range(min(setup.bench.eval_pairs, len(pairs)))),
        "processing_class": setup.tokenizer,
    }
    if side == STOCK:
        return RewardTrainer(**options)
    layout = "unshared" if side == UNSHARED else "shared"
    return ExactRewardTrainer(**options, max_tokens_per_row=config.max_tokens_per_row, layout=layout)


def _seconds(work: Callable[[], object]) -> float:
    """How long `work` takes; what it prints is thrown away."""
    with redirect_stdout(StringIO()):
        start = time.perf_counter()
        work()
        return time.perf_counter() - start


def compare(setup: Setup, batch_size: int) -> dict[str, Any]:
    """Time all sides at one batch size.

    Returns:
        `pairs_per_second`, `eval_pairs_per_second` and `tokens_computed` (in one run) by side; `ratio`, `eval_ratio`:
        medians over the repeats of each side's speed over stock TRL's in the same repeat; `bound`: stock's tokens,
        padding included, over the pairs' unique tokens, the ratio that token counting allows.
    """
    trainers = {side: build_trainer(setup, side, batch_size) for side in SIDES}
    speeds, eval_speeds = pd.DataFrame(columns=SIDES, dtype=float), pd.DataFrame(columns=SIDES, dtype=float)
    for trainer in trainers.values():  # what is slow only once
        trainer.args.max_steps, steps = 1, trainer.args.max_steps
        _seconds(trainer.train)
        trainer.args.max_steps = steps
    for repeat in range(setup.bench.repeats):
        for side, trainer in trainers.items():
            speeds.loc[repeat, side] = trainer.args.max_steps * batch_size / _seconds(trainer.train)
            eval_speeds.loc[repeat, side] = len(trainer.eval_dataset) / _seconds(trainer.evaluate)
    batches = {side: list(islice(each.get_train_dataloader(), each.args.max_steps)) for side, each in trainers.items()}
    computed = {side: sum(batch["input_ids"].numel() for batch in batches[side]) for side in SIDES}
    unique = int(sum(batch["tokens"][1] for batch in batches[PACKED]))
    return {
        "batch_size": batch_size,
        "pairs_per_second": speeds.median().to_dict(),
        "ratio": speeds.div(speeds[STOCK], axis=0).median().to_dict(),
        "eval_pairs_per_second": eval_speeds.median().to_dict(),
        "eval_ratio": eval_speeds.div(eval_speeds[STOCK], axis=0).median().to_dict(),
        "tokens_computed": computed,
        "tokens_unique": unique,
        "bound": computed[STOCK] / unique,
    }


def peak_memory(setup: Setup, side: str, batch_size: int) -> int:
    """Bytes at this process's peak, a short training run, above what the loaded model takes; on a CPU Linux only."""
    trainer = build_trainer(setup, side, batch_size)
    on_gpu = trainer.args.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else _resident("VmRSS")
    _seconds(trainer.train)
    return (torch.cuda.max_memory_allocated() if on_gpu else _resident("VmHWM")) - before


def _resident(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def time_preparation(setup: Setup) -> float:
    """Pairs per second from text to token ids, on the recipe's pairs repeated with changed first words."""
    script, config, wanted = setup.script, setup.config, setup.bench.prepare_pairs
    raw = load_pairs(script.dataset_name, script.dataset_config, config.dataset_data_dirs)[script.dataset_train_split]
    # New texts, which no cache knows.
    sides = {
        side: [f"{row} {raw.rows[row % len(raw.rows)][side]}" for row in range(wanted)]
        for side in ("chosen", "rejected")
    }
    pairs = {"": Pairs(Dataset.from_dict(sides), frozenset(), "benchmark")}
    return wanted / _seconds(lambda: encode_splits(pairs, setup.tokenizer, config.max_length, config.overlong, []))


def time_scoring(setup: Setup) -> dict[str, float]:
    """Texts per second, on the replies of the pairs: the scorer's, and those of a pipeline at its best batch size."""
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


def _best_evaluation(rows: list[dict[str, Any]]) -> float:
    """Evaluation here, whose batches do not depend on the option, over stock TRL's at its fastest batch size."""
    speeds = pd.DataFrame([row["eval_pairs_per_second"] for row in rows])
    return speeds[PACKED].median() / speeds[STOCK].max()


def format_report(report: dict[str, Any]) -> str:
    """A Markdown table with a line a batch size, and a line for each measurement beside it."""
    head = ["pairs a step", "stock TRL, pairs/s", "packed, pairs/s", "ratio", "ratio of tokens"]
    head += ["ratio / ratio of tokens", "ratio without prefix sharing", "evaluation ratio"]
    rows = []
    for row in report["rows"]:
        speed, ratio, bound = row["pairs_per_second"], row["ratio"], row["bound"]
        cells = [str(row["batch_size"]), f"{speed[STOCK]:.1f}", f"{speed[PACKED]:.1f}", f"**{ratio[PACKED]:.2f}**"]
        cells += [f"{bound:.2f}", f"{ratio[PACKED] / bound:.0%}", f"{ratio[UNSHARED]:.2f}"]
        rows.append([*cells, f"{row['eval_ratio'][PACKED]:.2f}"])
    peaks, scoring = report["peak_memory_bytes"], report["scoring_texts_per_second"]
    lines = [
        f"peak memory at {report['memory_batch_size']} pairs: {peaks[PACKED] / peaks[STOCK]:.2f} of stock",
        f"data preparation: {report['preparation_pairs_per_second']:,.0f} pairs/s",
        f"evaluation, best against best batch: {_best_evaluation(report['rows']):.2f}",
        f"scoring: {scoring['scorer'] / scoring['pipeline']:.1f} times the pipeline's speed at its best batch size",
    ]
    return "\n".join([table(head, rows), *lines])


def measure_steps(setup: Setup) -> dict[str, Any]:
    """What one step, one evaluation and one preparation take."""
    bench = setup.bench
    memory_batch_size = 16 if 16 in bench.batch_sizes else bench.batch_sizes[-1]
    # A process of its own for each side.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        peaks = {side: pool.submit(peak_memory, setup, side, memory_batch_size).result() for side in (STOCK, PACKED)}
    return {
        "memory_batch_size": memory_batch_size,
        "peak_memory_bytes": peaks,
        "preparation_pairs_per_second": time_preparation(setup),
        "scoring_texts_per_second": time_scoring(setup),
        "rows": [compare(setup, batch_size) for batch_size in bench.batch_sizes],
    }


def measure_runs(setup: Setup) -> list[dict[str, Any]]:
    """Both whole runs, on pairs drawn by the seed, from one saved model."""
    script, config, bench = setup.script, setup.config, setup.bench
    pairs = setup.pairs.shuffle(seed=config.seed)
    raw = load_pairs(script.dataset_name, script.dataset_config, config.dataset_data_dirs)[script.dataset_train_split]
    texts = raw.rows.select_columns(["chosen", "rejected"]).select(pairs["row"])
    found = []
    with tempfile.TemporaryDirectory() as folder:
        load_reward_model(setup.model_args, config, setup.tokenizer).save_pretrained(folder)
        setup.tokenizer.save_pretrained(folder)
        options = {"model_name_or_path": folder, "bf16": config.bf16, "max_length": config.max_length}
        for name in bench.runs:
            scale = replace(SCALES[name], pairs=round(SCALES[name].pairs * bench.run_scale))
            best = bench.best_eval_batch or None
            found.append(compare_runs(name, scale, bench.run_repeats, best, pairs, texts, **options))
    return found


def measure(setup: Setup) -> dict[str, Any]:
    """The parts that are asked for, with what they were taken on."""
    config, parts = setup.config, setup.bench.parts
    return {
        **made_with(config.device),
        "dtype": "bf16" if config.bf16 else "float32",
        "max_length": config.max_length,
        "max_tokens_per_row": config.max_tokens_per_row,
        "arguments": asdict(setup.bench),
        **({"runs": measure_runs(setup)} if "runs" in parts else {}),
        **(measure_steps(setup) if "steps" in parts else {}),
    }


def main() -> None:
    """Parse, measure, save and print."""
    script, config, model_args, *_, bench = parse_recipe(None, BenchmarkArguments)
    expect({*bench.runs} <= {*SCALES}, "runs", f"names among {', '.join(SCALES)}", bench.runs)
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    config.eval_strategy = "no"  # pairs are read without an eval split
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_recipe_tokenizer(config, model_args)
        if bench.random_gpt2:
            write_random_gpt2(bench.random_gpt2, tokenizer, Path(folder), config.seed)
            model_args.model_name_or_path = folder
        pairs = prepare_data(script, config, tokenizer).train
        report = measure(Setup(script, config, model_args, bench, tokenizer, pairs))
    save_json(output_dir / "benchmark.json", report)
    if "runs" in report:
        print(format_runs(report["runs"], bench.best_eval_batch), end="\n\n")
    if "rows" in report:
        print(format_report(report))


if __name__ == "__main__":
    run_cli(main)
