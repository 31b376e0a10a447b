"""The tables and sentences of RESULTS.md, one function for each plan, from its collected runs."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from across_seeds import (
    LearningCurve,
    Mean,
    agreement,
    compute,
    difference,
    ensemble,
    fit_learning_curve,
    mean_over_runs,
)
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

LINKS = {"log": output.LOG, "picture": output.PICTURE, "figures": output.TEST_METRICS, "scores": output.TEST_SCORES}
LINKS |= {"evaluation": output.EVALUATION_PAGE, "command": RUN}
ASSUMED_FLOPS = 1e14  # a second, of the devices that minutes are estimated for
FULL_PAIRS = 144_720  # nine tenths of HH-RLHF's training pairs
# What the study reports, its steps as epochs of 36,180; see recipes/gpt2-small/hh-rlhf/findings.yaml.
STUDY = {
    "best eval accuracy": "65.75%, after 0.8 epochs",
    "best eval loss": "0.6359, after 0.8 epochs",
    "accuracy on training pairs at the end": "80% (loss 0.47)",
    "gap after epochs 1, 2, 3, in points": "about 0, about 5, about 18",
    "eval loss from its best to the end": "rises",
    "gradient norm": "0.5 to over 60",
}


def _runs_table(section: Section) -> str:
    """What every run of a section used and gave."""
    command = f"`python recipes/reproduce/reproduce.py --plan {section.path.as_posix()}`"
    head = ["run", "pairs", "best step", "test accuracy (95% interval)", "test loss", "calibration error"]
    head += ["FLOPs", "minutes", "commit", "device", "files"]
    rows = [_run_row(section, run) for runs in section.finished.values() for run in runs]
    if not rows:
        return f"No run yet: {command}"
    return f"{command}\n\n<details><summary>Each run: figures and files</summary>\n\n{table(head, rows)}\n\n</details>"


def _run_row(section: Section, run: Finished) -> list[str]:
    cost, test = run.summary["cost"], run.test
    row = [f"`{run.run.name}`", f"{run.pairs:,}", f"{run.summary['kept_step']:,}"]
    row += [with_interval(test["test_accuracy"], test["test_accuracy_ci95"]), decimals(test["test_loss"])]
    row += [percent(test["test_ece"]), power(compute(cost))]
    row += [UNKNOWN if cost["seconds"] is None else f"{cost['seconds'] / 60:,.0f}"]
    row += [run.summary["commit"] or UNKNOWN, run.summary["device"]]
    files = {name: run.folder / file for name, file in LINKS.items()}
    return [*row, ", ".join(f"[{name}]({section.link(file)})" for name, file in files.items() if file.is_file())]


def _not_run(arm: Arm) -> str:
    return f"not run (`--only {arm.name}`)"


def _count(arm: Arm, runs: Sequence[Finished]) -> str:
    """How many seeds were run, and which were not."""
    missing = sorted(set(arm.seeds) - {run.run.seed for run in runs})
    return str(len(runs)) + (f" (not run: {', '.join(map(str, missing))})" if missing else "")


def _study_curve(section: Section) -> str:
    runs = next(iter(section.finished.values()))
    if not runs:
        return _runs_table(section)
    head = ["", "the study: GPT-2 small, 144,720 pairs", f"here: {runs[0].pairs:,} pairs"]
    rows = [[name, theirs, ours] for (name, theirs), ours in zip(STUDY.items(), _course(runs[0].log), strict=True)]
    picture = f"![Four panels of the run]({section.link(runs[0].folder / output.PICTURE)})"
    return "\n\n".join([table(head, rows), picture, _runs_table(section)])


def _course(log: pd.DataFrame) -> list[str]:
    """What the log says of each of `STUDY`'s figures."""
    evals = log[log["eval_accuracy"].notna()]
    accuracy, loss = evals.loc[evals["eval_accuracy"].idxmax()], evals.loc[evals["eval_loss"].idxmin()]
    last = evals.iloc[-1]
    gaps = [evals.iloc[(evals["epoch"] - epoch).abs().argmin()]["overfitting_gap"] for epoch in (1, 2, 3)]
    return [
        f"{percent(accuracy['eval_accuracy'])}, after {accuracy['epoch']:.1f} epochs",
        f"{decimals(loss['eval_loss'])}, after {loss['epoch']:.1f} epochs",
        f"{percent(last['train_probe_accuracy'])} (loss {last['train_probe_loss']:.2f}), in eval mode",
        ", ".join(points(gap) for gap in gaps),
        f"{decimals(loss['eval_loss'])} to {decimals(last['eval_loss'])}",
        f"{_norms([log])}, of the log's rows",
    ]


def _norms(logs: Iterable[pd.DataFrame]) -> str:
    """Median and range of the gradient norms in logs."""
    norms = pd.concat([log["grad_norm"] for log in logs])
    return f"{norms.median():.1f} ({norms.min():.1f} to {norms.max():.1f})"


