"""RESULTS.md from collected runs: its figures are those of the files; what was not run, and what is broken, is told."""

import json
import re
import shutil
from contextlib import chdir
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from collected import agreement, learning_curve
from plan import read_plan

import results
from reward_recipes.evaluate.training_log import NEEDED_COLUMNS
from reward_recipes.run import UserError

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = ("study_curve", "recommendations", "known_answer", "learning_curve", "full")
LOG = [
    {"epoch": 0.5, "train_loss": 0.7, "train_accuracy": 0.5, "grad_norm": 9.0, "learning_rate": 1e-5},
    {"epoch": 0.75, "grad_norm": 3.0},
    {"epoch": 1.0, "eval_loss": 0.69, "eval_accuracy": 0.54, "overfitting_gap": 0.01, "grad_norm": 0.5},
    {"epoch": 2.0, "eval_loss": 0.68, "eval_accuracy": 0.56, "overfitting_gap": 0.06, "grad_norm": 2.0},
    {"epoch": 3.0, "eval_loss": 0.75, "eval_accuracy": 0.55, "overfitting_gap": 0.2, "grad_norm": 2.0},
]
LOG[-1] |= {"train_probe_accuracy": 0.75, "train_probe_loss": 0.5}


def empty_page(root: Path) -> Path:
    """A page with a place for each plan, in a root whose plans are this repository's and whose results are empty."""
    for name in ("recipes", "accelerate_configs"):
        (root / name).symlink_to(ROOT / name)
    places = (f"Before {name}.\n<!-- begin {name} -->\n<!-- end {name} -->\nAfter.\n" for name in BLOCKS)
    (root / "RESULTS.md").write_text("# Page\n" + "".join(places))
    return root / "RESULTS.md"


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page of an empty root, in which the test stands."""
    monkeypatch.chdir(tmp_path)
    return empty_page(tmp_path)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root whose page tells runs of each plan."""
    with chdir(tmp_path_factory.mktemp("root")):
        empty_page(Path.cwd())
        collect_arms()
        for seed, accuracy in ((42, 0.52), (43, 0.53), (44, 0.54)):
            collect(f"learning_curve/eighth-{seed}", accuracy, pairs=368)
            collect(f"learning_curve/half-{seed}", accuracy + 0.02, pairs=1472)
        collect("study_curve/findings-42")
        collect("full/findings-42", 0.65)
        collect("known_answer/ten_epochs-42")
        results.main()
        return Path.cwd()


def collect(run: str, accuracy: float = 0.5, loss: float = 0.7, pairs: int = 400, better: bool = False) -> Path:
    """The small files of one finished run, those that the page is made of; `better` is packed and always right."""
    folder = Path("results", run)
    folder.mkdir(parents=True)
    cost = {"packed": better, "num_padded_tokens": 3_000_000, "num_unique_tokens": 1_000_000, "weights": 1_000_000}
    cost |= {"seconds": 90.0}
    summary = {"kept_step": 7, "commit": "abc1234", "device": "CPU", "cost": cost}
    test = {"test_accuracy": accuracy, "test_loss": loss, "test_ece": 0.1, "test_accuracy_ci95": [0.25, 0.75]}
    audit = {"train": {"pairs_trained_on": pairs}}
    for name, content in (("run_summary", summary), ("test_metrics", test), ("data_audit", audit), ("run", {})):
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "training_progress.png").touch()
    log = pd.DataFrame(LOG, columns=NEEDED_COLUMNS).assign(step=range(1, len(LOG) + 1))
    log.to_csv(folder / "reward_model_log.csv", index=False)
    lengths = {"chosen_length": [5, 9, 9, 9], "rejected_length": [9, 5, 5, 9]}
    scores = {"row": [0, 2, 3, 5], "prompt_id": [0, 2, 3, 5], **lengths, "rejected_score": 0}
    scores |= {"chosen_score": (1, 2, 3, 4) if better else (1, -1, 1, -1)}
    pd.DataFrame(scores).to_csv(folder / "test_scores.csv", index=False)
    return folder


