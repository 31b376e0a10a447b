"""How fast training is beside stock TRL, by step and by whole run: same model, pairs and order, in turn.

Run it as `python recipes/benchmark/benchmark.py`; `steps.py` holds the steps, `runs.py` the whole runs. Fields of
recipes apply too, so a recipe can be timed as it stands: `--config RECIPE.yaml --batch_sizes 8 16`. In steps, dropout
and gradient checkpointing are off on all sides.
"""

import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from runs import SCALES, compare_runs, format_runs
from steps import Setup, format_steps, measure_steps

from reward_recipes.config import parse_recipe
from reward_recipes.data import prepare_data
from reward_recipes.pairs import load_pairs, load_recipe_tokenizer
from reward_recipes.run import expect, made_with, quiet_libraries, run_cli, save_json
from reward_recipes.score import load_reward_model, write_random_gpt2


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


def measure_runs(setup: Setup, bench: BenchmarkArguments) -> list[dict[str, Any]]:
    """Both whole runs, on pairs drawn by the seed, from one saved model."""
    script, config = setup.script, setup.config
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


def measure(setup: Setup, bench: BenchmarkArguments) -> dict[str, Any]:
    """The parts that are asked for, with what they were taken on."""
    config, parts = setup.config, bench.parts
    return {
        **made_with(config.device),
        "dtype": "bf16" if config.bf16 else "float32",
        "max_length": config.max_length,
        "max_tokens_per_row": config.max_tokens_per_row,
        "arguments": asdict(bench),
        **({"runs": measure_runs(setup, bench)} if "runs" in parts else {}),
        **(measure_steps(setup, bench.batch_sizes, bench.prepare_pairs) if "steps" in parts else {}),
    }


def main() -> None:
    """Parse, measure, save and print."""
    script, config, model_args, *_, bench = parse_recipe(None, BenchmarkArguments)
    expect({*bench.runs} <= {*SCALES}, "runs", f"names among {', '.join(SCALES)}", bench.runs)
    quiet_libraries()
    config.eval_strategy = "no"  # pairs are read without an eval split
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_recipe_tokenizer(config, model_args)
        if bench.random_gpt2:
            write_random_gpt2(bench.random_gpt2, tokenizer, Path(folder), config.seed)
            model_args.model_name_or_path = folder
        pairs = prepare_data(script, config, tokenizer).train
        sizes = (bench.train_pairs, bench.eval_pairs, bench.repeats)
        report = measure(Setup(script, config, model_args, tokenizer, pairs, *sizes), bench)
    save_json(output_dir / "benchmark.json", report)
    if "runs" in report:
        print(format_runs(report["runs"], bench.best_eval_batch), end="\n\n")
    if "rows" in report:
        print(format_steps(report))


if __name__ == "__main__":
    run_cli(main)
