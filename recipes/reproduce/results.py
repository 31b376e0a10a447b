"""What the collected runs show, on one page: refills RESULTS.md, and `results/runs.csv` with a row for each run.

Run it as `python recipes/reproduce/results.py` in the repository's root. Every figure between `<!-- begin NAME -->` and
`<!-- end NAME -->` comes from the files in `results/NAME/`, one folder a run of `recipes/reproduce/NAME.yaml`; a run of
the plan without a folder is "not run". The text around stays as it is.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from collected import RESULTS, RUNS, Estimate, agreement, learning_curve, margins, mean_over_runs, read_pairs, read_runs
from plan import Arm, Plan, read_plan
from result_pictures import draw_comparison, draw_learning_curve

from reward_recipes.evaluate import (
    LONGER,
    UNKNOWN,
    bootstrap_interval,
    credit,
    decimals,
    pairwise_accuracy,
    percent,
    points,
    read_log,
    table,
    with_interval,
)
from reward_recipes.run import expect, output, replacing, run_cli

PAGE = Path("RESULTS.md")
ACCURACY, LOSS = "test_accuracy", "test_loss"
ASSUMED_FLOPS = 1e14  # a second, of the devices that minutes are estimated for
FULL_PAIRS = 144_720  # nine tenths of HH-RLHF's training pairs
change_of_loss = "{:+.4f}".format


def _table(rows: Iterable[dict[str, str]]) -> str:
    """A column for each heading; a row without such a cell has a dash there. Empty without rows."""
    frame = pd.DataFrame(rows).fillna(UNKNOWN)
    return "" if frame.empty else table(list(frame), frame.to_numpy().tolist())


def _block(plan: Plan, runs: pd.DataFrame, parts: Iterable[str]) -> str:
    """The parts that there are; below them where each run's figures and files stand, and what was not run."""
    found = f"Each run: `{plan.name}` in [{RUNS.name}]({RUNS.as_posix()})" if len(runs) else "No run yet"
    missing = [f"`{arm.name}`" for arm in plan.arms if _of(arm, runs).empty]
    said = f"{found}. Command: `make reproduce PLAN=recipes/reproduce/{plan.name}.yaml`."
    said += f" Not run: {', '.join(missing)}." if missing else ""
    return "\n\n".join(part for part in [*parts, said] if part)


def _of(arm: Arm, table: pd.DataFrame) -> pd.DataFrame:
    return table[table["arm"] == arm.name]


def _count(arm: Arm, runs: pd.DataFrame) -> str:
    """How many seeds were run, and which were not."""
    missing = sorted(set(arm.seeds) - set(runs["seed"]))
    return str(len(runs)) + (f" (not run: {', '.join(map(str, missing))})" if missing else "")


def _over_seeds(runs: pd.DataFrame, figure: str, show: Callable[[float], str] = percent) -> str:
    return with_interval(*mean_over_runs(runs[figure]), show)


def _bootstrapped(values: np.ndarray, of: pd.DataFrame, show: Callable[[float], str] = percent) -> str:
    """Mean of (n,) values of the test pairs in the rows of `of`, with its interval by prompt."""
    prompts = of.index.get_level_values("prompt_id").to_numpy()
    return with_interval(values.mean(), bootstrap_interval(values, prompts), show)


def _study_curve(plan: Plan, runs: pd.DataFrame) -> str:
    """The study's figures beside those of the plan's first run."""
    if runs.empty:
        return _block(plan, runs, [])
    run = runs.iloc[0]
    head = ["", "the study: GPT-2 small, 144,720 pairs", f"here: {run['pairs']:,} pairs"]
    course = table(head, _course(read_log(run["folder"] / output.LOG)))
    return _block(plan, runs, [course, f"![Four panels of the run]({(run['folder'] / output.PICTURE).as_posix()})"])


