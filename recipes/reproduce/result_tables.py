"""The tables and sentences of RESULTS.md, one function for each plan, from its collected runs."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from across_seeds import LearningCurve, Mean, agreement, compute, difference, ensemble, mean_over_runs
from collected import Finished, Section, margins
from plan import RUN, Arm
from result_pictures import draw_comparison, draw_learning_curve

from reward_recipes.evaluate import (
    UNKNOWN,
    bootstrap_interval,
    credit,
    decimals,
    pairwise_accuracy,
    percent,
    points,
    power,
    span,
    table,
    with_interval,
)
from reward_recipes.run import output

Row = dict[str, str]  # a cell by its column's heading

LINKS = {"log": output.LOG, "picture": output.PICTURE, "figures": output.TEST_METRICS, "scores": output.TEST_SCORES}
LINKS |= {"evaluation": output.EVALUATION_PAGE, "command": RUN}
ACCURACY, LOSS = "test_accuracy", "test_loss"
ASSUMED_FLOPS = 1e14  # a second, of the devices that minutes are estimated for
FULL_PAIRS = 144_720  # nine tenths of HH-RLHF's training pairs
change_of_loss = "{:+.4f}".format


def _table(rows: Sequence[Row]) -> str:
    """A column for each heading; a row without such a cell has a dash there."""
    head = list(dict.fromkeys(heading for row in rows for heading in row))
    return table(head, [[row.get(heading, UNKNOWN) for heading in head] for row in rows])


def _runs_table(section: Section) -> str:
    """The plan's command, and what each finished run used and gave."""
    command = f"`python recipes/reproduce/reproduce.py --plan {section.path.as_posix()}`"
    rows = [_run_row(section, run) for runs in section.finished.values() for run in runs]
    if not rows:
        return f"No run yet: {command}"
    return f"{command}\n\n<details><summary>Each run: figures and files</summary>\n\n{_table(rows)}\n\n</details>"


def _run_row(section: Section, run: Finished) -> Row:
    summary, test, seconds = run.summary, run.test, run.summary["cost"]["seconds"]
    files = {name: run.folder / file for name, file in LINKS.items()}
    return {
        "run": f"`{run.run.name}`",
        "pairs": f"{run.pairs:,}",
        "best step": f"{summary['kept_step']:,}",
        "test accuracy (95% interval)": with_interval(test[ACCURACY], test["test_accuracy_ci95"]),
        "test loss": decimals(test[LOSS]),
        "calibration error": percent(test["test_ece"]),
        "FLOPs": power(compute(summary["cost"])),
        "minutes": UNKNOWN if seconds is None else f"{seconds / 60:,.0f}",
        "commit": summary["commit"] or UNKNOWN,
        "device": summary["device"],
        "files": ", ".join(f"[{name}]({section.link(file)})" for name, file in files.items() if file.is_file()),
    }


def _not_run(arm: Arm) -> str:
    return f"not run (`--only {arm.name}`)"


def _count(arm: Arm, runs: Sequence[Finished]) -> str:
    """How many seeds were run, and which were not."""
    missing = sorted(set(arm.seeds) - {run.run.seed for run in runs})
    return str(len(runs)) + (f" (not run: {', '.join(map(str, missing))})" if missing else "")


def _by_seed(runs: Sequence[Finished], figure: str) -> dict[int, float]:
    return {run.run.seed: run.test[figure] for run in runs}


def _over_seeds(runs: Sequence[Finished], figure: str, show: Callable[[float], str] = percent) -> str:
    mean = mean_over_runs(_by_seed(runs, figure).values())
    return with_interval(mean.mean, mean.interval, show)


def _gradient_norms(logs: Iterable[pd.DataFrame]) -> str:
    """Median and range of the gradient norms in logs."""
    norms = pd.concat([log["grad_norm"] for log in logs])
    return f"{norms.median():.1f} ({norms.min():.1f} to {norms.max():.1f})"


def _flops(runs: Sequence[Finished]) -> float:
    return float(np.mean([compute(run.summary["cost"]) for run in runs]))


def _scored(runs: Iterable[Finished]) -> list[Finished]:
    return [run for run in runs if run.scores is not None]


def _longer(run: Finished) -> np.ndarray:
    """(n,) for each test pair 1 if its chosen text has more tokens, -1 if it has fewer, else 0."""
    return np.sign(run.scores["chosen_length"] - run.scores["rejected_length"]).to_numpy()


def _study_curve(section: Section) -> str:
    """The study's figures beside those of the first arm's first run."""
    runs = next(iter(section.finished.values()))
    if not runs:
        return _runs_table(section)
    head = ["", "the study: GPT-2 small, 144,720 pairs", f"here: {runs[0].pairs:,} pairs"]
    picture = f"![Four panels of the run]({section.link(runs[0].folder / output.PICTURE)})"
    return "\n\n".join([table(head, _course(runs[0].log)), picture, _runs_table(section)])