def collect_arms() -> None:
    """The study's setting and the recommended one, three seeds each."""
    for seed, theirs, accuracy, loss in ((42, 0.50, 0.55, 0.68), (43, 0.52, 0.58, 0.69), (44, 0.54, 0.58, 0.67)):
        collect(f"recommendations/findings-{seed}", theirs)
        collect(f"recommendations/one_epoch-{seed}", accuracy, loss, better=True)


def blocks(root: Path) -> dict[str, str]:
    """What stands in each place of the page."""
    text = (root / "RESULTS.md").read_text()
    return {name: text.split(f"begin {name} -->\n")[1].split(f"\n<!-- end {name}")[0] for name in BLOCKS}


def cells(block: str, start: str) -> list[str]:
    """The cells of the one row that starts with these words."""
    (row,) = (line for line in block.splitlines() if line.startswith(f"| {start}"))
    return row.removeprefix("| ").removesuffix(" |").split(" | ")


def broken_links(page: Path) -> list[str]:
    """Relative links of a page that lead to no file."""
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert local
    return [link for link in local if not (page.parent / link).exists()]


def test_without_runs_every_arm_is_told_as_not_run_and_the_rest_of_the_page_stays(page: Path) -> None:
    results.main()
    text = page.read_text()
    assert text.startswith("# Page\nBefore") and text.count("After.") == len(BLOCKS)
    for name, block in blocks(page.parent).items():
        plan = Path(f"recipes/reproduce/{name}.yaml")
        assert f"Before {name}.\n<!-- begin {name} -->\n{block}\n<!-- end {name} -->\nAfter.\n" in text
        arms = ", ".join(f"`{arm.name}`" for arm in read_plan(plan).arms)
        assert block.endswith(f"No run yet. Command: `make reproduce PLAN={plan}`. Not run: {arms}.")


def test_recommendations_by_numbers_worked_by_hand(root: Path) -> None:
    """Of three values the interval is the mean -+ 4.303 standard deviations / sqrt(3).

    The study's accuracies 50, 52, 54 have mean 52 and deviation 2; the others' 55, 58, 58 mean 57, deviation sqrt(3).
    They gain 5, 6, 4: 5 with deviation 1. Losses 0.68, 0.69, 0.67 against 0.70: -0.02 with deviation 0.01. Pair by pair
    the study's is right on two of four, the other on all: of four draws none, or all, may be those two. Margins 1, -1,
    1, -1 have losses log(1 + e^-1) = 0.3133 and log(1 + e) = 1.3133; 1, 2, 3, 4 have 0.3133, 0.1269, 0.0486 and 0.0181,
    less by 0, 1.1864, 0.2647 and 1.2952. Half of the unequal texts' longer ones are chosen, and one tie: 62.5%.
    """
    block = blocks(root)["recommendations"]
    assert cells(block, "the study's setting")[1:] == [
        *("3", "52.0% (47.0% to 57.0%)", "-", "0.7000 (0.7000 to 0.7000)", "-"),
    ]
    assert cells(block, "`one_epoch.yaml`")[1:] == [
        *("3", "57.0% (52.7% to 61.3%)", "+5.0 (+2.5 to +7.5)", "0.6800 (0.6552 to 0.7048)"),
        "-0.0200 (-0.0448 to +0.0048)",
    ]
    assert "On these test pairs always the longer text, in tokens: 62.5%." in block
    assert "Not run: `one_pass`, `early_stopping`" in block
    assert re.search(
        r"`one_epoch` against `findings` on the same 4 test pairs \(seeds: 42, 43, 44\): \*\*\+50\.0 \(\+0\.0 to "
        r"\+100\.0\) points\*\*, loss -0\.6865 \(-1\.[0-9]+ to -0\.[01][0-9]+\) \(95% intervals by test prompt; the "
        r"table's are by seed\), calibration error 10\.0% against 10\.0%, 0\.33 of the compute\.",
        block,
    )
    assert "(results/recommendations.png)" in block
    assert (root / "results" / "recommendations.png").stat().st_size > 10_000