def _course(log: pd.DataFrame) -> list[list[str]]:
    """What the study reports, its steps as epochs of 36,180 (see findings.yaml), and what the log says of the same."""
    evals = log[log["eval_accuracy"].notna()]
    best, lowest = evals.loc[evals["eval_accuracy"].idxmax()], evals.loc[evals["eval_loss"].idxmin()]
    last = evals.iloc[-1]
    best_accuracy, lowest_loss = percent(best["eval_accuracy"]), decimals(lowest["eval_loss"])
    trained = f"{percent(last['train_probe_accuracy'])} (loss {last['train_probe_loss']:.2f}), in eval mode"
    norm = log["grad_norm"]
    norms = f"median {norm.median():.1f}, {norm.min():.1f} to {norm.max():.1f} in the log's rows"
    gaps = [evals.iloc[(evals["epoch"] - epoch).abs().argmin()]["overfitting_gap"] for epoch in (1, 2, 3)]
    return [
        ["best eval accuracy", "65.75%, after 0.8 epochs", f"{best_accuracy}, after {best['epoch']:.1f} epochs"],
        ["best eval loss", "0.6359, after 0.8 epochs", f"{lowest_loss}, after {lowest['epoch']:.1f} epochs"],
        ["accuracy on training pairs at the end", "80% (loss 0.47)", trained],
        ["gap after epochs 1, 2, 3, in points", "about 0, about 5, about 18", ", ".join(map(points, gaps))],
        ["eval loss from its best to the end", "rises", f"{lowest_loss} to {decimals(last['eval_loss'])}"],
        ["gradient norm", "0.5 to over 60", norms],
    ]


def _comparison(plan: Plan, runs: pd.DataFrame) -> str:
    """Every arm of a plan against its first one, and the second pair by pair."""
    first, *others = plan.arms
    changes = {arm.title: [_change(arm, first, runs, figure) for figure in (ACCURACY, LOSS)] for arm in others}
    parts = [_table(_arm_row(arm, own, *changes.get(arm.title, (None, None))) for arm, own in _ran(plan, runs))]
    drawn = {title: change for title, change in changes.items() if change[0] and change[0].interval}
    if drawn:
        picture = RESULTS / f"{plan.name}.png"
        draw_comparison(drawn, first.title, picture)
        parts.append(f"![Points gained and change of loss by each setting]({picture.as_posix()})")
    if len(runs):
        pairs = read_pairs(runs)
        longer = percent(pairwise_accuracy(pairs["longer"]))
        parts.append(_second_against_first(plan, runs, pairs))
        parts.append(f"On these test pairs {LONGER}: {longer}. Loss of equal scores: {decimals(np.log(2))}.")
    return _block(plan, runs, parts)


def _ran(plan: Plan, runs: pd.DataFrame) -> list[tuple[Arm, pd.DataFrame]]:
    """The arms that were run, each with its runs."""
    return [(arm, own) for arm in plan.arms if len(own := _of(arm, runs))]


def _change(arm: Arm, first: Arm, runs: pd.DataFrame, figure: str) -> Estimate | None:
    """Change of a figure against the first arm over common seeds, since a seed stands for the same pairs in both."""
    ours, theirs = (_of(each, runs).set_index("seed")[figure] for each in (arm, first))
    changes = (ours - theirs).dropna()
    return None if changes.empty else mean_over_runs(changes)


def _arm_row(arm: Arm, own: pd.DataFrame, gained: Estimate | None, lost: Estimate | None) -> dict[str, str]:
    return {
        "setting": arm.title,
        "runs": _count(arm, own),
        "test accuracy": _over_seeds(own, ACCURACY),
        "points gained": with_interval(*gained, points) if gained else UNKNOWN,
        "test loss": _over_seeds(own, LOSS, decimals),
        "change of loss": with_interval(*lost, change_of_loss) if lost else UNKNOWN,
    }


def _second_against_first(plan: Plan, runs: pd.DataFrame, pairs: pd.DataFrame) -> str:
    """The second arm against the first on the very same test pairs, averaged over common seeds; empty without one."""
    first, second = plan.arms[:2]
    seeds = sorted(set(_of(first, runs)["seed"]) & set(_of(second, runs)["seed"]))
    if not seeds:
        return ""
    common = pairs[pairs["seed"].isin(seeds) & pairs["arm"].isin([first.name, second.name])]
    both = margins(common)
    before, after = (both[arm.name].to_numpy() for arm in (first, second))
    gained = credit(after).mean(axis=1) - credit(before).mean(axis=1)
    lost = np.logaddexp(0, -after).mean(axis=1) - np.logaddexp(0, -before).mean(axis=1)
    theirs, ours = (_of(arm, runs[runs["seed"].isin(seeds)])[["test_ece", "flops"]].mean() for arm in (first, second))
    return (
        f"`{second.name}` against `{first.name}` on the same {len(both):,} test pairs (seeds: "
        f"{', '.join(map(str, seeds))}): **{_bootstrapped(gained, both, points)} points**, loss "
        f"{_bootstrapped(lost, both, change_of_loss)} (95% intervals by test prompt; the table's are by seed), "
        f"calibration error {percent(ours['test_ece'])} against {percent(theirs['test_ece'])}, "
        f"{ours['flops'] / theirs['flops']:.2f} of the compute."
    )


