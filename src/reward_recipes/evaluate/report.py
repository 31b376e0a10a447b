"""An evaluation for people: a page that says what was found and what to doubt, and a picture of four panels."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from reward_recipes.evaluate.markdown import UNKNOWN, percent, points, span, table, with_interval

Report = dict[str, Any]

FEW_PROMPTS = 50
MANY_TIES = 0.01
STRONG_CORRELATION = 0.3
MOST_SUBSETS = 24
COIN_LOSS, COIN_BRIER = np.log(2), 0.25

# Okabe-Ito colours; hatches and markers tell the same in grey print.
RIGHT = {"color": "#0072B2", "label": "right"}
WRONG = {"color": "#D55E00", "label": "wrong", "hatch": "///", "edgecolor": "white", "linewidth": 0}
TIES = {"color": "0.5", "label": "tie"}
DOTS = {"color": "#0072B2", "marker": "o", "markersize": 5, "capsize": 3, "linewidth": 1.5}
LEVEL = {"color": "0.3", "linewidth": 1.1}
NOTE = {"fontsize": 8, "color": "0.25"}


def _count(number: int, thing: str = "pair") -> str:
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def _with_interval(figures: Report) -> str:
    return with_interval(figures["accuracy"], figures["accuracy_ci95"])


def _equal_length(report: Report) -> Report:
    return {name: report[f"{name}_equal_length"] for name in ("pairs", "accuracy", "accuracy_ci95")}


def headline(report: Report) -> str:
    """The evaluation in one line."""
    within = f" (95% interval {span(report['accuracy_ci95'])})" if report["accuracy_ci95"] else ""
    return (
        f"accuracy {percent(report['accuracy'])}{within} on {_count(report['pairs'])}; always the longer reply: "
        f"{percent(report['length_baseline_accuracy'])}"
    )


def format_report(report: Report, picture: str) -> str:
    """The page in Markdown: headline, one table, the comparison if there is one, what to doubt, the worst rows.

    Args:
        report: what `evaluate.evaluate` returns.
        picture: file name of the picture beside the page.
    """
    settings = (
        f"{report['dtype']}, texts up to {report['max_length']:,} tokens (`overlong: {report['overlong']}`), "
        f"{_count(report['prompts'], 'different first turn')}"
    )
    parts = [
        f"# Evaluation of `{report['model']}`",
        f"**{headline(report)[0].upper()}{headline(report)[1:]}.**",
        f"Data: `{report['dataset']}`, split `{report['split']}`. Scored in {settings}.",
        _table(report),
        _comparison(report["paired_test"]) if "paired_test" in report else "",
        f"![Reliability, margins, accuracy by subset and by dialogue length]({picture})",
        "## What to doubt",
        "\n".join(f"- {doubt}" for doubt in doubts(report)),
        "## Most confidently wrong",
        _most_wrong(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(report: Report) -> str:
    equal = _equal_length(report)
    correlation = UNKNOWN if report["length_correlation"] is None else f"{report['length_correlation']:+.2f}"
    temperature = UNKNOWN if report["temperature"] is None else f"{report['temperature']:.3g}"
    rows = [
        ("accuracy", _with_interval(report), "pairs ranked as labelled, a tie counts half; 95% interval by prompt"),
        ("always the longer reply", percent(report["length_baseline_accuracy"]), "accuracy of length alone"),
        ("accuracy at equal length", _with_interval(equal), f"{_count(equal['pairs'])}, lengths within 10%"),
        ("margin and length", correlation, "Spearman's correlation"),
        ("loss", f"{report['loss']:.4f}", f"Bradley-Terry, in nats; a coin has {COIN_LOSS:.4f}"),
        ("Brier score", f"{report['brier']:.4f}", f"squared error of the probability; a coin has {COIN_BRIER}"),
        ("calibration error", percent(report["ece"]), "how far confidence and accuracy are apart (ECE)"),
        ("temperature", temperature, "over 1: too sure; under 1: too timid"),
        ("mean margin", f"{report['mean_margin']:.4g}", f"scores spread by {report['std_reward']:.4g}"),
        ("ties", percent(report["ties"]), "pairs with equal scores"),
    ]
    for kind in ("categories", "subsets"):
        label = {"categories": "RewardBench {}", "subsets": "`{}`"}[kind]
        for name, figures in report[kind].items():
            rows.append((label.format(name), _with_interval(figures), _count(figures["pairs"])))
    return table(["figure", "value", "meaning"], rows)


def _comparison(test: Report) -> str:
    interval = test["accuracy_difference_ci95"]
    ends = f" (95% interval {span(interval, points)})" if interval else ""
    verdict = "a difference beyond chance" if _excludes_zero(interval) else "no difference beyond chance was seen"
    return (
        f"## Against `{test['baseline']}`\n\n"
        f"**{points(test['accuracy_difference'])} points{ends}: {verdict}.** On the {test['pairs']:,} pairs that "
        f"both can score: {percent(test['accuracy'])} against {percent(test['baseline_accuracy'])}; better on "
        f"{test['better']:,} pairs, worse on {test['worse']:,}; exact McNemar test p = {test['mcnemar_p']:.3g} (which "
        f"takes pairs on one prompt as independent; the interval does not). Pairs that one model alone can score: "
        f"{test['only_model']:,} and {test['only_baseline']:,}."
    )


def _excludes_zero(interval: Sequence[float] | None) -> bool:
    return interval is not None and not interval[0] <= 0 <= interval[1]


def _most_wrong(report: Report) -> str:
    wrong = report["most_confidently_wrong"]
    if not wrong:
        return "No pair is ranked wrong."
    rows = ", ".join(f"{pair['row']} ({pair['margin']:.2f})" for pair in wrong[:10])
    return f"Rows of the split as it was loaded, counted from 0, with their margins: {rows}."


def doubts(report: Report) -> list[str]:
    """What in these very figures should keep a reader from trusting the accuracy, a sentence each."""
    found = [*_doubts_of_data(report), *_doubts_of_accuracy(report), *_doubts_of_length(report)]
    found += _doubts_of_confidence(report)
    return [*found, "The intervals speak of other prompts like these, not of another training run or other data."]


def _doubts_of_data(report: Report) -> Iterator[str]:
    dropped = {reason: count for reason, count in report["dropped"].items() if count}
    if dropped:
        reasons = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in dropped.items())
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
    apart = _furthest_subsets(report["subsets"])
    if apart:
        low, high = (f"{_with_interval(figures)} in `{name}`" for name, figures in apart)
        yield f"One accuracy hides a range of subsets, from {low} to {high}."


def _furthest_subsets(subsets: dict[str, Report]) -> tuple[tuple[str, Report], tuple[str, Report]] | None:
    """The lowest and the highest subset, where their intervals do not meet."""
    known = sorted((item for item in subsets.items() if item[1]["accuracy_ci95"]), key=lambda item: item[1]["accuracy"])
    if not known or known[0][1]["accuracy_ci95"][1] >= known[-1][1]["accuracy_ci95"][0]:
        return None
    return known[0], known[-1]


def _doubts_of_length(report: Report) -> Iterator[str]:
    interval, length = report["accuracy_ci95"], report["length_baseline_accuracy"]
    if interval and length >= interval[0]:
        yield f"Always preferring the longer reply reaches {percent(length)}, which the interval does not exclude."
    correlation = report["length_correlation"]
    if correlation is not None and abs(correlation) >= STRONG_CORRELATION:
        kind = "longer" if correlation > 0 else "shorter"
        yield f"The model leans towards {kind} replies: margin and length correlate by {correlation:+.2f}."


def _doubts_of_confidence(report: Report) -> Iterator[str]:
    if report["loss"] >= COIN_LOSS:
        yield f"The loss is no lower than a coin's ({COIN_LOSS:.4f}): as probabilities the scores are useless."
    temperature = report["temperature"]
    if temperature is not None and not 0.8 <= temperature <= 1.25:
        kind = "too sure of itself" if temperature > 1 else "too timid"
        yield f"The model is {kind}: margins divided by {temperature:.3g} fit these pairs best."


def draw_report(report: Report, path: Path) -> None:
    """Draw reliability, margins, accuracy by subset and accuracy by dialogue length as a PNG."""
    figure = Figure(figsize=(11, 8.2), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    reliability, margins, subsets, lengths = figure.subplots(2, 2).flat
    _draw_reliability(reliability, report)
    _draw_margins(margins, report)
    _draw_subsets(subsets, report)
    _draw_lengths(lengths, report)
    figure.savefig(path, format="png")


def _style(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(color="0.9", linewidth=0.6)


_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.4g}%")


def _draw_reliability(axes: Axes, report: Report) -> None:
    bins = [part for part in report["reliability"] if part["pairs"]]
    counts = axes.twinx()
    width = report["reliability"][0]["high"] - report["reliability"][0]["low"]
    counts.bar([part["low"] for part in bins], [part["pairs"] for part in bins], width, align="edge", color="0.88")
    most = max(part["pairs"] for part in bins)
    counts.set_ylim(0, 3 * most)
    counts.set_yticks([0, most], ["0", f"{most:,}"])
    counts.set_ylabel("pairs (bars)", y=1 / 6)
    counts.spines["top"].set_visible(False)
    axes.set_zorder(counts.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.plot([0.5, 1], [0.5, 1], linestyle="--", label="as sure as right", **LEVEL)
    line = {key: value for key, value in DOTS.items() if key != "capsize"}
    axes.plot([part["confidence"] for part in bins], [part["accuracy"] for part in bins], label="model", **line)
    axes.xaxis.set_major_formatter(_PERCENT)
    axes.yaxis.set_major_formatter(_PERCENT)
    axes.set_xlim(0.5, 1)
    axes.set_ylim(0, 1.03)
    _style(axes, f"(a) Calibration error {percent(report['ece'])}", "confidence, sigmoid(|margin|)", "accuracy")
    axes.grid(False)
    axes.legend(edgecolor="none", fontsize=8.5, loc="upper left")


def _draw_margins(axes: Axes, report: Report) -> None:
    edges, pairs = np.array(report["margin_histogram"]["edges"]), np.array(report["margin_histogram"]["pairs"])
    starts, widths = edges[:-1], np.diff(edges)
    half, ties = len(pairs) // 2, round(report["ties"] * report["pairs"])
    axes.bar(starts[:half], pairs[:half], widths[:half], align="edge", **WRONG)
    right = pairs[half:] - np.where(np.arange(half) == 0, ties, 0)  # a margin of 0 falls into the first bin from 0 on
    axes.bar(starts[half:], right, widths[half:], align="edge", **RIGHT)
    if ties:
        axes.bar(starts[half], ties, widths[half], bottom=right[0], align="edge", **TIES)
    axes.axvline(0, **LEVEL)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    _style(axes, f"(b) Mean margin {report['mean_margin']:.3g}", "margin, chosen minus rejected score", "pairs")
    axes.legend(edgecolor="none", fontsize=8.5, loc="upper right")


def _draw_accuracies(axes: Axes, parts: Sequence[Report], upright: bool) -> None:
    """Dots with their intervals, one for each part, along the x axis if `upright`, else along the y axis."""
    for place, part in enumerate(parts):
        accuracy, interval = part["accuracy"], part["accuracy_ci95"]
        reach = None if interval is None else [[max(0, accuracy - interval[0])], [max(0, interval[1] - accuracy)]]
        dot = (place, accuracy) if upright else (accuracy, place)
        axes.errorbar(*dot, **{"yerr" if upright else "xerr": reach}, **DOTS)


def _draw_subsets(axes: Axes, report: Report) -> None:
    subsets = sorted(report["subsets"].items(), key=lambda item: -item[1]["pairs"])[:MOST_SUBSETS]
    named = {"all pairs": report} | dict(sorted(subsets))
    if report["pairs_equal_length"]:
        named["replies of equal length"] = _equal_length(report)
    _draw_accuracies(axes, list(named.values()), upright=False)
    axes.axvline(0.5, linestyle=":", label="a coin", **LEVEL)
    axes.axvline(report["length_baseline_accuracy"], color="#D55E00", linestyle="--", label="always the longer reply")
    size = 9 if len(named) <= 12 else 6.5
    axes.set_yticks(range(len(named)), [f"{name} ({part['pairs']:,})" for name, part in named.items()], fontsize=size)
    axes.set_ylim(len(named) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(_PERCENT)
    _style(axes, f"(c) Accuracy {_with_interval(report)}", "accuracy, 95% interval by prompt", "")
    axes.legend(edgecolor="none", fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def _draw_lengths(axes: Axes, report: Report) -> None:
    parts = report["by_dialogue_length"]
    _draw_accuracies(axes, parts, upright=True)
    axes.axhline(0.5, linestyle=":", **LEVEL)
    labels = [f"to {part['high']:,}\n({part['pairs']:,})" for part in parts]
    axes.set_xticks(range(len(parts)), labels, fontsize=8.5)
    axes.set_xlim(-0.6, len(parts) - 0.4)
    axes.yaxis.set_major_formatter(_PERCENT)
    _style(axes, "(d) Accuracy by dialogue length", "tokens of the longer side (pairs)", "accuracy")
