"""A trained reward model evaluated: a split scored, the report's three files written."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from reward_recipes.evaluate.figures import evaluation_figures
from reward_recipes.evaluate.markdown import LONGER, page, percent, span
from reward_recipes.evaluate.picture import draw_report
from reward_recipes.evaluate.test_split import score_table
from reward_recipes.evaluate.uncertainty import paired_test
from reward_recipes.pairs import (
    KnownBy,
    Pairs,
    Status,
    encode_splits,
    load_pairs,
    read_columns,
    split_of,
    status_counts,
    subset_names,
    usable_pairs,
)
from reward_recipes.run import numbers_of, option, output, replacing
from reward_recipes.score import Scorer, load_scorer

QUOTED = 10  # pairs on the page


@dataclass
class EvaluationArguments:
    """What to evaluate on what."""

    model_name_or_path: str = field(metadata={"help": "Trained reward model: a run's output_dir or a hub id."})
    dataset_name: str = field(metadata={"help": "Preference pairs: a hub id, a folder or a file (JSON, CSV, Parquet)."})
    output_dir: str = field(metadata={"help": "Folder for evaluation.* or, of lists of answers, best_of_n.*."})
    dataset_config: str | None = option(None, "Configuration of the dataset.")
    dataset_data_dirs: list[str] | None = option(None, "Folders inside the dataset; each names a subset.")
    dataset_test_split: str | None = option(None, "Split to score; default `test`, or the only one of a file.")
    columns: dict[str, Any] | str | None = option(None, "Other column names: '{prompt: question}' reads `question`.")
    prompt_marker: str | None = option(None, "What stands before the first reply of whole texts, if not `Assistant:`.")
    baseline_model_name_or_path: str | None = option(None, "Another reward model to compare with, pair by pair.")
    dtype: str = option("float32", "Precision of the weights; scores are float32.")
    revision: str = option("main", "Branch, tag or commit of a model on the Hub; the baseline's is `main`.")

    def __post_init__(self) -> None:
        if isinstance(self.dataset_data_dirs, str):  # YAML reads one name as no list
            self.dataset_data_dirs = [self.dataset_data_dirs]
        self.columns = read_columns(self.columns)

    @property
    def split(self) -> str:
        """The split to score; a file is one split, `train`."""
        return self.dataset_test_split or ("train" if Path(self.dataset_name).expanduser().is_file() else "test")


def evaluate(arguments: EvaluationArguments) -> dict[str, Any]:
    """Score a split, write the report's three files into `output_dir`, and return what the JSON file holds.

    It names model, data and settings, `pairs_read`, `cut` (scored without their first tokens) and `dropped` (by
    reason), and holds `figures.evaluation_figures` and, with a baseline, `uncertainty.paired_test`.

    Raises:
        UserError: what loading data or models raises; no such split; no pair that can be scored; scores not finite.
        OSError: an output_dir that cannot be written.
    """
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    name = arguments.dataset_name
    splits = load_pairs(name, arguments.dataset_config, arguments.dataset_data_dirs, arguments.columns)
    pairs = split_of(splits, arguments.split, name, "dataset_test_split").checked()
    table, settings, wrong = _score(arguments.model_name_or_path, arguments, pairs, arguments.revision)
    report = {"model": arguments.model_name_or_path, "dataset": name, "split": arguments.split}
    report |= settings | evaluation_figures(table)
    if baseline := arguments.baseline_model_name_or_path:
        other, settings_of_other, _ = _score(baseline, arguments, pairs)
        compared = {"baseline": baseline, "baseline_convention": settings_of_other["convention"]}
        report["paired_test"] = compared | paired_test(table, other)
    if not PartialState().is_main_process:
        return report
    output.save_json(output_dir / output.EVALUATION, report)
    with replacing(output_dir / output.EVALUATION_PAGE) as partial:
        partial.write_text(format_report(report, wrong), encoding="utf-8")
    with replacing(output_dir / output.EVALUATION_PICTURE) as partial:
        draw_report(report, partial)
    return report


def load_judge(model: str, arguments: EvaluationArguments, revision: str) -> tuple[Scorer, dict[str, Any]]:
    """A model that scores, and what the report says of how it does; the terminal is told how it reads texts."""
    scorer = load_scorer(model, dtype=arguments.dtype, revision=revision)
    PartialState().print(f"{model}: {scorer.convention}", file=sys.stderr)
    known = {name: getattr(scorer, name) for name in ("max_length", "overlong", "convention")}
    return scorer, {"dtype": arguments.dtype, **known}


def _score(
    model: str, arguments: EvaluationArguments, pairs: Pairs, revision: str = "main"
) -> tuple[pd.DataFrame, dict[str, Any], list[dict[str, Any]]]:
    """A table for `evaluation_figures` of the pairs that can be scored, how it came about, and what `_quote` gives.

    The model's memory is free again when a second one is loaded.
    """
    scorer, settings = load_judge(model, arguments, revision)
    subsets = subset_names({"": pairs})
    limits = (scorer.max_length, scorer.overlong)
    options = {"marker": arguments.prompt_marker, "as_messages": scorer.form == "messages", "as_is": scorer.as_is}
    with PartialState().local_main_process_first():
        encoded = encode_splits({"": pairs}, scorer.tokenizer, *limits, subsets, **options)[""]
    counts = status_counts(encoded.with_format("numpy")["status"][:])
    way = f"mend the data; the model takes texts of up to {scorer.max_length} tokens"
    encoded = usable_pairs(encoded, model, way)
    table = score_table(encoded, scorer.score_pairs(encoded), subsets)
    for name in ("chosen_characters", "rejected_characters"):
        table[name] = encoded.with_format("numpy")[name][:]
    settings |= {"pairs_read": len(pairs.rows), "cut": counts[Status.CUT]}
    settings["dropped"] = {reason.name.lower(): counts[reason] for reason in Status if reason > Status.CUT}
    form = "messages" if KnownBy.MESSAGES in numbers_of(encoded, "known_by") else "text"
    if scorer.form not in (None, form):
        settings |= {"trained_on": scorer.form, "scored_on": form}
    return table, settings, _quote(table, encoded, scorer.tokenizer)


def _quote(table: pd.DataFrame, encoded: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Row, margin and texts of the pairs most confidently wrong: what both sides share, and how each goes on."""
    margin = table.chosen_score.astype(float) - table.rejected_score
    quoted = []
    for number in margin[margin < 0].nsmallest(QUOTED).index:
        pair = encoded[number]
        chosen, rejected, shared = pair["chosen_ids"], pair["rejected_ids"], pair["prefix"]
        parts = {"shared": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}
        texts = {name: tokenizer.decode(ids, skip_special_tokens=True) for name, ids in parts.items()}
        quoted.append({"row": pair["row"], "margin": margin[number], **texts})
    return quoted


def headline(report: dict[str, Any]) -> str:
    """The evaluation in one line."""
    within = f" (95% interval {span(report['accuracy_ci95'])})" if report["accuracy_ci95"] else ""
    accuracy, longer = percent(report["accuracy"]), percent(report["length_baseline_accuracy"])
    pairs = f"{report['pairs']:,} pair" + ("" if report["pairs"] == 1 else "s")
    return f"accuracy {accuracy}{within} on {pairs}; {LONGER}: {longer}"


def format_report(report: dict[str, Any], wrong: Sequence[dict[str, Any]]) -> str:
    """The page in Markdown: headline, table, the comparison if there is one, what to doubt, and pairs from `_quote`."""
    template = page("reward_recipes.evaluate", "evaluation.md.jinja")
    shown = {"report": report, "headline": headline(report), "coin_loss": math.log(2), "always_longer": LONGER}
    return template.render(shown, picture=output.EVALUATION_PICTURE, worst=output.WRONG_PAIRS, wrong=wrong)
