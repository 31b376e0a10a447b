"""The tables, sentences and picture of RESULTS.md, one function for each plan, from its collected runs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from reward_recipes import output
from reward_recipes.collected import Finished, Section
from reward_recipes.files import replacing
from reward_recipes.markdown import UNKNOWN, decimals, percent, points, power, table
from reward_recipes.reproduce import Arm
from reward_recipes.run_statistics import (
    LearningCurve,
    Mean,
    agreement,
    compute,
    difference,
    ensemble,
    fit_learning_curve,
    length_only,
    mean_over_runs,
)
from reward_recipes.uncertainty import bootstrap_interval, credit

NOT_RUN = "not run"
BASELINE, RECOMMENDED = "findings", "one_epoch"
CURVE_PICTURE = "learning_curve.png"
ASSUMED_FLOPS = 1e14  # a second, of the devices that hours are estimated for
FULL_PAIRS = 144_720  # nine tenths of HH-RLHF's training pairs
# What the study reports: best accuracy and loss and their steps, of 36,180 an epoch; see recipes/.../findings.yaml.
STUDY_EPOCH = 36_180
STUDY = {"accuracy": (0.6575, 29_500), "loss": (0.6359, 29_000), "train": (0.80, 0.47), "gaps": (0.0, 0.05, 0.18)}


def _runs_table(section: Section, page: Path) -> str:
    """What every run of a section used and gave."""
    head = ["run", "pairs", "best step", "test accuracy (95% interval)", "test loss", "calibration error"]
    head += ["FLOPs", "minutes", "commit", "device", "files"]
    rows = [_run_row(run, page) for runs in section.finished.values() for run in runs]
    return f"{section.command}\n\n{table(head, rows)}" if rows else f"No run yet: {section.command}"


def _not_run(arm: Arm) -> str:
    return f"{NOT_RUN} (`--only {arm.name}`)"


def _run_row(run: Finished, page: Path) -> list[str]:
    cost, interval = run.summary["cost"], run.test["test_accuracy_ci95"]
    minutes = UNKNOWN if cost["seconds"] is None else f"{cost['seconds'] / 60:,.0f}"
    accuracy = f"{percent(run.test['test_accuracy'])} ({percent(interval[0])} to {percent(interval[1])})"
    figures = [accuracy, decimals(run.test["test_loss"]), percent(run.test["test_ece"]), power(compute(cost)), minutes]
    made = [run.summary["commit"] or UNKNOWN, run.summary["device"], run.files(page)]
    return [f"`{run.run.name}`", f"{run.pairs:,}", f"{run.summary['kept_step']:,}", *figures, *made]


def _study_curve(section: Section, page: Path) -> str:
    runs = section.finished[BASELINE]
    if not runs:
        return _runs_table(section, page)
    run = runs[0]
    head = ["", "the study: GPT-2 small, 144,720 pairs", f"here: {run.pairs:,} pairs"]
    rows = [[name, theirs, ours] for (name, theirs), ours in zip(_study_rows(), _our_rows(run), strict=True)]
    picture = (run.folder / output.PICTURE).relative_to(page.parent).as_posix()
    return "\n\n".join([table(head, rows), f"![Four panels of the run]({picture})", _runs_table(section, page)])


def _study_rows() -> list[tuple[str, str]]:
    accuracy, step = STUDY["accuracy"]
    loss, loss_step = STUDY["loss"]
    trained, trained_loss = STUDY["train"]
    return [
        ("best eval accuracy", f"{percent(accuracy)}, after {step / STUDY_EPOCH:.1f} epochs"),
        ("best eval loss", f"{decimals(loss)}, after {loss_step / STUDY_EPOCH:.1f} epochs"),
        ("accuracy on training pairs at the end", f"{percent(trained)} (loss {trained_loss})"),
        ("gap after epochs 1, 2, 3, in points", ", ".join(f"about {100 * gap:.0f}" for gap in STUDY["gaps"])),
        ("eval loss from its best to the end", "rises"),
        ("gradient norm", "0.5 to over 60"),
    ]


def _our_rows(run: Finished) -> list[str]:
    log = run.log
    evals = log[log["eval_accuracy"].notna()]
    accuracy, loss = evals.loc[evals["eval_accuracy"].idxmax()], evals.loc[evals["eval_loss"].idxmin()]
    last, norms = evals.iloc[-1], log["grad_norm"]
    gaps = [evals.iloc[(evals["epoch"] - epoch).abs().argmin()]["overfitting_gap"] for epoch in (1, 2, 3)]
    return [
        f"{percent(accuracy['eval_accuracy'])}, after {accuracy['epoch']:.1f} epochs",
        f"{decimals(loss['eval_loss'])}, after {loss['epoch']:.1f} epochs",
        f"{percent(last['train_probe_accuracy'])} (loss {last['train_probe_loss']:.2f}), in eval mode",
        ", ".join(points(gap) for gap in gaps),
        f"{decimals(loss['eval_loss'])} to {decimals(last['eval_loss'])}",
        f"{norms.min():.1f} to {norms.max():.1f} on the {len(log)} rows of the log",
    ]


def _recommendations(section: Section, page: Path) -> str:
    head = ["against the study's setting", "runs", "test accuracy", "points gained", "points / seeds' spread"]
    head += ["test loss", "change of loss", "gradient norm", "FLOPs"]
    rows = [_arm_row(section, arm) for arm in section.plan.arms]
    parts = [table(head, rows), _against_baseline(section), _runs_table(section, page)]
    return "\n\n".join(part for part in parts if part)


def _by_seed(runs: Sequence[Finished], figure: str) -> dict[int, float]:
    return {run.run.seed: run.test[figure] for run in runs}


def _arm_row(section: Section, arm: Arm) -> list[str]:
    runs, baseline = section.finished[arm.name], section.finished[BASELINE]
    if not runs:
        return [arm.title, _not_run(arm), *[UNKNOWN] * 7]
    accuracy = _by_seed(runs, "test_accuracy")
    norms = pd.concat([run.log["grad_norm"] for run in runs])
    cells = [_spread(mean_over_runs(list(accuracy.values())), percent), *_gain(runs, baseline, arm)]
    loss = _spread(mean_over_runs(list(_by_seed(runs, "test_loss").values())), decimals)
    lost = None if arm.name == BASELINE else difference(_by_seed(runs, "test_loss"), _by_seed(baseline, "test_loss"))
    cells += [loss, UNKNOWN if lost is None else _spread(lost, "{:+.4f}".format)]
    cells += [f"{norms.min():.1f} to {norms.max():.1f}"]
    return [arm.title, str(len(runs)), *cells, power(np.mean([compute(run.summary["cost"]) for run in runs]))]


def _gain(runs: Sequence[Finished], baseline: Sequence[Finished], arm: Arm) -> list[str]:
    """Points gained over the baseline, and how many standard deviations between its seeds that is."""
    known = _by_seed(baseline, "test_accuracy")
    gained = None if arm.name == BASELINE else difference(_by_seed(runs, "test_accuracy"), known)
    if gained is None:
        return [UNKNOWN, UNKNOWN]
    deviation = mean_over_runs(list(known.values())).deviation
    return [_spread(gained, points), f"{gained.mean / deviation:+.1f}" if deviation else UNKNOWN]


def _spread(mean: Mean, show: Callable[[float | None], str]) -> str:
    """A mean with its interval, ends in order."""
    if mean.low is None:
        return show(mean.mean)
    low, high = sorted((show(mean.low), show(mean.high)), key=lambda text: float(text.strip("%")))
    return f"{show(mean.mean)} ({low} to {high})"


def _against_baseline(section: Section) -> str:
    """The recommended recipe against the study's on the very same test pairs, averaged over common seeds."""
    ours = {run.run.seed: run for run in section.finished[RECOMMENDED]}
    theirs = {run.run.seed: run for run in section.finished[BASELINE]}
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return ""
    gained = np.mean([credit(ours[seed].margin) - credit(theirs[seed].margin) for seed in seeds], axis=0)
    low, high = bootstrap_interval(gained, ours[seeds[0]].scores["prompt_id"].to_numpy())
    flops = [np.mean([compute(runs[seed].summary["cost"]) for seed in seeds]) for runs in (ours, theirs)]
    ece = [np.mean([runs[seed].test["test_ece"] for seed in seeds]) for runs in (ours, theirs)]
    return (
        f"`{RECOMMENDED}` against `{BASELINE}` on the same {len(gained):,} test pairs, means of {len(seeds)} seeds: "
        f"**{points(gained.mean())} points** (95% interval by test prompt {points(low)} to {points(high)}; the "
        f"table's interval is by seed), calibration error {percent(ece[0])} against {percent(ece[1])}, "
        f"**{flops[0] / flops[1]:.2f} of the compute**."
    )