def _comparison(section: Section) -> str:
    """Every arm of a plan against its first one, and the second pair by pair."""
    head = ["against the first row", "runs", "test accuracy", "points gained", "points / seeds' spread"]
    head += ["test loss", "change of loss", "eval loss, best to last", "gap at the end, points"]
    head += ["gradient norm (range)", "FLOPs"]
    rows = [_arm_row(section, arm) for arm in section.plan.arms]
    scored = [run for runs in section.finished.values() for run in _scored(runs)]
    parts = [table(head, rows), _comparison_picture(section), _against_baseline(section)]
    parts += [*map(_knowing_nothing, scored[:1]), _runs_table(section)]
    return "\n\n".join(part for part in parts if part)


def _comparison_picture(section: Section) -> str:
    """Drawn, and its link, once an arm besides the first has three seeds in common with it."""
    changes = {arm.title: _changes(section, arm) for arm in section.plan.arms}
    known = {title: change for title, change in changes.items() if change and change[0].interval}
    if not known:
        return ""
    draw_comparison(known, section.plan.arms[0].title, section.picture)
    return f"![Points gained and change of loss by each arm]({section.link(section.picture)})"


def _knowing_nothing(run: Finished) -> str:
    return (
        f"On these test pairs always preferring the text of more tokens gets {percent(_longer(run))}; equal scores, "
        f"loss {decimals(np.log(2))}."
    )


def _longer(run: Finished) -> float:
    """Accuracy of always preferring the text with more tokens."""
    return pairwise_accuracy((run.scores["chosen_length"] - run.scores["rejected_length"]).to_numpy())


def _chooses_longer(run: Finished) -> float:
    """Share of the pairs of unequal length on which a run prefers the text with more tokens; a tie is half."""
    longer = np.sign(run.scores["chosen_length"] - run.scores["rejected_length"]).to_numpy()
    return pairwise_accuracy((margins([run])[0] * longer)[longer != 0])


def _by_seed(runs: Sequence[Finished], figure: str) -> dict[int, float]:
    return {run.run.seed: run.test[figure] for run in runs}


def _over_seeds(runs: Sequence[Finished], figure: str, show: Callable[[float], str] = percent) -> str:
    mean = mean_over_runs(_by_seed(runs, figure).values())
    return with_interval(mean.mean, mean.interval, show)


def _arm_row(section: Section, arm: Arm) -> list[str]:
    runs = section.finished[arm.name]
    if not runs:
        return [arm.title, _not_run(arm), *[UNKNOWN] * 9]
    gained, spreads, lost = _change_cells(section, arm)
    row = [arm.title, _count(arm, runs), _over_seeds(runs, "test_accuracy"), gained, spreads]
    row += [_over_seeds(runs, "test_loss", decimals), lost, _rise(runs)]
    row += [points(_last([run.log["overfitting_gap"] for run in runs]))]
    return [*row, _norms(run.log for run in runs), power(_flops(runs))]


def _rise(runs: Sequence[Finished]) -> str:
    """Means over runs of the lowest and of the last loss on held-out pairs."""
    losses = [run.log["eval_loss"] for run in runs]
    return span((float(np.mean([loss.min() for loss in losses])), _last(losses)), decimals)


def _last(columns: Sequence[pd.Series]) -> float:
    """Mean of the columns' last figures."""
    return float(np.mean([column.dropna().iloc[-1] for column in columns]))


def _flops(runs: Sequence[Finished]) -> float:
    return float(np.mean([compute(run.summary["cost"]) for run in runs]))


def _changes(section: Section, arm: Arm) -> tuple[Mean, Mean] | None:
    """Accuracy gained on the first arm, and the change of loss; None for that arm itself or without a common seed."""
    first = section.plan.arms[0]
    runs, baseline = section.finished[arm.name], [] if arm is first else section.finished[first.name]
    gained = difference(_by_seed(runs, "test_accuracy"), _by_seed(baseline, "test_accuracy"))
    lost = difference(_by_seed(runs, "test_loss"), _by_seed(baseline, "test_loss"))
    return None if gained is None or lost is None else (gained, lost)


def _change_cells(section: Section, arm: Arm) -> tuple[str, str, str]:
    """Points gained, the same in standard deviations between the first arm's seeds, and the change of loss."""
    if (changes := _changes(section, arm)) is None:
        return UNKNOWN, UNKNOWN, UNKNOWN
    gained, lost = changes
    deviation = mean_over_runs(
        _by_seed(section.finished[section.plan.arms[0].name], "test_accuracy").values()
    ).deviation
    return (
        with_interval(gained.mean, gained.interval, points),
        f"{gained.mean / deviation:+.1f}" if deviation else UNKNOWN,
        with_interval(lost.mean, lost.interval, "{:+.4f}".format),
    )


