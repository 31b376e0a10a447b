"""A long run stays as it began: its memory does not grow, and its log costs next to nothing."""

import ctypes
import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from toys import config, random_pairs, tiny_model, tiny_trainer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from reward_recipes import callback
from reward_recipes.callback import CSVLogCallback
from reward_recipes.run import LoggingWindow
from reward_recipes.trainer import ExactRewardTrainer


class MemoryMeter(TrainerCallback):
    """Notes, every 25 steps, the megabytes that the process holds."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.held: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % 25 == 0:
            gc.collect()
            if sys.platform == "linux":
                ctypes.CDLL(None).malloc_trim(0)  # what is free counts as free
            self.steps.append(state.global_step)
            self.held.append(psutil.Process().memory_info().rss / 2**20)

    def growth(self) -> float:
        """Megabytes a thousand steps, from the median of the last half's windows of 200: a lone jump is no leak."""
        held = self.held[len(self.held) // 2 :]
        return 5 * statistics.median(after - before for before, after in zip(held, held[8:], strict=False))


@pytest.mark.reliability
def test_memory_of_2000_steps_does_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed, a row of the log every 10 steps, evaluation, picture and checkpoint every 200; 4 KB a step is a leak."""
    monkeypatch.setattr(callback, "DRAW_FIRST", 0)  # what drawing takes once is there before the half that counts
    windows = {"logging_steps": 10, "eval_strategy": "steps", "eval_steps": 200, "learning_rate": 1e-4}
    args = config(tmp_path, max_steps=2000, save_steps=200, per_device_train_batch_size=2, **windows)
    meter, pairs = MemoryMeter(), [random_pairs(64, longest=20), random_pairs(16, longest=20, seed=1)]
    callbacks = [CSVLogCallback(), meter]
    trainer = tiny_trainer(tiny_model("gpt2"), args, *pairs, max_tokens_per_row=64, callbacks=callbacks)
    trainer.train()
    print(f"{meter.growth():.2f} MB in the last 1,000 steps, of {meter.held[-1]:.0f} MB")
    assert meter.steps[-1] == 2000 and len((tmp_path / "reward_model_log.csv").read_text().splitlines()) == 201
    assert meter.growth() < 4


@pytest.mark.reliability
def test_log_costs_less_than_a_hundredth_of_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row after every step, the most there can be, of a model of 6 layers, 256 wide, 4 pairs up to 128 tokens.

    Counted are the window of each micro-batch and all that `log` does, the file and stock Trainer's own part included.
    The picture is not: it may cost 2% of a run.
    """
    monkeypatch.setattr(callback, "draw_training", lambda *args: None)
    spent: dict[str, float] = {}

    def timed(owner: type, name: str) -> None:
        method, spent[name] = getattr(owner, name), 0.0

        def measured(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = method(*args, **kwargs)
            spent[name] += time.perf_counter() - start
            return result

        monkeypatch.setattr(owner, name, measured)

    for owner, name in ((LoggingWindow, "add"), (ExactRewardTrainer, "log"), (CSVLogCallback, "on_step_begin")):
        timed(owner, name)
    timed(ExactRewardTrainer, "_inner_training_loop")
    model = tiny_model("gpt2", n_layer=6, n_embd=256, n_head=4, n_positions=128, vocab_size=50257)
    args = config(tmp_path, max_steps=30, per_device_train_batch_size=4, logging_steps=1, max_length=128)
    trainer = tiny_trainer(
        model, args, random_pairs(32, longest=127), max_tokens_per_row=384, callbacks=[CSVLogCallback()]
    )
    trainer.train()
    whole = spent.pop("_inner_training_loop")
    share = sum(spent.values()) / whole
    print(f"{whole / 30:.3f} s a step, of which {1e6 * sum(spent.values()) / 30:.0f} microseconds log: {share:.3%}")
    assert len((tmp_path / "reward_model_log.csv").read_text().splitlines()) == 31
    assert share < 0.01