def _learning_curve(section: Section, page: Path) -> str:
    arms = {arm: runs for arm, runs in section.finished.items() if runs}
    head = ["training pairs", "runs", "test accuracy", "seeds agree on", "ensemble of the seeds", "test loss"]
    rows = [_size_row(section, arm) for arm in section.plan.arms]
    parts = [table(head, rows)]
    runs = [run for found in arms.values() for run in found]
    if len(runs) >= 3 and len(arms) >= 2:
        curve = fit_learning_curve([run.pairs for run in runs], [run.test["test_accuracy"] for run in runs])
        _draw_curve(curve, runs, section.results_dir / CURVE_PICTURE)
        picture = (section.results_dir / CURVE_PICTURE).relative_to(page.parent).as_posix()
        parts += [_what_the_curve_says(curve, runs), f"![Accuracy against training pairs]({picture})"]
    return "\n\n".join([*parts, _runs_table(section, page)])


def _size_row(section: Section, arm: Arm) -> list[str]:
    runs = section.finished[arm.name]
    if not runs:
        return [arm.title, _not_run(arm), *[UNKNOWN] * 4]
    accuracy = mean_over_runs(list(_by_seed(runs, "test_accuracy").values()))
    loss = mean_over_runs(list(_by_seed(runs, "test_loss").values()))
    together = [UNKNOWN, UNKNOWN]
    if len(runs) > 1:
        margins = np.stack([run.margin for run in runs])
        right = credit(ensemble(margins))
        low, high = bootstrap_interval(right, runs[0].scores["prompt_id"].to_numpy())
        together = [percent(agreement(margins)), f"{percent(right.mean())} ({percent(low)} to {percent(high)})"]
    return [f"{runs[0].pairs:,}", str(len(runs)), _spread(accuracy, percent), *together, _spread(loss, decimals)]