def _against_baseline(section: Section) -> str:
    """The second arm against the first on the very same test pairs, averaged over common seeds."""
    if len(section.plan.arms) == 1:
        return ""
    theirs_name, ours_name = (arm.name for arm in section.plan.arms[:2])
    arms = [{run.run.seed: run for run in _scored(section.finished[name])} for name in (ours_name, theirs_name)]
    seeds = sorted(arms[0].keys() & arms[1].keys())
    if not seeds:
        return ""
    ours, theirs = ([arm[seed] for seed in seeds] for arm in arms)
    both, prompts = margins([*ours, *theirs]), ours[0].scores["prompt_id"].to_numpy()
    gained, lost = (_mean_change(of_pairs, len(seeds)) for of_pairs in (credit(both), np.logaddexp(0, -both)))
    ece = " against ".join(percent(np.mean([run.test["test_ece"] for run in runs])) for runs in (ours, theirs))
    return (
        f"`{ours_name}` against `{theirs_name}` on the same {len(gained):,} test pairs (seeds: "
        f"{', '.join(map(str, seeds))}): **{with_interval(gained.mean(), bootstrap_interval(gained, prompts), points)} "
        f"points**, loss {with_interval(lost.mean(), bootstrap_interval(lost, prompts), '{:+.4f}'.format)} (95% "
        f"intervals by test prompt; the table's are by seed), calibration error {ece}, "
        f"{_flops(ours) / _flops(theirs):.2f} of the compute."
    )


def _mean_change(figures: np.ndarray, ours: int) -> np.ndarray:
    """(n,) differences of the first `ours` rows' mean and the others' mean, of one figure (runs, n) a pair."""
    return figures[:ours].mean(axis=0) - figures[ours:].mean(axis=0)


def _scored(runs: Iterable[Finished]) -> list[Finished]:
    return [run for run in runs if run.scores is not None]


def _learning_curve(section: Section) -> str:
    head = ["training pairs", "runs", "test accuracy", "prefers the text of more tokens", "seeds agree on"]
    head += ["ensemble of the seeds", "test loss"]
    parts = [table(head, [_size_row(section, arm) for arm in section.plan.arms])]
    runs = [run for found in section.finished.values() for run in found]
    if len(runs) >= 3 and len({run.pairs for run in runs}) >= 2:
        longer = [_longer(run) for run in _scored(runs)[:1]]
        curve = fit_learning_curve([run.pairs for run in runs], [run.test["test_accuracy"] for run in runs])
        tested = [(run.pairs, run.test["test_accuracy"]) for run in runs]
        draw_learning_curve(curve, tested, longer, FULL_PAIRS, section.picture)
        parts += [_what_the_curve_says(curve, len(runs), longer)]
        parts += [f"![Accuracy against training pairs]({section.link(section.picture)})"]
    return "\n\n".join([*parts, _runs_table(section)])


def _size_row(section: Section, arm: Arm) -> list[str]:
    runs = section.finished[arm.name]
    if not runs:
        return [arm.title, _not_run(arm), *[UNKNOWN] * 5]
    row = [f"{runs[0].pairs:,}", _count(arm, runs), _over_seeds(runs, "test_accuracy")]
    row += [percent(float(np.mean([_chooses_longer(run) for run in _scored(runs)])) if _scored(runs) else None)]
    return [*row, *_together(_scored(runs)), _over_seeds(runs, "test_loss", decimals)]


def _together(runs: Sequence[Finished]) -> tuple[str, str]:
    """How often two seeds agree, and the accuracy of their ensemble."""
    if len(runs) < 2:
        return UNKNOWN, UNKNOWN
    right = credit(ensemble(margins(runs)))
    interval = bootstrap_interval(right, runs[0].scores["prompt_id"].to_numpy())
    return percent(agreement(margins(runs))), with_interval(right.mean(), interval)


def _what_the_curve_says(curve: LearningCurve, runs: int, longer: Sequence[float]) -> str:
    gain, *ends = curve.per_doubling
    mean, *reach = curve.at(FULL_PAIRS)
    said = [
        f"A straight line through the {runs} runs gains {with_interval(gain, ends, points)} points for each doubling "
        f"of the pairs (95% interval, over runs on these test pairs). Drawn on to {FULL_PAIRS:,} pairs, which nothing "
        f"here tests, it says {with_interval(mean, reach)}.",
        *(f"Always preferring the text of more tokens: {percent(accuracy)}." for accuracy in longer),
    ]
    if curve.ceilings is not None:
        low, high = map(percent, curve.ceilings)
        said += [
            f"A power law that levels off fits these runs with any ceiling from {low} to {high} (F test, 5% level)."
        ]
    return " ".join(said)


def _full(section: Section) -> str:
    head = ["run", "FLOPs of training", f"minutes at {power(ASSUMED_FLOPS)} FLOP/s", "test accuracy"]
    rows = []
    for arm in section.plan.arms:
        flops, runs = arm.expected_flops, section.finished[arm.name]
        expected = [UNKNOWN, UNKNOWN] if flops is None else [power(flops), f"{flops / ASSUMED_FLOPS / 60:,.0f}"]
        found = _over_seeds(runs, "test_accuracy") if runs else _not_run(arm)
        rows.append([arm.title, *expected, found])
    return f"{table(head, rows)}\n\n{_runs_table(section)}"


TABLES: Mapping[str, Callable[[Section], str]] = {
    "study_curve": _study_curve,
    "recommendations": _comparison,
    "known_answer": _comparison,
    "learning_curve": _learning_curve,
    "full": _full,
}
