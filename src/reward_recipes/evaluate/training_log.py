"""What a training's CSV log says: its rows as numbers, and a summary of three lines."""

import math
import warnings
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd

from reward_recipes.run import UserError, first_line, output

NEEDED_COLUMNS = (
    *("step", "epoch", "train_loss", "train_accuracy", "eval_loss", "eval_accuracy", "overfitting_gap"),
    *("learning_rate", "grad_norm", "train_probe_loss", "train_probe_accuracy"),
)
OVERFITTING_GAP = 0.05


@dataclass(frozen=True)
class TrainingSummary:
    """What a log says: steps are optimizer steps, accuracies and gaps fractions; None where unknown.

    `best_loss` is the lowest eval loss, which seldom falls on `best_step`, the step of the best accuracy.
    """

    evaluations: int = 0
    best_step: int | None = None
    best_accuracy: float | None = None
    best_loss_step: int | None = None
    best_loss: float | None = None
    final_step: int | None = None
    final_accuracy: float | None = None
    final_gap: float | None = None
    overfitting_began: int | None = None

    def __str__(self) -> str:
        """Return the summary as three lines for people."""
        if self.evaluations == 0:
            return "best step      none: no evaluation in the log"
        gap = "unknown" if self.final_gap is None else f"{100 * self.final_gap:+.1f} points"
        began = f"not seen: the gap does not stay above {100 * OVERFITTING_GAP:g} points"
        if self.overfitting_began is not None:
            began = f"from step {self.overfitting_began:,} on: the gap stays above {100 * OVERFITTING_GAP:g} points"
        return (
            f"best step      {self.best_step:,}: eval accuracy {self.best_accuracy:.2%}\n"
            f"last step      {self.final_step:,}: eval accuracy {self.final_accuracy:.2%}, gap {gap}\n"
            f"overfitting    {began}"
        )


def read_log(path: Path | str) -> pd.DataFrame:
    """Return a log, which may still be growing, as floats, one row per logging step; non-finite cells are NaN.

    Raises:
        UserError: the file cannot be read, holds no numbers, or lacks columns.
    """
    expected, mend = f"expected a training log at {path}", "pass the reward_model_log.csv that a training run wrote"
    try:
        text = Path(path).read_text("utf-8")
        log = pd.read_csv(StringIO(text.rpartition("\n")[0] or text), dtype=float)  # no row that is still being written
    except (OSError, ValueError) as error:
        raise UserError(f"{expected}, found: {first_line(error)}; {mend}") from error
    if missing := [name for name in NEEDED_COLUMNS if name not in log]:
        raise UserError(f"{expected}, found a table without {', '.join(missing)}; {mend}")
    return log.where(np.isfinite(log))


def summarise(log: pd.DataFrame) -> TrainingSummary:
    """Sum up a log from `read_log`; of equal best values the first counts, as when transformers saves."""
    evals = log[log["eval_accuracy"].notna() & (log["step"] > 0)].set_index("step")  # of step 0 no model is saved
    if evals.empty:
        return TrainingSummary()
    accuracy, loss, gap = (evals[name] for name in ("eval_accuracy", "eval_loss", "overfitting_gap"))
    best_step = accuracy.idxmax()
    after = gap[gap.index > best_step]
    lasting = after[after[::-1].cummin()[::-1] > OVERFITTING_GAP]
    return TrainingSummary(
        evaluations=len(evals),
        best_step=int(best_step),
        best_accuracy=float(accuracy.max()),
        best_loss_step=int(loss.idxmin()),
        best_loss=float(loss.min()),
        final_step=int(evals.index[-1]),
        final_accuracy=float(accuracy.iloc[-1]),
        final_gap=None if math.isnan(gap.iloc[-1]) else float(gap.iloc[-1]),
        overfitting_began=None if lasting.empty else int(lasting.index[0]),
    )


def draw_training(output_dir: Path, ceiling: float | None) -> None:
    """Draw the log of the run in `output_dir`; a picture that cannot be drawn or written is a warning."""
    from reward_recipes.evaluate import training_picture  # and with it matplotlib, only when something is drawn

    try:
        training_picture.plot_training(output_dir / output.LOG, output_dir / output.PICTURE, ceiling=ceiling)
    except (UserError, OSError) as error:
        warnings.warn(f"no picture: {error}", stacklevel=2)