def _learning_curve(plan: Plan, runs: pd.DataFrame) -> str:
    """Accuracy, agreement and preference for length by the number of pairs, and a line through all runs."""
    pairs = read_pairs(runs)
    parts = [_table(_size_row(arm, own, _of(arm, pairs)) for arm, own in _ran(plan, runs))]
    if len(runs) >= 3 and runs["pairs"].nunique() >= 2:
        longer = pairwise_accuracy(pairs["longer"])
        gain, mean = learning_curve(runs["pairs"], runs[ACCURACY], FULL_PAIRS)
        picture = RESULTS / f"{plan.name}.png"
        draw_learning_curve(runs, longer, FULL_PAIRS, picture)
        parts += [
            f"![Accuracy against training pairs]({picture.as_posix()})",
            f"A straight line through the {len(runs)} runs gains {with_interval(*gain, points)} points for each "
            f"doubling of the pairs (95% interval, over runs on these test pairs). Drawn on to {FULL_PAIRS:,} pairs, "
            f"which nothing here tests, it says {with_interval(*mean)}. On these test pairs {LONGER}: "
            f"{percent(longer)}.",
        ]
    return _block(plan, runs, parts)


def _size_row(arm: Arm, runs: pd.DataFrame, pairs: pd.DataFrame) -> dict[str, str]:
    unequal = pairs[pairs["longer"] != 0]
    return {
        "training pairs": f"{runs['pairs'].iloc[0]:,}",
        "runs": _count(arm, runs),
        "test accuracy": _over_seeds(runs, ACCURACY),
        "prefers the longer text": percent(pairwise_accuracy(unequal["margin"] * unequal["longer"])),
        "seeds agree on": percent(agreement(margins(pairs).to_numpy())) if len(runs) > 1 else UNKNOWN,
        "test loss": _over_seeds(runs, LOSS, decimals),
    }


def _full(plan: Plan, runs: pd.DataFrame) -> str:
    """What each run of the full scale is expected to take, and what it found."""

    def power(value: float) -> str:
        return f"{value:.1e}".replace("e+", "e")

    rows = []
    for arm in plan.arms:
        own, flops = _of(arm, runs), float(arm.expected_flops)  # YAML reads 1.8e17, without a sign, as text
        rows.append(
            {
                "run": arm.title,
                "FLOPs of training": power(flops),
                f"minutes at {power(ASSUMED_FLOPS)} FLOP/s": f"{flops / ASSUMED_FLOPS / 60:,.0f}",
                "test accuracy": _over_seeds(own, ACCURACY) if len(own) else "not run",
            }
        )
    return _block(plan, runs, [_table(rows)])


TABLES = {
    "study_curve": _study_curve,
    "recommendations": _comparison,
    "known_answer": _comparison,
    "learning_curve": _learning_curve,
    "full": _full,
}


def main() -> None:
    """Refill the page's tables, draw the plans' pictures, and list all runs."""
    text, listed = PAGE.read_text("utf-8"), []
    for name, write in TABLES.items():
        plan = read_plan(Path("recipes", "reproduce", f"{name}.yaml"))
        before, begin, rest = text.partition(f"<!-- begin {name} -->\n")
        _, end, after = rest.partition(f"<!-- end {name} -->")
        expect(bool(begin and end), str(PAGE), f"`<!-- begin {name} -->`, then `<!-- end {name} -->`", "not both")
        runs = read_runs(plan)
        listed.append(runs)
        text = f"{before}{begin}{write(plan, runs)}\n{end}{after}"
    RUNS.parent.mkdir(exist_ok=True)
    with replacing(RUNS) as partial:
        pd.concat([runs for runs in listed if len(runs)] or listed).to_csv(partial, index=False, float_format="%.6g")
    with replacing(PAGE) as partial:
        partial.write_text(text, "utf-8")


if __name__ == "__main__":
    run_cli(main)
