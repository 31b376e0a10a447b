"""What a published run says of itself: the Hub's metadata, and a page for people that `card.md.jinja` lays out."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from reward_recipes.evaluate import UNKNOWN, decimals, page, percent, span, table
from reward_recipes.run import installed, output

CARD = "README.md"
NOT_MEASURED = "not measured"
SHARES = ("longer_chosen", "common_prefix")

Figures = Mapping[str, Any]
Row = tuple[str, str, Callable[[Any], str]]  # a figure's key, what a reader calls it, how it is shown


def write_card(staged: Path, repo_id: str, base_model: str | None, dataset: str | None) -> None:
    """Write `README.md` beside a run's other files.

    Args:
        staged: holds the files as they will be published.
        repo_id: `user/name`.
        base_model: hub id of the model that training started from; None if it is not on the Hub.
        dataset: the same of the preference pairs.
    """
    names = {"config": "config.json", "audit": output.AUDIT, "summary": output.SUMMARY, "evaluation": output.EVALUATION}
    run = {part: _read(staged / name) for part, name in names.items()}
    recipe = yaml.safe_load((staged / output.RECIPE).read_text("utf-8"))
    test = {name.removeprefix("test_"): value for name, value in _read(staged / output.TEST_METRICS).items()}
    if test:
        test = {"split": "test", "mean_margin": test.get("margin")} | test
    body = page("reward_recipes.push", "card.md.jinja").render(
        **SHOWN_BY,
        **run,
        recipe=recipe,
        recipe_text=yaml.safe_dump(recipe).strip(),
        test=test,
        columns=_columns(test, run["evaluation"]),
        subsets=run["evaluation"].get("subsets") or _subsets_of_test(test),
        files={path.name for path in staged.iterdir()},
        installed=installed(),
        repo_id=repo_id,
        base=_link(base_model, "", recipe["model_name_or_path"]),
        source=_link(dataset, "datasets/", recipe["dataset_name"]),
    )
    metadata = _metadata(repo_id, base_model, dataset, test if "accuracy" in test else run["evaluation"], recipe)
    ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}").save(staged / CARD)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _metadata(
    repo_id: str, base_model: str | None, dataset: str | None, figures: Figures, recipe: Figures
) -> ModelCardData:
    """What the Hub reads, with the accuracy of `figures` if they hold one."""
    source = figures.get("dataset") or dataset or recipe["dataset_name"]
    result = EvalResult(
        task_type="text-classification",
        task_name="Preference ranking",
        dataset_type=source if "/" in source else "local",
        dataset_name=source,
        dataset_split=figures.get("split"),
        metric_type="accuracy",
        metric_name="Pairwise accuracy",
        metric_value=figures.get("accuracy"),
    )
    return ModelCardData(
        model_name=repo_id.split("/")[-1],
        base_model=base_model,
        datasets=[dataset] if dataset else None,
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["reward-model", "trl", "reward-recipes", "rlhf"],
        eval_results=[result] if "accuracy" in figures else None,
    )


def _link(hub_id: str | None, kind: str, local: str) -> str:
    return f"[{hub_id}](https://huggingface.co/{kind}{hub_id})" if hub_id else f"`{local}` (a local folder or file)"


def _columns(test: Figures, evaluation: Figures) -> dict[str, Figures]:
    """The columns of the table of results: the run's own figures, then those of an evaluation in its folder."""
    columns = {f"split `{test['split']}`, at the end of training": test} if test else {}
    if evaluation:
        where = [f"`{evaluation[key]}`" for key in ("dataset", "split") if key in evaluation]
        columns[", ".join(["evaluated afterwards", *where])] = evaluation
    return columns


def _subsets_of_test(test: Figures) -> dict[str, Figures]:
    """Training names the figure of a subset `accuracy_NAME`."""
    named = {key.removeprefix("accuracy_"): value for key, value in test.items() if key.startswith("accuracy_")}
    return {name: {"accuracy": value} for name, value in named.items() if isinstance(value, float)}


def _figures(columns: Mapping[str, Figures], rows: Sequence[Row]) -> str:
    """A table of the figures that at least one column has; accuracy and its interval are always told."""
    lines = []
    for key, label, show in rows:
        found = [figures.get(key) for figures in columns.values()]
        if key.startswith("accuracy") or any(value is not None for value in found):
            lines.append([label, *(NOT_MEASURED if value is None else show(value) for value in found)])
    return table(["", *columns], lines)


def _counts(audit: Mapping[str, Figures], labels: Mapping[str, str]) -> str:
    """A line a measure, the known ones first, and a column a split."""
    measures = dict.fromkeys([*labels, *(measure for split in audit.values() for measure in split)])
    rows = [
        [labels.get(measure, measure), *(_count(measure, split.get(measure)) for split in audit.values())]
        for measure in measures
        if any(measure in split for split in audit.values())
    ]
    return table(["", *(f"`{split}`" for split in audit)], rows)


def _count(measure: str, value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return percent(value) if measure in SHARES else f"{value:,.0f}"


_percent = partial(percent, digits=2)
# What the template calls to show a figure or a table of them.
SHOWN_BY = {
    "figures": _figures,
    "counts": _counts,
    "percent": _percent,
    "interval": partial(span, show=_percent),
    "decimals": decimals,
}