def _course(log: pd.DataFrame) -> list[list[str]]:
    """What the study reports, its steps as epochs of 36,180 (see findings.yaml), and what the log says of the same."""
    evals = log[log["eval_accuracy"].notna()]
    best, lowest = evals.loc[evals["eval_accuracy"].idxmax()], evals.loc[evals["eval_loss"].idxmin()]
    last = evals.iloc[-1]
    best_accuracy, lowest_loss = percent(best["eval_accuracy"]), decimals(lowest["eval_loss"])
    trained = f"{percent(last['train_probe_accuracy'])} (loss {last['train_probe_loss']:.2f}), in eval mode"
    gaps = [evals.iloc[(evals["epoch"] - epoch).abs().argmin()]["overfitting_gap"] for epoch in (1, 2, 3)]
    return [
        ["best eval accuracy", "65.75%, after 0.8 epochs", f"{best_accuracy}, after {best['epoch']:.1f} epochs"],
        ["best eval loss", "0.6359, after 0.8 epochs", f"{lowest_loss}, after {lowest['epoch']:.1f} epochs"],
        ["accuracy on training pairs at the end", "80% (loss 0.47)", trained],
        ["gap after epochs 1, 2, 3, in points", "about 0, about 5, about 18", ", ".join(map(points, gaps))],
        ["eval loss from its best to the end", "rises", f"{lowest_loss} to {decimals(last['eval_loss'])}"],
        ["gradient norm", "0.5 to over 60", f"{_gradient_norms([log])}, of the log's rows"],
    ]


def _comparison(section: Section) -> str:
    """Every arm of a plan against its first one, and the second pair by pair."""
    arms = section.plan.arms
    parts = [_table([_arm_row(section, arm) for arm in arms])]
    gained, lost = (_changes_to_draw(section, figure) for figure in (ACCURACY, LOSS))
    if gained:
        draw_comparison(gained, lost, arms[0].title, section.picture)
        parts += [f"![Points gained and change of loss by each arm]({section.link(section.picture)})"]
    parts += [_second_against_first(section)]
    for run in _scored(run for runs in section.finished.values() for run in runs)[:1]:
        parts += [
            f"On these test pairs always preferring the text of more tokens gets "
            f"{percent(pairwise_accuracy(_longer(run)))}; equal scores, loss {decimals(np.log(2))}."
        ]
    return "\n\n".join(part for part in [*parts, _runs_table(section)] if part)


def _change(section: Section, arm: Arm, figure: str) -> Mean | None:
    """Change of a figure against the first arm; None for that arm itself or without a common seed."""
    first = section.plan.arms[0]
    if arm is first:
        return None
    return difference(_by_seed(section.finished[arm.name], figure), _by_seed(section.finished[first.name], figure))


def _changes_to_draw(section: Section, figure: str) -> dict[str, Mean]:
    """By title, for the arms that have three seeds in common with the first one."""
    changes = {arm.title: _change(section, arm, figure) for arm in section.plan.arms}
    return {title: change for title, change in changes.items() if change and change.interval}


def _arm_row(section: Section, arm: Arm) -> Row:
    runs = section.finished[arm.name]
    if not runs:
        return {"against the first row": arm.title, "runs": _not_run(arm)}
    gained, lost = _change(section, arm, ACCURACY), _change(section, arm, LOSS)
    losses = [run.log["eval_loss"].dropna() for run in runs]
    lowest, last = (
        float(np.mean(ends)) for ends in zip(*((loss.min(), loss.iloc[-1]) for loss in losses), strict=True)
    )
    last_gap = float(np.mean([run.log["overfitting_gap"].dropna().iloc[-1] for run in runs]))
    return {
        "against the first row": arm.title,
        "runs": _count(arm, runs),
        "test accuracy": _over_seeds(runs, ACCURACY),
        "points gained": with_interval(gained.mean, gained.interval, points) if gained else UNKNOWN,
        "points / seeds' spread": _in_deviations(section, gained),
        "test loss": _over_seeds(runs, LOSS, decimals),
        "change of loss": with_interval(lost.mean, lost.interval, change_of_loss) if lost else UNKNOWN,
        "eval loss, best to last": span((lowest, last), decimals),
        "gap at the end, points": points(last_gap),
        "gradient norm (range)": _gradient_norms(run.log for run in runs),
        "FLOPs": power(_flops(runs)),
    }


def _in_deviations(section: Section, gained: Mean | None) -> str:
    """Accuracy gained, in standard deviations between the first arm's seeds."""
    if gained is None:
        return UNKNOWN
    baseline = section.finished[section.plan.arms[0].name]
    deviation = mean_over_runs(_by_seed(baseline, ACCURACY).values()).deviation
    return f"{gained.mean / deviation:+.1f}" if deviation else UNKNOWN


