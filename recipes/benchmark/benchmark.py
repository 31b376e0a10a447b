"""How fast training is beside stock TRL: same model, pairs, order; sides in turn.

Run it as `python recipes/benchmark/benchmark.py`. Fields of recipes apply too, so a recipe can be timed as
it stands: `--config RECIPE.yaml --batch_sizes 8 16`. Dropout and gradient checkpointing are off on all sides.
"""

import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from matplotlib.figure import Figure
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    pipeline,
)
from transformers.utils import logging as transformers_logging
from trl import ModelConfig, RewardConfig, RewardTrainer, ScriptArguments

from reward_recipes.config import RewardRecipeConfig, parse_recipe
from reward_recipes.data import prepare_data
from reward_recipes.evaluate import table
from reward_recipes.pairs import encode_pairs, load_pairs, load_recipe_tokenizer
from reward_recipes.run import LOG, UserError, renamed_fields_unwarned, run_cli, save_json
from reward_recipes.score import Scorer, load_reward_model, write_random_gpt2
from reward_recipes.trainer import ExactRewardTrainer

# The second side is the way of peers: pairs packed without padding, each prompt computed twice.
STOCK, UNSHARED, PACKED = "stock TRL", "packed, prompt twice", "packed"
SIDES = (STOCK, UNSHARED, PACKED)


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

    config: RewardRecipeConfig
    model_args: ModelConfig
    bench: BenchmarkArguments
    tokenizer: PreTrainedTokenizerBase
    pairs: Dataset

    def steps(self, batch_size: int) -> int:
        """Optimiser steps of a run: one that is not timed, then `train_pairs` pairs, at least one step."""
        return 1 + max(1, self.bench.train_pairs // batch_size)


class StepClock(TrainerCallback):
    """Notes when each step ends, in seconds."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Wait for the device, then read the clock."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def build_trainer(setup: Setup, side: str, batch_size: int) -> RewardTrainer:
    """A trainer of that side with its own copy of the model, loaded from the same seed."""
    config, evaluated = setup.config, min(setup.bench.eval_pairs, len(setup.pairs))
    with renamed_fields_unwarned():
        args = RewardConfig(
            output_dir=config.output_dir,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            max_steps=setup.steps(batch_size),
            max_length=config.max_length,
            learning_rate=config.learning_rate,
            seed=config.seed,
            bf16=config.bf16,
            use_cpu=config.use_cpu,
            dataloader_pin_memory=config.dataloader_pin_memory,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_steps=10**6,
            report_to="none",
            disable_tqdm=True,
        )
    pairs = setup.pairs
    if side == STOCK:
        pairs = pairs.select_columns(["chosen_ids", "rejected_ids"])
    if side == UNSHARED:
        pairs = pairs.remove_columns("prefix").add_column("prefix", [0] * len(pairs))
    options = {
        "model": load_reward_model(setup.model_args, config, setup.tokenizer),
        "args": args,
        "train_dataset": pairs,
        "eval_dataset": pairs.select(range(evaluated)),
        "processing_class": setup.tokenizer,
    }
    if side == STOCK:
        return RewardTrainer(**options)
    return ExactRewardTrainer(**options, max_tokens_per_row=config.max_tokens_per_row)


def time_training(trainer: RewardTrainer) -> float:
    """Pairs per second over all steps but the first."""
    clock = StepClock()
    trainer.add_callback(clock)
    _silently(trainer.train)
    trainer.remove_callback(clock)
    return (len(clock.ends) - 1) * trainer.args.train_batch_size / (clock.ends[-1] - clock.ends[0])


def time_evaluation(trainer: RewardTrainer) -> float:
    """Pairs per second of `trainer.evaluate()`."""
    start = time.perf_counter()
    _silently(trainer.evaluate)
    return len(trainer.eval_dataset) / (time.perf_counter() - start)


def _silently(call: Callable[[], object]) -> None:
    with redirect_stdout(StringIO()):
        call()


def compare(setup: Setup, batch_size: int) -> dict[str, Any]:
    """Time all sides at one batch size.

    Returns:
        `pairs_per_second`, `eval_pairs_per_second` and `tokens_computed` (in one run) by side; `ratio`, `eval_ratio`:
        medians over the repeats of each side's speed over stock TRL's in the same repeat; `bound`: stock's tokens over
        the pairs' unique tokens, the ratio that token counting allows; `share_of_bound` that packing reaches.
    """
    trainers = {side: build_trainer(setup, side, batch_size) for side in SIDES}
    speeds: dict[str, list[float]] = {side: [] for side in SIDES}
    eval_speeds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(setup.bench.repeats):
        for side, trainer in trainers.items():
            speeds[side].append(time_training(trainer))
            eval_speeds[side].append(time_evaluation(trainer))
    batches = {side: _first_batches(trainer, setup.steps(batch_size)) for side, trainer in trainers.items()}
    computed = {side: sum(batch["input_ids"].numel() for batch in batches[side]) for side in SIDES}
    unique = int(sum(batch["tokens"][1] for batch in batches[PACKED]))
    ratio = _median_ratios(speeds)
    bound = computed[STOCK] / unique
    return {
        "batch_size": batch_size,
        "pairs_per_second": {side: statistics.median(values) for side, values in speeds.items()},
        "ratio": ratio,
        "eval_pairs_per_second": {side: statistics.median(values) for side, values in eval_speeds.items()},
        "eval_ratio": _median_ratios(eval_speeds),
        "tokens_computed": computed,
        "tokens_unique": unique,
        "bound": bound,
        "share_of_bound": ratio[PACKED] / bound,
        "model_flops_per_second": _model_flops(trainers[PACKED], batches[PACKED], batch_size, speeds[PACKED]),
    }


def _median_ratios(speeds: dict[str, list[float]]) -> dict[str, float]:
    return {
        side: statistics.median(ours / stock for ours, stock in zip(speeds[side], speeds[STOCK], strict=True))
        for side in SIDES[1:]
    }


def _first_batches(trainer: RewardTrainer, steps: int) -> list[dict[str, torch.Tensor]]:
    return [batch for batch, _ in zip(trainer.get_train_dataloader(), range(steps), strict=False)]


def _model_flops(
    trainer: RewardTrainer, batches: list[dict[str, torch.Tensor]], batch_size: int, speeds: list[float]
) -> float:
    """6 FLOPs for each parameter outside the embeddings and each unique token (Kaplan et al. 2020, section 2.1)."""
    parameters = trainer.model.num_parameters(exclude_embeddings=True)
    unique = int(sum(batch["tokens"][1] for batch in batches))
    return 6 * parameters * unique / (len(batches) * batch_size) * statistics.median(speeds)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on the device: what its hardware gives at best."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        product = left @ right
        product.flatten()[0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory(setup: Setup, side: str) -> int:
    """Bytes at the peak of a short training run, above what the loaded model and trainer take."""
    trainer = build_trainer(setup, side, setup.bench.batch_sizes[0])
    if trainer.args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _silently(trainer.train)
        return torch.cuda.max_memory_allocated() - before
    if platform.system() != "Linux":
        raise UserError("memory_of: expected Linux, whose kernel can reset a process's peak; leave it out elsewhere")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present
    before = _resident("VmRSS")
    _silently(trainer.train)
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


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


def time_preparation(script: ScriptArguments, setup: Setup) -> float:
    """Pairs per second from text to token ids, on the recipe's pairs repeated with changed first words."""
    source = load_pairs(script.dataset_name, script.dataset_config, setup.config.dataset_data_dirs)
    raw = source[script.dataset_train_split].select_columns(["chosen", "rejected"])
    wanted = setup.bench.prepare_pairs
    sides = {name: raw[name] for name in raw.column_names}
    rows = range(wanted)
    changed = {name: [f"{row} {texts[row % len(raw)]}" for row in rows] for name, texts in sides.items()}
    dataset = Dataset.from_dict(changed)
    start = time.perf_counter()
    encode_pairs(dataset, setup.tokenizer, setup.config.max_length, setup.config.overlong, [])
    return wanted / (time.perf_counter() - start)


def time_scoring(setup: Setup) -> dict[str, float]:
    """Texts per second of the scorer and of transformers' pipeline at batch size 8, on the replies of the pairs.

    Each takes the same texts in turn, in parts, so that both see the machine alike.
    """
    tokenizer = setup.tokenizer
    model = load_reward_model(setup.model_args, setup.config, tokenizer).to(setup.config.device).eval()
    scorer = Scorer(model, tokenizer, setup.config.max_length)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, function_to_apply="none")
    pairs = (setup.pairs[row % len(setup.pairs)] for row in range(setup.bench.score_texts))
    texts = [tokenizer.decode(pair["chosen_ids"][pair["prefix"] : -1]) for pair in pairs]
    seconds = {"scorer": 0.0, "pipeline": 0.0}
    for start in range(0, len(texts), 1000):
        part = texts[start : start + 1000]
        begin = time.perf_counter()
        scorer.score(part)
        middle = time.perf_counter()
        classify([text + tokenizer.eos_token for text in part], batch_size=8)
        seconds["scorer"] += middle - begin
        seconds["pipeline"] += time.perf_counter() - middle
    return {name: len(texts) / spent for name, spent in seconds.items()}


