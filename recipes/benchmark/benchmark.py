"""How fast training is beside stock TRL: same model, pairs and order, one side after the other in turn.

Run it as `python recipes/benchmark/benchmark.py`. Fields of recipes apply too, so a recipe can be timed as it stands:
`--config RECIPE.yaml --batch_sizes 8 16`. Dropout and gradient checkpointing are off on all sides.
"""

import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset, disable_progress_bars
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase, TrainerCallback, pipeline
from transformers.utils import logging as transformers_logging
from trl import ModelConfig, RewardConfig, RewardTrainer, ScriptArguments

from reward_recipes.config import RewardRecipeConfig, parse_recipe
from reward_recipes.data import prepare_data
from reward_recipes.evaluate import table
from reward_recipes.pairs import encode_pairs, load_pairs, load_recipe_tokenizer
from reward_recipes.run import LOG, UserError, renamed_fields_unwarned, run_cli, save_json
from reward_recipes.score import Scorer, load_reward_model, write_random_gpt2
from reward_recipes.trainer import ExactRewardTrainer

# The second side is packing as other tools do it: pairs packed without padding, each prompt computed twice.
STOCK, UNSHARED, PACKED = "stock TRL", "packed, prompt twice", "packed"
SIDES = (STOCK, UNSHARED, PACKED)
STEPS_WITHOUT_TIME = 1


@dataclass
class BenchmarkArguments:
    """What to time."""

    batch_sizes: list[int] = field(default_factory=lambda: [4, 8, 16, 32], metadata={"help": "Pairs a step."})
    train_pairs: int = field(default=128, metadata={"help": "Pairs of a timed run, after one step that is not timed."})
    repeats: int = field(default=3, metadata={"help": "Runs of each side, in turn; medians are reported."})
    eval_pairs: int = field(default=64, metadata={"help": "Pairs of a timed evaluation."})
    prepare_pairs: int = field(default=6000, metadata={"help": "Pairs of the timed data preparation; 0 skips it."})
    score_texts: int = field(default=2000, metadata={"help": "Short texts of the timed scoring; 0 skips it."})
    random_gpt2: str | None = field(
        default=None,
        metadata={"help": "Time a random GPT-2 of LAYERSxWIDTH, such as 6x256, with model_name_or_path's tokenizer."},
    )
    memory_of: str | None = field(default=None, metadata={"help": "Print one side's peak memory in bytes, and exit."})


