"""The terminal: aligned rows, few of them, the best marked; one bar where a person looks on, none elsewhere."""

from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from reward_recipes.run import console
from reward_recipes.run.console import COLUMNS, Console

HEADING = "".join(f"{heading:>{width}}" for heading, width, _, _ in COLUMNS)

# Best so far at evaluations 1, 2 and 6; the tie at 3 and the return at 7 are not better.
ACCURACIES = (0.5, 0.7, 0.7, 0.6, 0.6, 0.8, 0.8)


def train(steps: int, logging: int, evaluating: int, metric: str = "accuracy", sign: int = 1) -> None:
    """What Trainer tells the console in a run from the start."""
    args = SimpleNamespace(eval_strategy="steps", eval_steps=evaluating, disable_tqdm=False)
    args.metric_for_best_model, args.greater_is_better = metric, sign > 0
    state, control, shown = TrainerState(max_steps=steps), TrainerControl(), Console()
    shown.on_train_begin(args, state, control)
    for step in range(1, steps + 1):
        state.global_step, state.epoch = step, 10 * step / steps
        shown.on_step_end(args, state, control)
        control.should_evaluate = step % evaluating == 0
        if step % logging == 0:
            row = {"loss": 0.61234, "accuracy": 0.75, "learning_rate": 1.5e-3, "pairs_per_second": 1234.56}
            state.log_history.append(row | {"step": step, "epoch": state.epoch, "num_tokens": 7})
            shown.on_log(args, state, control)
        if control.should_evaluate:
            number = step // evaluating - 1
            value = sign * ACCURACIES[min(number, len(ACCURACIES) - 1)]
            figures = {"eval_accuracy": 0.7, "eval_overfitting_gap": -0.0333} | {f"eval_{metric}": value}
            shown.on_prediction_step(args, state, control, eval_dataloader=range(3))
            shown.on_evaluate(args, state, control, metrics=figures)
            state.best_metric = (
                value if state.best_metric is None else sign * max(sign * state.best_metric, sign * value)
            )
    shown.on_train_end(args, state, control)


def test_ten_epochs_of_the_demo_are_few_aligned_rows_with_the_best_marked(capsys: pytest.CaptureFixture[str]) -> None:
    """150 rows of the log, 30 with an evaluation."""
    train(750, 5, 25)
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert [number for number, line in enumerate(lines) if line == HEADING] == [0, 21]
    rows = [line for line in lines if line != HEADING]
    assert [int(row.split()[0]) for row in rows] == list(range(25, 751, 25))
    assert [int(row.split()[0]) for row in rows if row.endswith("  best")] == [25, 50, 150]
    assert rows[0].startswith("     25   0.33  0.6123    75.0%    50.0%   -3.3 1.5e-03 1,234.6 ")
    assert {len(line.removesuffix("  best")) for line in lines} == {len(HEADING)} and len(HEADING) + 6 < 80
    assert said.err == "" and "\r" not in said.out


def test_rows_are_spread_evenly_and_the_best_by_loss_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    """Of 200 evaluations each seventh stands, a thirtieth of the run apart; of 4 all stand, and rows between them."""
    train(2000, 10, 10, "loss", -1)
    steps = [int(line.split()[0].replace(",", "")) for line in capsys.readouterr().out.splitlines() if line != HEADING]
    assert steps[:5] == [10, 20, 60, 130, 200] and set(steps[5:-1]) == set(range(270, 2000, 70)) and steps[-1] == 2000
    train(1000, 10, 250)
    rows = [line for line in capsys.readouterr().out.splitlines() if line != HEADING]
    assert [int(row[:7].replace(",", "")) for row in rows if "70.0%" in row or "50.0%" in row][:2] == [250, 500]
    assert 25 <= len(rows) <= 34


def test_a_terminal_has_one_bar_and_a_pipe_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "is_terminal", lambda: True)
    train(10, 1, 5)
    said = capsys.readouterr()
    assert "training: " in said.err and "evaluating: " in said.err and "\n" not in said.err.strip("\n")
    assert len(said.out.splitlines()) == 11