def _second_against_first(section: Section) -> str:
    """The second arm against the first on the very same test pairs, averaged over common seeds; empty without one."""
    names = [arm.name for arm in section.plan.arms[:2]]
    first, second = ({run.run.seed: run for run in _scored(section.finished[name])} for name in names)
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return ""
    theirs, ours = ([arm[seed] for seed in seeds] for arm in (first, second))
    both, prompts = margins([*ours, *theirs]), ours[0].scores["prompt_id"].to_numpy()
    after, before = both[: len(seeds)], both[len(seeds) :]
    gained = credit(after).mean(axis=0) - credit(before).mean(axis=0)
    lost = np.logaddexp(0, -after).mean(axis=0) - np.logaddexp(0, -before).mean(axis=0)
    ece = [percent(np.mean([run.test["test_ece"] for run in runs])) for runs in (ours, theirs)]
    return (
        f"`{names[1]}` against `{names[0]}` on the same {len(gained):,} test pairs (seeds: "
        f"{', '.join(map(str, seeds))}): **{with_interval(gained.mean(), bootstrap_interval(gained, prompts), points)} "
        f"points**, loss {with_interval(lost.mean(), bootstrap_interval(lost, prompts), change_of_loss)} (95% "
        f"intervals by test prompt; the table's are by seed), calibration error {ece[0]} against {ece[1]}, "
        f"{_flops(ours) / _flops(theirs):.2f} of the compute."
    )


def _learning_curve(section: Section) -> str:
    """Accuracy, agreement and preference for length by the number of pairs, and a line through all runs."""
    parts = [_table([_size_row(section, arm) for arm in section.plan.arms])]
    runs = [run for found in section.finished.values() for run in found]
    if len(runs) >= 3 and len({run.pairs for run in runs}) >= 2:
        curve = LearningCurve(np.array([run.pairs for run in runs]), np.array([run.test[ACCURACY] for run in runs]))
        longer = [pairwise_accuracy(_longer(run)) for run in _scored(runs)[:1]]
        draw_learning_curve(curve, longer, FULL_PAIRS, section.picture)
        parts += [_what_the_curve_says(curve, longer)]
        parts += [f"![Accuracy against training pairs]({section.link(section.picture)})"]
    return "\n\n".join([*parts, _runs_table(section)])


def _size_row(section: Section, arm: Arm) -> Row:
    runs = section.finished[arm.name]
    if not runs:
        return {"training pairs": arm.title, "runs": _not_run(arm)}
    row = {"training pairs": f"{runs[0].pairs:,}", "runs": _count(arm, runs)}
    row["test accuracy"] = _over_seeds(runs, ACCURACY)
    scored = _scored(runs)
    longer = float(np.mean([_chooses_longer(run) for run in scored])) if scored else None
    row["prefers the text of more tokens"] = percent(longer)
    row["seeds agree on"] = row["ensemble of the seeds"] = UNKNOWN
    if len(scored) > 1:
        right, prompts = credit(ensemble(margins(scored))), scored[0].scores["prompt_id"].to_numpy()
        row["seeds agree on"] = percent(agreement(margins(scored)))
        row["ensemble of the seeds"] = with_interval(right.mean(), bootstrap_interval(right, prompts))
    return row | {"test loss": _over_seeds(runs, LOSS, decimals)}


def _chooses_longer(run: Finished) -> float:
    """Share of the pairs of unequal length on which a run prefers the text with more tokens; a tie is half."""
    longer = _longer(run)
    return pairwise_accuracy((margins([run])[0] * longer)[longer != 0])


def _what_the_curve_says(curve: LearningCurve, longer: Sequence[float]) -> str:
    gain, *ends = curve.per_doubling
    mean, *reach = curve.at(FULL_PAIRS)
    said = [
        f"A straight line through the {len(curve.pairs)} runs gains {with_interval(gain, ends, points)} points for "
        f"each doubling of the pairs (95% interval, over runs on these test pairs). Drawn on to {FULL_PAIRS:,} pairs, "
        f"which nothing here tests, it says {with_interval(mean, reach)}."
    ]
    return " ".join(said + [f"Always preferring the text of more tokens: {percent(accuracy)}." for accuracy in longer])


def _full(section: Section) -> str:
    """What each run of the full scale is expected to take, and what it found."""
    rows = []
    for arm in section.plan.arms:
        flops, runs = arm.expected_flops, section.finished[arm.name]
        row = {
            "run": arm.title,
            "FLOPs of training": power(flops) if flops else UNKNOWN,
            f"minutes at {power(ASSUMED_FLOPS)} FLOP/s": f"{flops / ASSUMED_FLOPS / 60:,.0f}" if flops else UNKNOWN,
            "test accuracy": _over_seeds(runs, ACCURACY) if runs else _not_run(arm),
        }
        rows.append(row)
    return f"{_table(rows)}\n\n{_runs_table(section)}"


TABLES: Mapping[str, Callable[[Section], str]] = {
    "study_curve": _study_curve,
    "recommendations": _comparison,
    "known_answer": _comparison,
    "learning_curve": _learning_curve,
    "full": _full,
}