def test_arms_are_compared_over_the_seeds_that_they_share(page: Path) -> None:
    """Of seeds 42 and 43 one gained 5 points, the other 6; from two no interval, so nothing is drawn."""
    collect_arms()
    shutil.rmtree("results/recommendations/one_epoch-44")
    results.main()
    block = blocks(page.parent)["recommendations"]
    assert cells(block, "`one_epoch.yaml`")[1:4] == ["2 (not run: 44)", "56.5%", "+5.5"]
    assert "(seeds: 42, 43): **+50.0" in block and "recommendations.png" not in block
    assert not list(Path("results").glob("*.png"))


def test_learning_curve_by_numbers_worked_by_hand(root: Path) -> None:
    """Means 53 and 55 two doublings apart: 1 point each. Squared residuals 4 x 0.01^2 over 4 degrees of freedom give a
    spread of 0.01, log2 sizes lie 1 to either side of their mean: 2.776 x 0.01 / sqrt(6) = 0.0113.

    At 144,720 pairs, log2(144,720 / 736) = 7.619 doublings from the middle, 54 + 7.6 points, and to either side
    2.776 x 0.01 x sqrt(1/6 + 7.619^2 / 6) = 0.0871. The longer of four texts is chosen twice, and one tie;
    the runs prefer it on one of three.
    """
    block = blocks(root)["learning_curve"]
    means = ["368", "3", "53.0% (50.5% to 55.5%)"]
    assert cells(block, "368 ") == [*means, "33.3%", "100.0%", "0.7000 (0.7000 to 0.7000)"]
    assert "Not run: `quarter`, `all`." in block
    assert "through the 6 runs gains +1.0 (-0.1 to +2.1) points for each doubling of the pairs" in block
    assert "Drawn on to 144,720 pairs, which nothing here tests, it says 61.6% (52.9% to 70.3%)." in block
    assert "On these test pairs always the longer text, in tokens: 62.5%." in block


def test_agreement_of_three_runs_with_ties() -> None:
    """Of 4 pairs first and second agree on 2 and half a tie, first and third on 1, second and third on 1 and a half."""
    margins = np.array([[3.0, 1.0, -2.0, 0.5], [0.1, 0.0, -9.0, -1.0], [-1.0, 2.0, 1.0, -4.0]]).T
    assert agreement(margins) == pytest.approx((2.5 + 1 + 1.5) / 12)
    assert agreement(margins[:, :2] * [1, 50]) == 2.5 / 4


def test_learning_curve_intervals_cover_a_planted_line() -> None:
    """About 95% of 200 draws: by chance fewer than 180 or more than 199 once in a thousand times."""
    rng, covered, sizes = np.random.default_rng(0), np.zeros(2), np.repeat([409, 818, 1636, 3272], 3)
    for _ in range(200):
        drawn = 0.52 + 0.01 * np.log2(sizes / 409) + rng.normal(0, 0.01, len(sizes))
        (_, slope), (_, beyond) = learning_curve(sizes, drawn, at=409 * 2**8)
        covered += [slope[0] <= 0.01 <= slope[1], beyond[0] <= 0.60 <= beyond[1]]
    assert all(180 <= covered) and all(covered < 200)


def test_the_study_and_the_full_scale_beside_their_runs(root: Path) -> None:
    """1.8e17 FLOPs at 1e14 a second are 1,800 seconds."""
    study, full = (blocks(root)[name] for name in ("study_curve", "full"))
    starts = ("best eval a", "best eval l", "accuracy", "gap", "eval", "grad")
    assert [cells(study, start)[-1] for start in starts] == [
        *("56.0%, after 2.0 epochs", "0.6800, after 2.0 epochs", "75.0% (loss 0.50), in eval mode"),
        *("+1.0, +6.0, +20.0", "0.6800 to 0.7500", "median 2.0, 0.5 to 9.0 in the log's rows"),
    ]
    assert "![Four panels of the run](results/study_curve/findings-42/training_progress.png)" in study
    assert cells(full, "the study's setting")[1:] == ["9.6e16", "16", "65.0%"]
    assert cells(full, "the same with GPT-2 large")[1:] == ["1.9e17", "32", "not run"]
    assert not broken_links(root / "RESULTS.md")


