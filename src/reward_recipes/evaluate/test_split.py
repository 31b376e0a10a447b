"""What a run says of the pairs that it scores once, at its end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from reward_recipes.evaluate.markdown import span
from reward_recipes.evaluate.uncertainty import reliability_metrics
from reward_recipes.run import output, replacing

COLUMNS = ["row", "prompt_id", "subset", "chosen_length", "rejected_length"]


def score_table(pairs: Dataset, scores: np.ndarray, subsets: Sequence[str]) -> pd.DataFrame:
    """One row a tokenised pair: its `COLUMNS`, the subset by name, and its scores, of which `scores` (n, 2) holds all.

    `subsets` are the names that the column `subset` numbers; -1 is none.
    """
    table = pairs.select_columns(COLUMNS).to_pandas()
    table["subset"] = [subsets[subset] if subset >= 0 else None for subset in table["subset"]]
    table[["chosen_score", "rejected_score"]] = scores
    return table


def write_test(output_dir: Path, figures: dict[str, Any], table: pd.DataFrame) -> dict[str, Any]:
    """Write each pair's scores, of `score_table`, and the figures, named `test_...`; return these with reliability."""
    scores = table[["chosen_score", "rejected_score"]].to_numpy()
    reliability = reliability_metrics(scores, table["prompt_id"].to_numpy())
    figures = figures | {f"test_{name}": value for name, value in reliability.items()}
    output.save_json(output_dir / output.TEST_METRICS, figures)
    with replacing(output_dir / output.TEST_SCORES) as partial:
        table.to_csv(partial, index=False, float_format="%.9g")  # float32 read back as it was
    return figures


def describe_test(figures: dict[str, Any], chose_model: bool) -> str:
    """The test in one line; `chose_model` says that the best step was chosen on the same pairs."""
    interval = figures["test_accuracy_ci95"]
    within = f" (95% interval {span(interval)})" if interval else ""
    note = " (optimistic: this split chose the model)" if chose_model else ""
    return f"test accuracy  {figures['test_accuracy']:.2%}{within} on {figures['test_pairs']:,} pairs{note}"
