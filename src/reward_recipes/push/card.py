"""What a published run says of itself: the Hub's metadata, and a page for people that `card.md.jinja` lays out."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData, RepoCard

from reward_recipes.evaluate import UNKNOWN, decimals, page, percent, span, table
from reward_recipes.run import output, read_mapping

FILES = {"config": "config.json", "audit": output.AUDIT, "summary": output.SUMMARY, "evaluation": output.EVALUATION}
# Within them the page is written anew by each push; what people write around them stays.
BEGIN, END = "<!-- begin: written by reward-recipes at each push -->", "<!-- end: written by reward-recipes -->"

Figures = Mapping[str, Any]


def write_card(staged: Path, repo_id: str, base: str | None, dataset: str | None) -> None:
    """Write `README.md` beside a run's other files.

    Args:
        staged: holds the files as they will be published.
        repo_id: `user/name`.
        base: hub id of the model that training started from; None if it is not on the Hub.
        dataset: the same of the preference pairs.
    """
    run = {part: _read(staged / name) for part, name in FILES.items()}
    recipe, evaluation = read_mapping(staged / output.RECIPE), run["evaluation"]
    test = {name.removeprefix("test_"): value for name, value in _read(staged / output.TEST_METRICS).items()}
    columns = {}
    if test:
        test["mean_margin"] = test["margin"]
        columns[f"split `{test['split']}`, at the end of training"] = test
    if evaluation:
        columns[f"evaluated afterwards, `{evaluation['dataset']}`, `{evaluation['split']}`"] = evaluation
    percentage = partial(percent, digits=2)
    body = page("reward_recipes.push", "card.md.jinja").render(
        **run,
        recipe=recipe,
        recipe_text=yaml.safe_dump(recipe).strip(),
        test=test,
        columns=columns,
        files={path.name for path in staged.iterdir()},
        repo_id=repo_id,
        base=_link(base, "", recipe["model_name_or_path"]),
        source=_link(dataset, "datasets/", recipe["dataset_name"]),
        figures=_figures,
        percent=percentage,
        interval=partial(span, show=percentage),
        decimals=decimals,
    )
    figures = test or evaluation
    metadata = ModelCardData(
        model_name=repo_id.split("/")[-1],
        base_model=base,
        datasets=[dataset] if dataset else None,
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["reward-model", "trl", "reward-recipes", "rlhf"],
        eval_results=[_result(figures, figures.get("dataset") or recipe["dataset_name"])] if figures else None,
    )
    ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{BEGIN}\n{body}\n{END}\n").save(staged / "README.md")


def merge_card(path: Path, existing: str | None, given: Mapping[str, Any]) -> None:
    """Merge the new card at `path` with the one in the repository, `existing`.

    Text outside our part stays, and so do its tags and the fields of metadata that we do not set. `given` fields, such
    as `license` and `language`, win.
    """
    card = RepoCard.load(path)
    if existing is not None:
        theirs = RepoCard(existing)
        before, begin, rest = theirs.text.partition(BEGIN)
        _, end, after = rest.partition(END)
        ours = card.text.strip("\n")
        card.text = f"{before}{ours}{after}" if begin and end else f"{theirs.text.rstrip()}\n\n{ours}\n"
        known, old = card.data.to_dict(), theirs.data.to_dict()
        old.pop("model-index", None)  # figures of what was pushed before
        tags = old.get("tags") or []
        known["tags"] = [*dict.fromkeys([*known["tags"], *(tags if isinstance(tags, list) else [tags])])]
        card.data = CardData(**{**known, **{name: value for name, value in old.items() if name not in known}})
    for name, value in given.items():
        card.data[name] = value
    card.save(path)


def _read(path: Path) -> dict[str, Any]:
    return read_mapping(path) if path.is_file() else {}


def _result(figures: Figures, source: str) -> EvalResult:
    return EvalResult(
        task_type="text-classification",
        task_name="Preference ranking",
        dataset_type=source if "/" in source else "local",
        dataset_name=source,
        dataset_split=figures["split"],
        metric_type="accuracy",
        metric_name="Pairwise accuracy",
        metric_value=figures["accuracy"],
    )


def _link(hub_id: str | None, kind: str, local: str) -> str:
    return f"[{hub_id}](https://huggingface.co/{kind}{hub_id})" if hub_id else f"`{local}` (a local folder or file)"


def _figures(columns: Mapping[str, Figures], rows: Sequence[tuple[str, str, Callable[[Any], str]]]) -> str:
    """A table of the figures that at least one column has; a row is a key, what a reader calls it, how it is shown."""
    lines = []
    for key, label, show in rows:
        found = [figures.get(key) for figures in columns.values()]
        if any(value is not None for value in found):
            lines.append([label, *(UNKNOWN if value is None else show(value) for value in found)])
    return table(["", *columns], lines)
