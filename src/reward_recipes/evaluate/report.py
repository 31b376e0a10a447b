"""An evaluation's page for people: what was found, and what to doubt."""

import math
from collections.abc import Iterator
from typing import Any

from reward_recipes.evaluate.markdown import UNKNOWN, percent, points, span, table, with_interval

FEW_PROMPTS = 50
MANY_TIES = 0.01
STRONG_CORRELATION = 0.3
GOOD_TEMPERATURES = (0.8, 1.25)
COIN_LOSS, COIN_BRIER = math.log(2), 0.25

Report = dict[str, Any]


def headline(report: Report) -> str:
    """The evaluation in one line."""
    within = f" (95% interval {span(report['accuracy_ci95'])})" if report["accuracy_ci95"] else ""
    accuracy, longer = percent(report["accuracy"]), percent(report["length_baseline_accuracy"])
    return f"accuracy {accuracy}{within} on {_count(report['pairs'])}; always the longer reply: {longer}"


def format_report(report: Report, picture: str) -> str:
    """The page in Markdown: headline, one table, the comparison if there is one, what to doubt, the worst rows.

    Args:
        report: what `evaluation.evaluate` returns.
        picture: file name of the picture beside the page.
    """
    settings = (
        f"{report['dtype']}, texts up to {report['max_length']:,} tokens (`overlong: {report['overlong']}`), "
        f"{_count(report['prompts'], 'different first turn')}"
    )
    parts = [
        f"# Evaluation of `{report['model']}`",
        f"**A{headline(report)[1:]}.**",
        f"Data: `{report['dataset']}`, split `{report['split']}`. Scored in {settings}.",
        _table(report),
        *([_comparison(report["paired_test"])] if "paired_test" in report else []),
        f"![Reliability, margins, accuracy by subset and by dialogue length]({picture})",
        "## What to doubt",
        "\n".join(f"- {doubt}" for doubt in doubts(report)),
        "## Most confidently wrong",
        _most_wrong(report["most_confidently_wrong"]),
    ]
    return "\n\n".join(parts) + "\n"


def _count(number: int, thing: str = "pair") -> str:
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def _accuracy(figures: Report, suffix: str = "") -> str:
    return with_interval(figures[f"accuracy{suffix}"], figures[f"accuracy_ci95{suffix}"])


def _table(report: Report) -> str:
    equal = _count(report["pairs_equal_length"])
    correlation = UNKNOWN if report["length_correlation"] is None else f"{report['length_correlation']:+.2f}"
    temperature = UNKNOWN if report["temperature"] is None else f"{report['temperature']:.3g}"
    rows = [
        ("accuracy", _accuracy(report), "pairs ranked as labelled, a tie counts half; 95% interval by prompt"),
        ("always the longer reply", percent(report["length_baseline_accuracy"]), "accuracy of length alone"),
        ("accuracy at equal length", _accuracy(report, "_equal_length"), f"{equal}, lengths within 10%"),
        ("margin and length", correlation, "Spearman's correlation"),
        ("loss", f"{report['loss']:.4f}", f"Bradley-Terry, in nats; a coin has {COIN_LOSS:.4f}"),
        ("Brier score", f"{report['brier']:.4f}", f"squared error of the probability; a coin has {COIN_BRIER}"),
        ("calibration error", percent(report["ece"]), "how far confidence and accuracy are apart (ECE)"),
        ("temperature", temperature, "over 1: too sure; under 1: too timid"),
        ("mean margin", f"{report['mean_margin']:.4g}", f"scores spread by {report['std_reward']:.4g}"),
        ("ties", percent(report["ties"]), "pairs with equal scores"),
    ]
    parts = {f"RewardBench {name}": part for name, part in report["categories"].items()}
    parts |= {f"`{name}`": part for name, part in report["subsets"].items()}
    rows += [(name, _accuracy(part), _count(part["pairs"])) for name, part in parts.items()]
    return table(["figure", "value", "meaning"], rows)