def test_every_run_is_listed_with_its_recipe_and_figures(root: Path) -> None:
    """FLOPs: 6 x 1e6 weights x 3e6 padded or 1e6 unique tokens; the log's norms are 9, 3, 0.5, 2, 2."""
    runs = pd.read_csv(root / "results" / "runs.csv", index_col="run")
    names = [f"{arm}-{seed}" for arm in ("findings", "one_epoch") for seed in (42, 43, 44)]
    assert len(runs) == 15 and list(runs.index[1:8]) == [*names, "ten_epochs-42"]
    run = runs.loc["one_epoch-43"].to_dict()
    assert [run[name] for name in ("plan", "recipe", "seed", "commit", "model", "data", "device")] == [
        *("recommendations", "recipes/gpt2-small/hh-rlhf/one_epoch.yaml", 43, "abc1234"),
        *("outputs/smollm2-135m-instruct", "data/hh-rlhf", "CPU"),
    ]
    figures = ["pairs", "kept_step", "test_accuracy", "test_accuracy_low", "test_accuracy_high", "test_loss"]
    assert [run[name] for name in figures] == [400, 7, 0.58, 0.25, 0.75, 0.69]
    of_log = ["lowest_eval_loss", "last_eval_loss", "last_gap", "median_grad_norm", "largest_grad_norm"]
    assert [run[name] for name in of_log] == [0.68, 0.75, 0.2, 2.0, 9.0]
    assert (run["flops"], runs.loc["findings-43", "flops"], run["seconds"]) == (6e12, 1.8e13, 90.0)
    assert all((root / folder).is_dir() for folder in runs["folder"])


def test_what_is_broken_is_told_in_one_line_and_the_page_stays(page: Path) -> None:
    """A missing file, scores of other pairs, a page without a place; each is mended again."""
    collect_arms()
    scores, metrics = (
        Path(f"results/recommendations/findings-43/{name}") for name in ("test_scores.csv", "test_metrics.json")
    )
    for path, old, new, told in (
        (metrics, "{", "", "test_metrics.json: expected a mapping"),
        (scores, "\n5,5,", "\n6,6,", "expected the same test pairs"),
        (page, "<!-- end full -->", "", "<!-- end full -->"),
    ):
        content = path.read_text()
        path.write_text(content.replace(old, new))
        before = page.read_text()
        with pytest.raises(UserError, match=told):
            results.main()
        assert page.read_text() == before
        path.write_text(content)


def test_the_page_of_this_repository_is_what_its_results_give(page: Path) -> None:
    """No figure between the marks is typed by hand: `make results` mends what this finds. A folder of another name than
    those of its plan's runs would be passed over."""
    shutil.copytree(ROOT / "results", "results")
    shutil.copy(ROOT / "RESULTS.md", page)
    results.main()
    assert page.read_text() == (ROOT / "RESULTS.md").read_text() and len(page.read_text()) <= 14_000
    assert Path("results/runs.csv").read_bytes() == (ROOT / "results/runs.csv").read_bytes()
    for name in BLOCKS:
        collected = {path.name for path in Path("results", name).glob("*") if path.is_dir()}
        assert collected <= {run.name for run in read_plan(Path(f"recipes/reproduce/{name}.yaml")).runs()}


def test_links_of_the_pages_lead_to_files_and_every_module_is_explained() -> None:
    for name in ("README.md", "RESULTS.md", "CONTRIBUTING.md", *(f"recipes/{page}.md" for page in ("README", "USING"))):
        assert not broken_links(ROOT / name)
    assert len((ROOT / "README.md").read_text().split()) <= 1_300
    package = ROOT / "src" / "reward_recipes"
    named = set(re.findall(r"`([a-z_]+\.py)`", (package / "README.md").read_text()))
    assert named == {path.name for path in package.rglob("*.py") if path.name != "__init__.py"}
