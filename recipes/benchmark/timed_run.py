"""One training run, of stock TRL or of ours, in a process of its own that notes where its time goes.

`runs.py` starts it as `timed_run.py SIDE RECIPE.yaml LAUNCHED`, where LAUNCHED is the time of the start in seconds.
"""

import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml


class Phases:
    """Seconds of each phase; time in a phase within another one counts for the inner one alone."""

    def __init__(self, launched: float) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._phase, self._since = "start-up and rest", launched

    def enter(self, phase: str) -> str:
        """End the current phase, start another one, and return the one that ended."""
        now, ended = time.time(), self._phase
        self.seconds[ended] += now - self._since
        self._phase, self._since = phase, now
        return ended

    def watch(self, phase: str, owner: Any, *names: str) -> None:
        """Count the time in functions of a module or a class for a phase."""
        for name in names:
            setattr(owner, name, self._watched(phase, getattr(owner, name)))

    def _watched(self, phase: str, function: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            outer = self.enter(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.enter(outer)

        return watched


def watch_trainer(phases: Phases, trainer: type) -> None:
    """What both sides have in common."""
    from transformers import PreTrainedModel

    phases.watch("training", trainer, "train")
    phases.watch("evaluation", trainer, "evaluate")
    phases.watch("saving", trainer, "_save_checkpoint", "_load_best_model", "save_model")
    phases.watch("saving", PreTrainedModel, "save_pretrained")


def stock(recipe: dict[str, Any], phases: Phases) -> list[float]:
    """The recipe as a user of TRL alone would run it; returns the losses that it logs."""
    from datasets import concatenate_datasets, load_dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    watch_trainer(phases, RewardTrainer)
    phases.watch("data", RewardTrainer, "__init__")  # where TRL tokenises
    fields = {name: recipe[name] for name in recipe.keys() & RewardConfig.__dataclass_fields__.keys()}
    fields |= {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": recipe["eval_steps"]}
    fields |= {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "save_total_limit": 2}
    args = RewardConfig(**fields)
    outer = phases.enter("data")
    data = load_dataset(recipe["dataset_name"])
    probe = data["train"].shuffle(seed=args.seed).select(range(recipe["train_probe_size"]))
    phases.enter(outer)
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(recipe["model_name_or_path"]),
        args=args,
        train_dataset=data["train"],
        eval_dataset=concatenate_datasets([data["validation"], probe]),
        processing_class=AutoTokenizer.from_pretrained(recipe["model_name_or_path"]),
    )
    trainer.train()
    trainer.save_model()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def ours(path: str, output_dir: Path, phases: Phases) -> list[float]:
    """The recipe by this package; returns the losses that it logs."""
    from reward_recipes import callback, train
    from reward_recipes.config import parse_recipe
    from reward_recipes.evaluate import read_log
    from reward_recipes.run import output

    watch_trainer(phases, train.ExactRewardTrainer)
    phases.watch("saving", train.ExactRewardTrainer, "end_with_best")
    phases.watch("data", train, "prepare_data")
    phases.watch("pictures", callback, "draw_training")
    train.train(*parse_recipe(["--config", path]))
    return read_log(output_dir / output.LOG)["train_loss"].dropna().tolist()


def main() -> None:
    """Run one side, and write `timed_run.json` beside what it leaves."""
    side, path, launched = sys.argv[1:]
    phases, recipe = Phases(float(launched)), yaml.safe_load(Path(path).read_text())
    output_dir = Path(recipe["output_dir"])
    losses = ours(path, output_dir, phases) if side == "ours" else stock(recipe, phases)
    phases.enter("end")
    (output_dir / "timed_run.json").write_text(json.dumps({"phases": phases.seconds, "losses": losses}))


if __name__ == "__main__":
    main()
