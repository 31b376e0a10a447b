"""An evaluation's page for people, what was found and what to doubt, as `evaluation.md.jinja` lays it out."""

import math
from typing import Any

from reward_recipes.evaluate.markdown import page, percent, points, span, with_interval

COIN_LOSS = math.log(2)
Report = dict[str, Any]


def headline(report: Report) -> str:
    """The evaluation in one line."""
    within = f" (95% interval {span(report['accuracy_ci95'])})" if report["accuracy_ci95"] else ""
    accuracy, longer = percent(report["accuracy"]), percent(report["length_baseline_accuracy"])
    pairs = f"{report['pairs']:,} pair" + ("" if report["pairs"] == 1 else "s")
    return f"accuracy {accuracy}{within} on {pairs}; always the longer reply: {longer}"


def format_report(report: Report, picture: str) -> str:
    """The page in Markdown: headline, one table, the comparison if there is one, what to doubt, the worst rows.

    Args:
        report: what `evaluation.evaluate` returns.
        picture: file name of the picture beside the page.
    """
    return page("reward_recipes.evaluate", "evaluation.md.jinja").render(
        report=report,
        picture=picture,
        headline=headline(report),
        coin_loss=COIN_LOSS,
        dropped={reason: count for reason, count in report["dropped"].items() if count},
        apart=_subsets_apart(report["subsets"]),
        percent=percent,
        points=points,
        span=span,
        with_interval=with_interval,
    )


def _subsets_apart(subsets: dict[str, Report]) -> tuple[tuple[str, Report], tuple[str, Report]] | None:
    """The lowest and the highest subset, where their intervals do not meet."""
    known = sorted((item for item in subsets.items() if item[1]["accuracy_ci95"]), key=lambda item: item[1]["accuracy"])
    if not known or known[0][1]["accuracy_ci95"][1] >= known[-1][1]["accuracy_ci95"][0]:
        return None
    return known[0], known[-1]
