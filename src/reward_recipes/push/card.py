"""What a published run says of itself: the Hub's metadata and a page for people, from the run's files alone."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from reward_recipes.evaluate import UNKNOWN, decimals, percent, span, table
from reward_recipes.run import installed, output

CARD = "README.md"
NOT_MEASURED = "not measured"

AUDIT_ROWS = {
    "pairs_read": "pairs read",
    "pairs_used": "pairs used",
    "pairs_trained_on": "pairs trained on",
    "missing_or_blank": "dropped: a side missing or blank",
    "identical": "dropped: both sides identical",
    "identical_after_cut": "dropped: both sides identical after the cut",
    "overlong_dropped": "dropped: too long",
    "overlong_cut": "cut: too long",
    "exact_duplicates": "repeat an earlier pair (kept)",
    "contradictions": "stand the other way round elsewhere (kept)",
    "first_turn_in_train": "open with a first turn that training has too",
    "longer_chosen": "chosen text is the longer one, of pairs of unequal length",
    "common_prefix": "tokens in a beginning that both sides share",
    "tokens_mean": "tokens of a text, mean",
    "tokens_p95": "tokens of a text, 95th percentile",
    "tokens_max": "tokens of a text, most",
}
SHARES = ("longer_chosen", "common_prefix")

_percent = partial(percent, digits=2)
_interval = partial(span, show=_percent)
RESULTS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("accuracy", "accuracy, a tie half right", _percent),
    ("accuracy_ci95", "its 95% interval (bootstrap by first turn)", _interval),
    ("pairs", "pairs", "{:,}".format),
    ("ties", "ties", _percent),
    ("loss", "loss (Bradley-Terry, nats)", decimals),
    ("mean_margin", "mean margin, chosen minus rejected", decimals),
    ("brier", "Brier score", decimals),
    ("ece", "expected calibration error", decimals),
    ("temperature", "temperature of least loss", decimals),
)
LENGTH: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("length_baseline_accuracy", "accuracy of always preferring the longer reply", _percent),
    ("length_correlation", "rank correlation of margin and difference in length", decimals),
    ("accuracy_equal_length", "the model's accuracy where the shorter reply has 90% of the longer", _percent),
    ("pairs_equal_length", "such pairs", "{:,}".format),
)

LOADING = """\
The score is read at the EOS token, so every text must end in exactly one. Without it the model reads another token and
the score is wrong.

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("{repo_id}").eval()
tokenizer = AutoTokenizer.from_pretrained("{repo_id}")

