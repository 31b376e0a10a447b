"""Rows with several right and several wrong answers, as in RewardBench 2: does the best score go to a right one?"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from accelerate import PartialState
from datasets import Dataset

from reward_recipes.evaluate.evaluation import EvaluationArguments, load_judge
from reward_recipes.evaluate.markdown import page, percent, with_interval
from reward_recipes.evaluate.uncertainty import bootstrap_interval, credit
from reward_recipes.pairs import as_messages, last_reply, load_rows, without_nulls
from reward_recipes.run import UserError, expect, output, replacing
from reward_recipes.score import Scorer, by_all_processes, texts_of

TIES = "ties"  # the subset of RewardBench 2 that has a formula of its own


def evaluate_best_of_n(arguments: EvaluationArguments) -> dict[str, Any]:
    """Score a split of such rows and write `best_of_n.json` and `.md` into `output_dir`; return what the JSON holds.

    It names model, data and settings, `rows_read` and `dropped` (rows of which an answer is too long, or the partner in
    `Ties` is not there), and holds `best_of_n_figures`.

    Raises:
        UserError: what loading data or model raises; a row without a right and a wrong answer; none left.
    """
    for name in ("baseline_model_name_or_path", "dataset_data_dirs", "prompt_marker"):
        expect(not getattr(arguments, name), name, "none for rows with several answers", getattr(arguments, name))
    name, split = arguments.dataset_name, arguments.split
    rows = load_rows(name, arguments.dataset_config, split)
    scorer, settings = load_judge(arguments.model_name_or_path, arguments, arguments.revision)
    table = answer_table(rows, scorer, arguments.columns or {}, name)
    sound = table[[None not in scores for scores in table.scores]]
    expect(len(sound) > 0, name, f"answers of up to {scorer.max_length} tokens", f"{len(table)} rows with longer ones")
    figures = best_of_n_figures(sound)
    report = {"model": arguments.model_name_or_path, "dataset": name, "split": split, **settings}
    report |= {"rows_read": len(table), "dropped": len(table) - figures["rows"], **figures}
    if PartialState().is_main_process:
        folder = Path(arguments.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        output.save_json(folder / output.BEST_OF_N, report)
        text = page("reward_recipes.evaluate", "best_of_n.md.jinja").render(report=report, headline=headline(report))
        with replacing(folder / output.BEST_OF_N_PAGE) as partial:
            partial.write_text(text, encoding="utf-8")
    return report


def answer_table(rows: Dataset, scorer: Scorer, columns: Mapping[str, str], name: str) -> pd.DataFrame:
    """One line a row: `id`, `prompt` and `subset` as text, how many answers are `right`, which come first in `scores`
    (None: too long) and `lengths` (characters). Raises `UserError` for a row that has no such answers.
    """

    def lines() -> Iterator[dict[str, Any]]:
        for number, raw in enumerate(rows):
            row = without_nulls(raw)
            row |= {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
            try:
                right, wrong = _answers(row, "chosen"), _answers(row, "rejected")
                prompt = row.get("prompt") or ""
                asked = {**row, "prompt": prompt, "responses": [*right, *wrong]}
                texts = texts_of(asked, scorer.tokenizer, scorer.form)
            except (ValueError, UserError) as error:
                raise UserError(f"{name}, row {number}: {error}") from error
            whole = [getattr(text, "messages", text) for text in texts]
            yield {
                "id": str(row.get("id", number)),
                "prompt": json.dumps(prompt) if prompt else str(number),
                "subset": str(row.get("subset", "all")),
                "right": len(right),
                "texts": texts,
                "lengths": [len(last_reply(prompt, text)) for text in whole],
            }

    table = pd.DataFrame(lines())
    table["scores"] = by_all_processes(table.pop("texts").tolist(), scorer.score_groups)
    return table


def _answers(row: Mapping[str, Any], side: str) -> list[Any]:
    """The answers of a side, which may be one text or one list of messages."""
    found = row.get(side)
    is_one = isinstance(found, str) or (isinstance(found, list) and bool(found) and isinstance(found[0], dict))
    answers = [as_messages(found) or found] if is_one else found
    if not isinstance(answers, list) or not answers:
        raise ValueError(f"expected answers in {side!r}, found {found!r:.60}; name their column by --columns")
    return answers


def best_of_n_figures(table: pd.DataFrame) -> dict[str, Any]:
    """How often the best answer is right in rows of `answer_table` that were scored, beside what length would reach.

    A row counts by `best_credit`; in the subset `Ties`, `ref:N` and `tied:N` count together, by `ties_credit`, and what
    lacks its partner counts for nothing. Sources: Malik et al. (2025), RewardBench 2, arXiv 2506.01937;
    `rewardbench/utils.py` (`reroll_and_score_dataset`, `process_single_model`) of github.com/allenai/reward-bench.

    Returns:
        `score`, the mean over subsets, each weighing the same, as that benchmark takes it; `score_ci95`, by prompt;
        `length_score`, the same where length is the score; `pairwise_accuracy`, likewise, of all right answers against
        all wrong ones of their row (RM-Bench's average, arXiv 2410.16184); `rows`; `subsets`: these figures by name.
    """
    items = pd.DataFrame(_items(table))
    expect(len(items) > 0, TIES, "rows `ref:N` and `tied:N` of one question", f"{len(table)} rows without a partner")
    parts = {name: _figures(part) for name, part in items.groupby("subset")}
    weights = 1 / items.groupby("subset").subset.transform("size").to_numpy()
    return _figures(items, weights) | {"rows": int(items.rows.sum()), "subsets": parts}


def _figures(items: pd.DataFrame, weights: np.ndarray | None = None) -> dict[str, Any]:
    figures = {name: float(np.average(items[name], weights=weights)) for name in ("score", "length_score")}
    figures["score_ci95"] = bootstrap_interval(items.score.to_numpy(), items.prompt.to_numpy(), weights)
    figures["pairwise_accuracy"] = float(np.average(items.pairwise_accuracy, weights=weights))
    return figures | {"rows": int(items.rows.sum())}


def _items(table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """What counts once: a row, or both rows of a number in `Ties`."""
    ties = table.subset.str.lower() == TIES
    for row in table[~ties].itertuples():
        scored = {"score": best_credit(row.scores, row.right), "length_score": best_credit(row.lengths, row.right)}
        yield {"subset": row.subset, "prompt": row.prompt, "rows": 1, **scored, "pairwise_accuracy": _pairwise(row)}
    asked = {row.id: row for row in table[ties].itertuples()}
    for name, tied in asked.items():
        ref = asked.get(name.replace("tied:", "ref:", 1), tied)
        if ref is tied:
            continue
        scored = {"score": ties_credit(ref.scores, ref.right, tied.scores, tied.right)}
        scored["length_score"] = ties_credit(ref.lengths, ref.right, tied.lengths, tied.right)
        scored["pairwise_accuracy"] = (_pairwise(ref) + _pairwise(tied)) / 2
        yield {"subset": tied.subset, "prompt": name, "rows": 2, **scored}


def _pairwise(row: Any) -> float:
    scores = np.asarray(row.scores, dtype=np.float64)
    return float(credit(scores[: row.right, None] - scores[row.right :]).mean())


def best_credit(scores: list[float], right: int) -> float:
    """The share of right answers, the first `right` ones, among those with the highest score."""
    is_best = np.asarray(scores) == max(scores)
    return float(is_best[:right].sum() / is_best.sum())


def ties_credit(ref: list[float], ref_right: int, tied: list[float], tied_right: int) -> float:
    """What a question of `Ties` counts, asked once with one right answer and once with several.

    Let g be the lowest right score minus the highest wrong one, and s the highest right score minus the lowest right
    one of `tied`. Then 0.3 [g_tied > 0] + 0.3 [g_ref > 0] + 0.2 [g_tied > s] + 0.2 [min(g_ref, g_tied) > s] +
    0.01 tanh(min(g_ref, g_tied) / s - 1), whose last term is 0 for 0 / 0. The mean over questions is the published
    score, whose most is 1.01.
    """
    gaps = [min(scores[:right]) - max(scores[right:]) for scores, right in ((ref, ref_right), (tied, tied_right))]
    spread, least = max(tied[:tied_right]) - min(tied[:tied_right]), min(gaps)
    with np.errstate(divide="ignore", invalid="ignore"):
        bonus = np.nan_to_num(np.tanh(np.divide(least, spread) - 1), nan=0.0)
    return float(
        0.3 * (gaps[1] > 0) + 0.3 * (gaps[0] > 0) + 0.2 * (gaps[1] > spread) + 0.2 * (least > spread) + 0.01 * bonus
    )


def headline(report: dict[str, Any]) -> str:
    """The evaluation in one line."""
    found = with_interval(report["score"], report["score_ci95"])
    rows = f"{report['rows']:,} row" + ("" if report["rows"] == 1 else "s")
    return f"score {found} on {rows}; always the longest answer: {percent(report['length_score'])}"