def _what_the_curve_says(curve: LearningCurve, runs: Sequence[Finished]) -> str:
    scores = runs[0].scores
    longer = percent(length_only(scores["chosen_length"], scores["rejected_length"]))
    gain, low, high = curve.per_doubling
    mean, least, most = curve.at(FULL_PAIRS)
    said = (
        f"A straight line through the {len(runs)} runs gains {points(gain)} points for each doubling of the pairs (95% "
        f"interval {points(low)} to {points(high)}). Drawn on to {FULL_PAIRS:,} pairs, which nothing here tests, it "
        f"says {percent(mean)} ({percent(least)} to {percent(most)}). Always preferring the longer reply: {longer}."
    )
    if curve.ceilings is None:
        return said
    return (
        f"{said} A power law that levels off fits these runs equally well (5% level) with any ceiling from "
        f"{percent(curve.ceilings[0])} to {percent(curve.ceilings[1])}."
    )


def _draw_curve(curve: LearningCurve, runs: Sequence[Finished], path: Path) -> None:
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    sizes = np.array([run.pairs for run in runs])
    along = np.geomspace(sizes.min(), FULL_PAIRS, 60)
    mean, low, high = np.array([curve.at(pairs) for pairs in along]).T
    axes.fill_between(along, low, high, color="#0072B2", alpha=0.15, linewidth=0, label="its 95% interval")
    axes.plot(along, mean, color="#0072B2", label="line in log(pairs), fitted")
    axes.plot(sizes, [run.test["test_accuracy"] for run in runs], "o", color="#D55E00", label="one run")
    scores = runs[0].scores
    longer = length_only(scores["chosen_length"], scores["rejected_length"])
    axes.axhline(longer, color="0.3", linestyle="--", linewidth=1.1, label="always the longer reply")
    axes.axvspan(sizes.max(), FULL_PAIRS, color="0.95", zorder=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_xlabel("training pairs (grey: beyond the runs)")
    axes.set_ylabel("test accuracy")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(edgecolor="none", fontsize=8.5, loc="upper left")
    with replacing(path) as partial:
        figure.savefig(partial, format="png", metadata={"Software": None})


def _full(section: Section, page: Path) -> str:
    head = ["run", "FLOPs of training", f"minutes at {power(ASSUMED_FLOPS)} FLOP/s", "test accuracy"]
    rows = []
    for arm in section.plan.arms:
        flops, runs = arm.expected_flops, section.finished[arm.name]
        expected = [UNKNOWN, UNKNOWN] if flops is None else [power(flops), f"{flops / ASSUMED_FLOPS / 60:,.0f}"]
        found = _not_run(arm)
        if runs:
            found = _spread(mean_over_runs(list(_by_seed(runs, "test_accuracy").values())), percent)
        rows.append([arm.title, *expected, found])
    return f"{table(head, rows)}\n\n{_runs_table(section, page)}"


TABLES: Mapping[str, Callable[[Section, Path], str]] = {
    "study_curve": _study_curve,
    "recommendations": _recommendations,
    "learning_curve": _learning_curve,
    "full": _full,
}