def time_to_first_step(script: ScriptArguments, setup: Setup) -> float:
    """Seconds from launching `reward_recipes.train` until its first step stands in the log, data already cached."""
    with tempfile.TemporaryDirectory() as output_dir:
        command = [sys.executable, "-m", "reward_recipes.train", "--dataset_name", script.dataset_name]
        command += ["--model_name_or_path", setup.model_args.model_name_or_path, "--output_dir", output_dir]
        if setup.config.dataset_data_dirs:
            command += ["--dataset_data_dirs", *setup.config.dataset_data_dirs]
        command += ["--max_length", str(setup.config.max_length), "--overlong", setup.config.overlong]
        command += ["--logging_steps", "1", "--max_steps", "1", "--eval_strategy", "no", "--bf16", "false"]
        command += ["--gradient_checkpointing", "false", "--use_cpu", str(setup.config.use_cpu)]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        log = Path(output_dir) / LOG
        while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 1):
            time.sleep(0.05)
        seconds = time.perf_counter() - start
        if process.wait():
            raise UserError("time to the first step: the training process failed; run reward_recipes.train to see why")
        return seconds


def format_table(report: dict[str, Any]) -> str:
    """The report as a Markdown table, a line a batch size."""
    head = ["pairs a step", "stock TRL, pairs/s", "packed, pairs/s", "ratio", "bound by tokens", "share of bound"]
    head += ["ratio without prefix sharing", "evaluation ratio"]
    return table(head, [_table_row(row) for row in report["rows"]])