text = prompt + response  # one string, laid out as in the training data
score = model(**tokenizer(text + tokenizer.eos_token, return_tensors="pt")).logits.item()
```
"""
MESSAGES = """
A dialogue in messages is written by the tokenizer's chat template up to the end of the last message, then EOS:

```python
last = messages[-1]["content"].strip()
text = tokenizer.apply_chat_template(messages, tokenize=False)
text = text[: text.rindex(last) + len(last)] + tokenizer.eos_token
score = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits.item()
```
"""
LIMITS = """\
It is meant for ranking replies to the same prompt (best of n, comparing models) and as the reward of PPO, RLOO or GRPO.

- Only differences between replies to one prompt mean something: sigmoid(difference) estimates how likely the first is
  preferred. Scores of different prompts share no scale, and zero is no threshold.
- It repeats the preferences of those who made the training pairs, their mistakes and their biases included. On other
  kinds of dialogue, other tasks and other languages it was {elsewhere}.
- A policy trained against it will find what it overrates. Hold the policy near its start (KL), and read its samples.
- It is no check of facts and no safety filter.
"""


class Run:
    """The files of a run that is about to be published; those that are missing read as empty."""

    def __init__(self, staged: Path) -> None:
        self.folder = staged
        self.recipe = yaml.safe_load((staged / output.RECIPE).read_text("utf-8"))
        self.model = self._json("config.json")
        self.audit = self._json(output.AUDIT)
        self.summary = self._json(output.SUMMARY)
        self.evaluation = self._json(output.EVALUATION)
        test = {name.removeprefix("test_"): value for name, value in self._json(output.TEST_METRICS).items()}
        self.test = test | ({"mean_margin": test["margin"]} if "margin" in test else {})

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}

    @property
    def chosen_on(self) -> str | None:
        """The split that chose the best step, where one did."""
        if self.recipe.get("eval_strategy") == "no":
            return None
        test = self.recipe.get("dataset_test_split", "test")
        return (self.recipe.get("eval_splits") or ["validation" if "validation" in self.audit else test])[0]


def write_card(staged: Path, repo_id: str, base_model: str | None, dataset: str | None) -> None:
    """Write `README.md` beside a run's other files.

    Args:
        staged: holds the files as they will be published.
        repo_id: `user/name`.
        base_model: hub id of the model that training started from; None if it is not on the Hub.
        dataset: the same of the preference pairs.
    """
    run = Run(staged)
    sections = {
        f"# {repo_id.split('/')[-1]}": _what_it_is(run, base_model, dataset),
        "## Results": _results(run),
        "## Length bias": _length_bias(run),
        "## How to load and score": _loading(run, repo_id),
        "## Limits and intended use": LIMITS.format(elsewhere=NOT_MEASURED),
        "## Data": _data(run, dataset),
        "## Training": _training(run),
        "## Versions": _versions(run),
    }
    metadata = _metadata(run, repo_id, base_model, dataset).to_yaml()
    body = "\n\n".join(f"{title}\n\n{text.strip()}" for title, text in sections.items())
    ModelCard(f"---\n{metadata}\n---\n\n{body}\n").save(staged / CARD)


def _metadata(run: Run, repo_id: str, base_model: str | None, dataset: str | None) -> ModelCardData:
    figures = run.test if "accuracy" in run.test else run.evaluation
    results = None
    if "accuracy" in figures:
        name = figures.get("dataset") or dataset or run.recipe["dataset_name"]
        results = [
            EvalResult(
                task_type="text-classification",
                task_name="Preference ranking",
                dataset_type=name if "/" in name else "local",
                dataset_name=name,
                dataset_split=figures.get("split"),
                metric_type="accuracy",
                metric_name="Pairwise accuracy",
                metric_value=figures["accuracy"],
            )
        ]
    return ModelCardData(
        model_name=repo_id.split("/")[-1],
        base_model=base_model,
        datasets=[dataset] if dataset else None,
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["reward-model", "trl", "reward-recipes", "rlhf"],
        eval_results=results,
    )


def _what_it_is(run: Run, base_model: str | None, dataset: str | None) -> str:
    base = _named(base_model, "", run.recipe["model_name_or_path"])
    pairs = _named(dataset, "datasets/", run.recipe["dataset_name"])
    kind = " ".join(run.model.get("architectures") or ["a model with a score head"])
    return (
        "A reward model: it reads a dialogue and gives its last reply one number, the higher the better. It was "
        f"trained from {base} on the preference pairs of {pairs} with the Bradley-Terry loss of TRL's "
        f"`RewardTrainer`, by `reward-recipes`. Architecture: `{kind}`, one label.{_headline(run)}"
    )


def _named(hub_id: str | None, kind: str, local: str) -> str:
    return f"[{hub_id}](https://huggingface.co/{kind}{hub_id})" if hub_id else f"`{local}` (a local folder or file)"


def _headline(run: Run) -> str:
    if "accuracy" not in run.test:
        return ""
    interval = run.test.get("accuracy_ci95")
    within = f" (95% interval {_interval(interval)})" if interval else ""
    return (
        f"\n\nIt ranks **{_percent(run.test['accuracy'])}**{within} of {run.test['pairs']:,} pairs of the split "
        f"`{run.test.get('split', 'test')}` the way they are labelled."
    )


def _results(run: Run) -> str:
    columns = {}
    if run.test:
        columns[f"split `{run.test.get('split', 'test')}`, at the end of training"] = run.test
    if run.evaluation:
        where = [f"`{run.evaluation[key]}`" for key in ("dataset", "split") if key in run.evaluation]
        columns[", ".join(["evaluated afterwards", *where])] = run.evaluation
    if not columns:
        return f"On held-out pairs: {NOT_MEASURED}."
    parts = [_figures(columns, RESULTS)]
    if run.test and run.test.get("split") == run.chosen_on:
        parts.append("The figures at the end of training are optimistic: that split also chose the best step.")
    ceiling = run.recipe.get("known_ceiling")
    if ceiling is not None:
        parts.append(f"The data are synthetic: {_percent(ceiling)} is the best accuracy that can be reached on them.")
    parts.append(_groups("subset", run.evaluation.get("subsets") or _subsets_of_test(run.test)))
    parts.append(_groups("category", run.evaluation.get("categories")))
    if (run.folder / output.EVALUATION_PICTURE).is_file():
        parts.append(f"![The evaluation's figures drawn]({output.EVALUATION_PICTURE})")
    return "\n\n".join(part for part in parts if part)


def _figures(columns: Mapping[str, Mapping[str, Any]], rows: Sequence[tuple[str, str, Callable[[Any], str]]]) -> str:
    """A table of the figures that at least one column has; accuracy and its interval are always told."""
    lines = []
    for key, label, show in rows:
        found = [figures.get(key) for figures in columns.values()]
        if key.startswith("accuracy") or any(value is not None for value in found):
            lines.append([label, *(NOT_MEASURED if value is None else show(value) for value in found)])
    return table(["", *columns], lines)


def _subsets_of_test(test: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Training names the figure of a subset `accuracy_NAME`."""
    named = {key.removeprefix("accuracy_"): value for key, value in test.items() if key.startswith("accuracy_")}
    return {name: {"accuracy": value} for name, value in named.items() if isinstance(value, float)}


def _groups(title: str, groups: Mapping[str, Mapping[str, Any]] | None) -> str:
    if not groups:
        return ""
    rows = [[name, *(_cell(figures, key, show) for key, _, show in RESULTS[:3])] for name, figures in groups.items()]
    return table([title, "accuracy", "95% interval", "pairs"], rows)


def _cell(figures: Mapping[str, Any], key: str, show: Callable[[Any], str]) -> str:
    return NOT_MEASURED if figures.get(key) is None else show(figures[key])


def _length_bias(run: Run) -> str:
    if "length_baseline_accuracy" in run.evaluation:
        figures = _figures({"evaluated afterwards": run.evaluation}, LENGTH)
        return f"{figures}\n\nLength is in characters of the last reply."
    share = run.audit.get(run.recipe.get("dataset_train_split", "train"), {}).get("longer_chosen")
    told = "" if share is None else f"In {share:.1%} of the training pairs that differ in length the longer is chosen. "
    return f"{told}How far the scores follow length was {NOT_MEASURED}."


def _loading(run: Run, repo_id: str) -> str:
    template = (run.folder / "chat_template.jinja").is_file()
    policy = run.model.get("reward_recipes") or {}
    length = policy.get("max_length")
    parts = [LOADING.format(repo_id=repo_id), MESSAGES if template else ""]
    if length is not None:
        what = "lost their beginning" if policy.get("overlong") == "keep_end" else "were left out, of the figures too"
        parts.append(f"It was trained on texts of up to {length:,} tokens, EOS included; longer ones {what}.")
    if (run.folder / output.ADAPTER).is_dir():
        parts.append(f"The weights are the merged model's; `{output.ADAPTER}/` holds the LoRA adapter alone.")
    return "\n\n".join(part.strip() for part in parts if part)


def _data(run: Run, dataset: str | None) -> str:
    source = _named(dataset, "datasets/", run.recipe["dataset_name"])
    if not run.audit:
        return f"{source}. What is in it was {NOT_MEASURED}."
    measures = dict.fromkeys(measure for counts in run.audit.values() for measure in counts)
    rows = [
        [AUDIT_ROWS.get(measure, measure), *(_count(measure, counts.get(measure)) for counts in run.audit.values())]
        for measure in sorted(measures, key=lambda name: [*AUDIT_ROWS, name].index(name))
    ]
    return f"{source}, counted before training:\n\n" + table(["", *(f"`{split}`" for split in run.audit)], rows)


def _count(measure: str, value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return percent(value) if measure in SHARES else f"{value:,.0f}"


def _training(run: Run) -> str:
    parts = [f"{_course(run)} {_cost(run)}".strip()]
    if (run.folder / output.PICTURE).is_file():
        parts.append(f"![Loss, accuracy, overfitting gap and learning rate over the steps]({output.PICTURE})")
    parts.append(f"The recipe, what differs from the defaults (`{output.RECIPE}`):")
    parts.append(f"```yaml\n{yaml.safe_dump(run.recipe).strip()}\n```")
    return "\n\n".join(parts)


def _course(run: Run) -> str:
    summary, split = run.summary, run.chosen_on
    if split is None or summary.get("best_step") is None:
        return f"This is the model of the last step. How accuracy went during training was {NOT_MEASURED}."
    by_loss = run.recipe.get("metric_for_best_model") in ("loss", "eval_loss")
    step = summary["best_loss_step" if by_loss else "best_step"]
    if (kept := summary.get("kept_step", step)) != step:
        return f"This is the model of step {kept:,}; the checkpoint of the best step, {step:,}, could not be written."
    best = f"loss, {decimals(summary['best_loss'])}" if by_loss else f"accuracy, {_percent(summary['best_accuracy'])}"
    course = (
        f"This is the model of step {step:,} of {summary['final_step']:,}, the one with the best {best}, on the split "
        f"`{split}`; at the last step the accuracy was {_percent(summary['final_accuracy'])}"
    )
    if (gap := summary.get("final_gap")) is not None:
        course += f" there, and {abs(100 * gap):.1f} points {'higher' if gap >= 0 else 'lower'} on training pairs"
    if summary.get("overfitting_began") is not None:
        course += f"; overfitting began at step {summary['overfitting_began']:,}"
    return course + "."


def _cost(run: Run) -> str:
    cost, processes = run.summary.get("cost"), run.summary.get("processes", 1)
    if not cost:
        return ""
    each = f", {processes} processes" if processes > 1 else ""
    took = "" if cost["seconds"] is None else f" took {cost['seconds']:,.0f} seconds and"
    counts = f"{cost['pairs']:,} pairs, repeats included, of {cost['num_unique_tokens']:,} unique tokens"
    return f"Training{took} used {counts} (device: {run.summary['device']}{each})."


def _versions(run: Run) -> str:
    versions, commit = run.summary.get("versions"), run.summary.get("commit")
    told = ", ".join(f"{name} {version}" for name, version in (versions or installed()).items())
    saved = run.model.get("transformers_version")
    saver = f"The model was saved by transformers {saved}. " if saved else ""
    if not versions:
        return f"{saver}Installed when this card was written: {told}."
    return f"{saver}Trained with {told}{f', at commit {commit}' if commit else ''}."
