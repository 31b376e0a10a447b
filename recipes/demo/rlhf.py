"""Train the demo's policy where its true quality is known: a short supervised start, then TRL's PPO or RLOO.

`python recipes/demo/rlhf.py ppo --config recipes/demo/ppo.yaml` needs the demo's reward model (`make train`). If the
policy that the recipe names is not there, TRL's SFTTrainer first trains it on the demo's better replies. Then the
recipe runs as `python -m reward_recipes.ppo` runs it. Its log, picture and samples also show the `true_quality` of
replies. It comes from the rule that the demo's pairs follow, and neither policy nor reward model is told it.
"""

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from datasets import load_dataset
from make_demo import ASSISTANT, reply_quality
from trl import SFTConfig, SFTTrainer

from reward_recipes.policy.common import parse_policy_recipe
from reward_recipes.run import UserError, run_cli, use_console

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
DEMO = Path("outputs/demo")
SUPERVISED = DEMO / "sft"
LONGEST = 270  # characters of a dialogue to imitate: mostly a question and its answer, as they are asked later
STEPS = 300  # of the supervised start


def true_quality(prompt: Any, reply: str) -> float:
    """The hidden quality of a reply: the sum of the weights of its cues, each once. The prompt does not count."""
    return float(reply_quality(ASSISTANT + reply))


def imitate(demo: Path, output_dir: Path, steps: int) -> None:
    """Train the demo's random GPT-2 on the replies that were preferred, a fifth of them wrongly, and save it."""

    def split(row: dict[str, str]) -> dict[str, str]:
        prompt, _, reply = row["chosen"].rpartition(ASSISTANT)
        return {"prompt": prompt + ASSISTANT.rstrip(), "completion": " " + reply}

    rows = load_dataset("json", data_files=str(demo / "data" / "train.jsonl"), split="train")
    rows = rows.filter(lambda row: len(row["chosen"]) <= LONGEST).map(split, remove_columns=rows.column_names)
    config = SFTConfig(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        seed=0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = SFTTrainer(str(demo / "model"), args=config, train_dataset=rows)
    use_console(trainer)
    trainer.train()
    trainer.save_model()
    (output_dir / "training_args.bin").unlink()


def main() -> None:
    """Make the supervised policy if it is missing, and run the recipe."""
    name, *words = sys.argv[1:] or [""]
    if name not in ("ppo", "rloo"):
        raise UserError(f"expected ppo or rloo as the first word, found {name!r}")
    module = import_module(f"reward_recipes.policy.{name}")
    recipe = parse_policy_recipe(getattr(module, f"{name.upper()}RecipeConfig"), module.LOG, words)
    start = Path(recipe.model.model_name_or_path)
    if start == SUPERVISED and not (start / "config.json").exists():
        imitate(DEMO, start, STEPS)
    module.train(recipe, measures={"true_quality": true_quality})


if __name__ == "__main__":
    run_cli(main)