def _comparison(test: Report) -> str:
    interval = test["accuracy_difference_ci95"]
    differs = interval and not interval[0] <= 0 <= interval[1]
    verdict = "a difference beyond chance" if differs else "no difference beyond chance was seen"
    ends = f" (95% interval {span(interval, points)})" if interval else ""
    return (
        f"## Against `{test['baseline']}`\n\n"
        f"**{points(test['accuracy_difference'])} points{ends}: {verdict}.** On the {test['pairs']:,} pairs that "
        f"both can score: {percent(test['accuracy'])} against {percent(test['baseline_accuracy'])}; better on "
        f"{test['better']:,} pairs, worse on {test['worse']:,}; exact McNemar test p = {test['mcnemar_p']:.3g} (which "
        f"takes pairs on one prompt as independent; the interval does not). Pairs that one model alone can score: "
        f"{test['only_model']:,} and {test['only_baseline']:,}."
    )


def _most_wrong(pairs: list[Report]) -> str:
    if not pairs:
        return "No pair is ranked wrong."
    rows = ", ".join(f"{pair['row']} ({pair['margin']:.2f})" for pair in pairs[:10])
    return f"Rows of the split as it was loaded, counted from 0, with their margins: {rows}."


def doubts(report: Report) -> list[str]:
    """What in these very figures should keep a reader from trusting the accuracy, a sentence each."""
    always = "The intervals speak of other prompts like these, not of another training run or other data."
    return [*_doubts_of_data(report), *_doubts_of_accuracy(report), *_doubts_of_bias(report), always]


def _doubts_of_data(report: Report) -> Iterator[str]:
    dropped = {reason.replace("_", " "): count for reason, count in report["dropped"].items() if count}
    if dropped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
        yield f"{sum(dropped.values()):,} of {report['pairs_read']:,} pairs were not scored ({reasons})."
    if report["cut"]:
        yield f"{report['cut']:,} pairs were scored without their beginning, which was too long."
    if report["split"].startswith("train"):
        yield f"The split is called `{report['split']}`: were these pairs trained on, all figures flatter the model."
    if report["prompts"] < FEW_PROMPTS:
        yield f"Only {_count(report['prompts'], 'different first turn')}: the intervals are rough, and too narrow."


def _doubts_of_accuracy(report: Report) -> Iterator[str]:
    interval = report["accuracy_ci95"]
    if report["std_reward"] == 0:
        yield "All scores are equal: the model has collapsed and ranks nothing."
    elif report["ties"] > MANY_TIES:
        yield f"{percent(report['ties'])} of the pairs are ties, each counted half right."
    if interval and interval[0] <= 0.5 <= interval[1]:
        yield "The interval holds 50%: the model may be no better than a coin."
    if interval and report["accuracy"] in (0, 1):
        # The rule of three: Hanley and Lippman-Hand (1983), If nothing goes wrong, is everything all right?
        most = min(1, 3 / report["prompts"])
        yield f"All pairs came out alike, so the interval has no width; up to {percent(most)} may still be otherwise."
    if apart := _subsets_apart(report["subsets"]):
        low, high = (f"{_accuracy(part)} in `{name}`" for name, part in apart)
        yield f"One accuracy hides a range of subsets, from {low} to {high}."


def _subsets_apart(subsets: dict[str, Report]) -> tuple[tuple[str, Report], tuple[str, Report]] | None:
    """The lowest and the highest subset, where their intervals do not meet."""
    known = sorted((item for item in subsets.items() if item[1]["accuracy_ci95"]), key=lambda item: item[1]["accuracy"])
    if not known or known[0][1]["accuracy_ci95"][1] >= known[-1][1]["accuracy_ci95"][0]:
        return None
    return known[0], known[-1]


def _doubts_of_bias(report: Report) -> Iterator[str]:
    interval, length = report["accuracy_ci95"], report["length_baseline_accuracy"]
    if interval and length >= interval[0]:
        yield f"Always preferring the longer reply reaches {percent(length)}, which the interval does not exclude."
    correlation = report["length_correlation"]
    if correlation is not None and abs(correlation) >= STRONG_CORRELATION:
        kind = "longer" if correlation > 0 else "shorter"
        yield f"The model leans towards {kind} replies: margin and length correlate by {correlation:+.2f}."
    if report["loss"] >= COIN_LOSS:
        yield f"The loss is no lower than a coin's ({COIN_LOSS:.4f}): as probabilities the scores are useless."
    temperature = report["temperature"]
    if temperature is not None and not 0.8 <= temperature <= 1.25:
        kind = "too sure of itself" if temperature > 1 else "too timid"
        yield f"The model is {kind}: margins divided by {temperature:.3g} fit these pairs best."