@dataclass(frozen=True)
class Setup:
    """What all sides share."""

    script: ScriptArguments
    config: RewardRecipeConfig
    model_args: ModelConfig
    bench: BenchmarkArguments
    tokenizer: PreTrainedTokenizerBase
    pairs: Dataset

    def steps(self, batch_size: int) -> int:
        """Optimiser steps of a run: one that is not timed, then `train_pairs` pairs, at least one step."""
        return STEPS_WITHOUT_TIME + max(1, self.bench.train_pairs // batch_size)


class StepClock(TrainerCallback):
    """Notes when each step ends, in seconds."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the device, then read the clock."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def build_trainer(setup: Setup, side: str, batch_size: int) -> RewardTrainer:
    """A trainer of that side with its own copy of the model, loaded from the same seed."""
    config, pairs = setup.config, setup.pairs
    recipe_fields = ("output_dir", "max_length", "learning_rate", "seed", "bf16", "use_cpu", "dataloader_pin_memory")
    with renamed_fields_unwarned():
        args = RewardConfig(
            **{name: getattr(config, name) for name in recipe_fields},
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            max_steps=setup.steps(batch_size),
            gradient_checkpointing=False,
            save_strategy="no",
            logging_steps=10**6,
            report_to="none",
            disable_tqdm=True,
        )
    if side == STOCK:
        pairs = pairs.select_columns(["chosen_ids", "rejected_ids"])
    if side == UNSHARED:
        pairs = pairs.remove_columns("prefix").add_column("prefix", [0] * len(pairs))
    options = {
        "model": load_reward_model(setup.model_args, config, setup.tokenizer),
        "args": args,
        "train_dataset": pairs,
        "eval_dataset": pairs.select(range(min(setup.bench.eval_pairs, len(pairs)))),
        "processing_class": setup.tokenizer,
    }
    if side == STOCK:
        return RewardTrainer(**options)
    return ExactRewardTrainer(**options, max_tokens_per_row=config.max_tokens_per_row)


def _seconds(work: Callable[[], object]) -> float:
    """How long `work` takes; what it prints is thrown away."""
    with redirect_stdout(StringIO()):
        start = time.perf_counter()
        work()
        return time.perf_counter() - start


def time_training(trainer: RewardTrainer) -> float:
    """Pairs per second over all steps but the first."""
    clock = StepClock()
    trainer.add_callback(clock)
    _seconds(trainer.train)
    trainer.remove_callback(clock)
    timed = len(clock.ends) - STEPS_WITHOUT_TIME
    return timed * trainer.args.train_batch_size / (clock.ends[-1] - clock.ends[0])


def compare(setup: Setup, batch_size: int) -> dict[str, Any]:
    """Time all sides at one batch size.

    Returns:
        `pairs_per_second`, `eval_pairs_per_second` and `tokens_computed` (in one run) by side; `ratio`, `eval_ratio`:
        medians over the repeats of each side's speed over stock TRL's in the same repeat; `bound`: stock's tokens over
        the pairs' unique tokens, the ratio that token counting allows; `share_of_bound` that packing reaches;
        `model_flops_per_second`: 6 for each parameter outside the embeddings and each unique token (Kaplan et al.,
        2020, Scaling Laws for Neural Language Models, section 2.1).
    """
    trainers = {side: build_trainer(setup, side, batch_size) for side in SIDES}
    speeds, eval_speeds = pd.DataFrame(columns=SIDES, dtype=float), pd.DataFrame(columns=SIDES, dtype=float)
    for repeat in range(setup.bench.repeats):
        for side, trainer in trainers.items():
            speeds.loc[repeat, side] = time_training(trainer)
            eval_speeds.loc[repeat, side] = len(trainer.eval_dataset) / _seconds(trainer.evaluate)
    steps = setup.steps(batch_size)
    batches = {side: list(islice(trainer.get_train_dataloader(), steps)) for side, trainer in trainers.items()}
    computed = {side: sum(batch["input_ids"].numel() for batch in batches[side]) for side in SIDES}
    unique = int(sum(batch["tokens"][1] for batch in batches[PACKED]))
    ratio, bound, speed = _ratios(speeds), computed[STOCK] / unique, speeds.median()
    parameters = trainers[PACKED].model.num_parameters(exclude_embeddings=True)
    unique_per_pair = unique / (len(batches[PACKED]) * batch_size)
    return {
        "batch_size": batch_size,
        "pairs_per_second": speed.to_dict(),
        "ratio": ratio,
        "eval_pairs_per_second": eval_speeds.median().to_dict(),
        "eval_ratio": _ratios(eval_speeds),
        "tokens_computed": computed,
        "tokens_unique": unique,
        "bound": bound,
        "share_of_bound": ratio[PACKED] / bound,
        "model_flops_per_second": 6 * parameters * unique_per_pair * speed[PACKED],
    }


def _ratios(speeds: pd.DataFrame) -> dict[str, float]:
    """Median over the repeats of each side's speed over stock TRL's."""
    return speeds.drop(columns=STOCK).div(speeds[STOCK], axis=0).median().to_dict()


def peak_memory(setup: Setup, side: str) -> int:
    """Bytes at the peak of a short training run, above what the loaded model and trainer take."""
    trainer = build_trainer(setup, side, setup.bench.batch_sizes[0])
    if trainer.args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _seconds(trainer.train)
        return torch.cuda.max_memory_allocated() - before
    if platform.system() != "Linux":
        raise UserError("memory_of: expected Linux, whose kernel can reset a process's peak; leave it out elsewhere")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present
    before = _resident("VmRSS")
    _seconds(trainer.train)
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def memory_by_side(batch_size: int, model: str) -> dict[str, int]:
    """`peak_memory` of stock TRL and of packing, each in a process of its own, with this command's other arguments."""
    command = [sys.executable, __file__, *sys.argv[1:]]
    command += ["--batch_sizes", str(batch_size), "--random_gpt2", "", "--model_name_or_path", model]
    peaks = {}
    for side in (STOCK, PACKED):
        done = subprocess.run([*command, "--memory_of", side], capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"memory of {side}: the process failed: {done.stderr.strip().splitlines()[-1]}")
        peaks[side] = int(done.stdout.splitlines()[-1])
    return peaks


def time_preparation(setup: Setup) -> float:
    """Pairs per second from text to token ids, on the recipe's pairs repeated with changed first words."""
    script, config, wanted = setup.script, setup.config, setup.bench.prepare_pairs
    raw = load_pairs(script.dataset_name, script.dataset_config, config.dataset_data_dirs)[script.dataset_train_split]
    # New texts, which no cache knows.
    sides = {side: [f"{row} {raw[row % len(raw)][side]}" for row in range(wanted)] for side in ("chosen", "rejected")}
    pairs = Dataset.from_dict(sides)
    return wanted / _seconds(lambda: encode_pairs(pairs, setup.tokenizer, config.max_length, config.overlong, []))


def time_scoring(setup: Setup) -> dict[str, float]:
    """Texts per second of the scorer and of transformers' pipeline at batch size 8, on the replies of the pairs.

    Each takes the same texts in turn, in parts, so that both see the machine alike.
    """
    tokenizer, count = setup.tokenizer, setup.bench.score_texts
    model = load_reward_model(setup.model_args, setup.config, tokenizer).to(setup.config.device).eval()
    scorer = Scorer(model, tokenizer, setup.config.max_length)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, function_to_apply="none")
    pairs = (setup.pairs[row % len(setup.pairs)] for row in range(count))
    texts = [tokenizer.decode(pair["chosen_ids"][pair["prefix"] : -1]) for pair in pairs]
    spent = {"scorer": 0.0, "pipeline": 0.0}
    for start in range(0, count, 1000):
        part = texts[start : start + 1000]
        ended = [text + tokenizer.eos_token for text in part]
        spent["scorer"] += _seconds(lambda part=part: scorer.score(part))
        spent["pipeline"] += _seconds(lambda ended=ended: classify(ended, batch_size=8))
    return {name: count / seconds for name, seconds in spent.items()}