def _table_row(row: dict[str, Any]) -> list[str]:
    speed, ratio = row["pairs_per_second"], row["ratio"]
    cells = [str(row["batch_size"]), f"{speed[STOCK]:.1f}", f"{speed[PACKED]:.1f}", f"**{ratio[PACKED]:.2f}**"]
    cells += [f"{row['bound']:.2f}", f"{row['share_of_bound']:.0%}", f"{ratio[UNSHARED]:.2f}"]
    return [*cells, f"{row['eval_ratio'][PACKED]:.2f}"]


def draw(report: dict[str, Any], path: Path) -> None:
    """Ratios over stock TRL by batch size, beside the bound of token counting, as a PNG."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    rows = report["rows"]
    places = range(len(rows))
    styles = {PACKED: ("#0072B2", -0.2, ""), UNSHARED: ("#E69F00", 0.2, "//")}
    for side, (colour, shift, hatch) in styles.items():
        heights = [row["ratio"][side] for row in rows]
        bars = axes.bar([place + shift for place in places], heights, 0.36, label=side, color=colour, hatch=hatch)
        axes.bar_label(bars, fmt="%.1f", padding=2)
    for place, row in enumerate(rows):
        label = "bound by unique tokens" if place == 0 else None
        axes.hlines(row["bound"], place - 0.45, place + 0.45, colors="black", linestyles="--", label=label)
    axes.margins(y=0.12)
    axes.axhline(1, color="0.4", linewidth=1)
    axes.set_xticks(list(places), [str(row["batch_size"]) for row in rows])
    axes.set(xlabel="pairs a step", ylabel="training speed, stock TRL = 1", title="Speed over stock TRL")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=150)


def run(script: ScriptArguments, setup: Setup) -> dict[str, Any]:
    """All measurements, with the hardware they were taken on."""
    bench, device = setup.bench, setup.config.device
    report: dict[str, Any] = {
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads",
        "torch": torch.__version__,
        "parameters": load_reward_model(setup.model_args, setup.config, setup.tokenizer).num_parameters(),
        "dtype": "bf16" if setup.config.bf16 else "float32",
        "max_length": setup.config.max_length,
        "max_tokens_per_row": setup.config.max_tokens_per_row,
        "arguments": bench.__dict__,
        "rows": [],
    }
    for batch_size in bench.batch_sizes:
        report["rows"].append(compare(setup, batch_size))
        print(format_table(report).splitlines()[-1], flush=True)
    peak = measured_peak(device, torch.bfloat16 if setup.config.bf16 else torch.float32)
    report["measured_peak_flops_per_second"] = peak
    report["share_of_peak"] = [row["model_flops_per_second"] / peak for row in report["rows"]]
    if bench.prepare_pairs:
        report["preparation_pairs_per_second"] = time_preparation(script, setup)
    if bench.score_texts:
        report["scoring_texts_per_second"] = time_scoring(setup)
    report["seconds_to_first_step"] = time_to_first_step(script, setup)
    batch_size = 16 if 16 in bench.batch_sizes else bench.batch_sizes[-1]
    report["memory_batch_size"] = batch_size
    report["peak_memory_bytes"] = memory_by_side(batch_size, setup.model_args.model_name_or_path)
    return report


def main() -> None:
    """Parse, measure, print and save."""
    script, config, model_args, _, bench = parse_recipe(None, BenchmarkArguments)
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    config.eval_strategy = "no"  # pairs are read without an eval split
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_recipe_tokenizer(config, model_args)
        if bench.random_gpt2:
            write_random_gpt2(bench.random_gpt2, tokenizer, Path(folder), config.seed)
            model_args.model_name_or_path = folder
        setup = Setup(config, model_args, bench, tokenizer, prepare_data(script, config, tokenizer).train)
        if bench.memory_of:
            print(peak_memory(setup, bench.memory_of))
            return
        report = run(script, setup)
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    save_json(output_dir / "benchmark.json", report)
    draw(report, output_dir / "benchmark.png")
    print(format_table(report))
    stock, packed = (report["peak_memory_bytes"][side] for side in (STOCK, PACKED))
    print(
        f"peak memory at {report['memory_batch_size']} pairs: {packed / 2**20:,.0f} MiB, {packed / stock:.2f} of stock"
    )
    print(f"data preparation: {report.get('preparation_pairs_per_second', 0):,.0f} pairs/s")
    if scoring := report.get("scoring_texts_per_second"):
        times = scoring["scorer"] / scoring["pipeline"]
        print(f"scoring: {scoring['scorer']:,.0f} texts/s, {times:.1f} times the pipeline's")
    print(f"from launch to the first step: {report['seconds_to_first_step']:.1f} s")
    print(f"share of the measured peak: {max(report['share_of_peak']):.0%}; written to {output_dir}")


if __name__ == "__main__":
    run_cli(main)