def time_to_first_step(setup: Setup) -> float:
    """Seconds from launching `reward_recipes.train` until its first step stands in the log, data already cached."""
    script, config = setup.script, setup.config
    command = [sys.executable, "-m", "reward_recipes.train", "--dataset_name", script.dataset_name]
    command += ["--model_name_or_path", setup.model_args.model_name_or_path]
    if config.dataset_data_dirs:
        command += ["--dataset_data_dirs", *config.dataset_data_dirs]
    command += ["--max_length", str(config.max_length), "--overlong", config.overlong, "--use_cpu", str(config.use_cpu)]
    command += ["--logging_steps", "1", "--max_steps", "1", "--eval_strategy", "no", "--bf16", "false"]
    command += ["--gradient_checkpointing", "false"]
    with tempfile.TemporaryDirectory() as output_dir:
        log, quiet = Path(output_dir) / LOG, subprocess.DEVNULL
        start = time.perf_counter()
        process = subprocess.Popen([*command, "--output_dir", output_dir], stdout=quiet, stderr=quiet)
        while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 1):
            time.sleep(0.05)
        seconds = time.perf_counter() - start
        if process.wait():
            raise UserError("time to the first step: the training process failed; run reward_recipes.train to see why")
    return seconds


def format_table(rows: list[dict[str, Any]]) -> str:
    """What `compare` found as a Markdown table, a line a batch size."""
    head = ["pairs a step", "stock TRL, pairs/s", "packed, pairs/s", "ratio", "bound by tokens", "share of bound"]
    head += ["ratio without prefix sharing", "evaluation ratio"]
    lines = []
    for row in rows:
        speed, ratio = row["pairs_per_second"], row["ratio"]
        cells = [str(row["batch_size"]), f"{speed[STOCK]:.1f}", f"{speed[PACKED]:.1f}", f"**{ratio[PACKED]:.2f}**"]
        cells += [f"{row['bound']:.2f}", f"{row['share_of_bound']:.0%}", f"{ratio[UNSHARED]:.2f}"]
        lines.append([*cells, f"{row['eval_ratio'][PACKED]:.2f}"])
    return table(head, lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Ratios over stock TRL by batch size, beside the bound of token counting, as a PNG."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    ratios = pd.DataFrame([row["ratio"] for row in rows], index=[row["batch_size"] for row in rows])
    ratios[[PACKED, UNSHARED]].plot.bar(ax=axes, color=["#0072B2", "#E69F00"], width=0.8, rot=0)
    for bars in axes.containers:
        axes.bar_label(bars, fmt="%.1f", padding=2)
    for place, row in enumerate(rows):
        label = "bound by unique tokens" if place == 0 else None
        axes.hlines(row["bound"], place - 0.45, place + 0.45, colors="black", linestyles="--", label=label)
    axes.margins(y=0.12)
    axes.axhline(1, color="0.4", linewidth=1)
    axes.set(xlabel="pairs a step", ylabel="training speed, stock TRL = 1", title="Speed over stock TRL")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=150)


def measure(setup: Setup) -> dict[str, Any]:
    """All measurements, with the hardware they were taken on."""
    bench, config = setup.bench, setup.config
    on_gpu = config.device.type == "cuda"
    rows: list[dict[str, Any]] = []
    for batch_size in bench.batch_sizes:
        rows.append(compare(setup, batch_size))
        print(format_table(rows).splitlines()[-1], flush=True)
    report = {
        "hardware": torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads",
        "torch": torch.__version__,
        "parameters": load_reward_model(setup.model_args, config, setup.tokenizer).num_parameters(),
        "dtype": "bf16" if config.bf16 else "float32",
        "max_length": config.max_length,
        "max_tokens_per_row": config.max_tokens_per_row,
        "arguments": asdict(bench),
        "rows": rows,
    }
    if bench.prepare_pairs:
        report["preparation_pairs_per_second"] = time_preparation(setup)
    if bench.score_texts:
        report["scoring_texts_per_second"] = time_scoring(setup)
    report["seconds_to_first_step"] = time_to_first_step(setup)
    report["memory_batch_size"] = 16 if 16 in bench.batch_sizes else bench.batch_sizes[-1]
    report["peak_memory_bytes"] = memory_by_side(report["memory_batch_size"], setup.model_args.model_name_or_path)
    return report


def print_report(report: dict[str, Any]) -> None:
    """The table, and a line for each measurement beside it."""
    print(format_table(report["rows"]))
    peaks = report["peak_memory_bytes"]
    share = peaks[PACKED] / peaks[STOCK]
    print(f"peak memory at {report['memory_batch_size']} pairs: {peaks[PACKED] / 2**20:,.0f} MiB, {share:.2f} of stock")
    print(f"data preparation: {report.get('preparation_pairs_per_second', 0):,.0f} pairs/s")
    if scoring := report.get("scoring_texts_per_second"):
        times = scoring["scorer"] / scoring["pipeline"]
        print(f"scoring: {scoring['scorer']:,.0f} texts/s, {times:.1f} times the pipeline's")
    print(f"from launch to the first step: {report['seconds_to_first_step']:.1f} s")


def main() -> None:
    """Parse, measure, save and print."""
    script, config, model_args, *_, bench = parse_recipe(None, BenchmarkArguments)
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    config.eval_strategy = "no"  # pairs are read without an eval split
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_recipe_tokenizer(config, model_args)
        if bench.random_gpt2:
            write_random_gpt2(bench.random_gpt2, tokenizer, Path(folder), config.seed)
            model_args.model_name_or_path = folder
        pairs = prepare_data(script, config, tokenizer).train
        setup = Setup(script, config, model_args, bench, tokenizer, pairs)
        if bench.memory_of:
            print(peak_memory(setup, bench.memory_of))
            return
        report = measure(setup)
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    save_json(output_dir / "benchmark.json", report)
    draw(report["rows"], output_dir / "benchmark.png")
    print_report(report)
    print(f"written to {output_dir}")


if __name__ == "__main__":
    run_cli(main)
