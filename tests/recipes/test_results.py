"""RESULTS.md from collected runs: its figures are those of the files; what was not run, and what is broken, is told."""

import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from plan import read_plan

import results
from results import write_results
from reward_recipes.evaluate.training_log import NEEDED_COLUMNS
from reward_recipes.run.errors import UserError, run_cli

ROOT = Path(__file__).resolve().parents[2]
PLANS = Path("recipes/reproduce")
BLOCKS = ("study_curve", "recommendations", "known_answer", "learning_curve", "full")
LOG = [
    {"epoch": 0.5, "train_loss": 0.7, "train_accuracy": 0.5, "grad_norm": 9.0, "learning_rate": 1e-5},
    {"epoch": 0.75, "grad_norm": 3.0},
    {"epoch": 1.0, "eval_loss": 0.69, "eval_accuracy": 0.54, "overfitting_gap": 0.01, "grad_norm": 0.5},
    {"epoch": 2.0, "eval_loss": 0.68, "eval_accuracy": 0.56, "overfitting_gap": 0.06, "grad_norm": 2.0},
    {"epoch": 3.0, "eval_loss": 0.75, "eval_accuracy": 0.55, "overfitting_gap": 0.2, "grad_norm": 2.0},
]
LOG[-1] |= {"train_probe_accuracy": 0.75, "train_probe_loss": 0.5}


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page with a place for each plan, beside an empty `results`; commands are given in the repository's root."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "results").mkdir()
    places = (f"Before {name}.\n<!-- begin {name} -->\n<!-- end {name} -->\nAfter.\n" for name in BLOCKS)
    (tmp_path / "RESULTS.md").write_text("# Page\n" + "".join(places))
    return tmp_path / "RESULTS.md"


def collect(
    folder: Path,
    accuracy: float = 0.5,
    loss: float = 0.7,
    pairs: int = 400,
    margins: Sequence[float] = (1, -1, 1, -1),
    rows: Sequence[int] = (0, 2, 3, 5),
    **cost: Any,
) -> Path:
    """The small files of one finished run, those that the page is made of."""
    folder.mkdir(parents=True)
    known = {"packed": False, "num_padded_tokens": 3_000_000, "num_unique_tokens": 1_000_000, "weights": 1_000_000}
    summary = {"kept_step": 7, "commit": "abc1234", "device": "CPU", "cost": known | {"seconds": 90.0} | cost}
    test = {"test_accuracy": accuracy, "test_loss": loss, "test_ece": 0.1, "test_accuracy_ci95": [0.25, 0.75]}
    audit = {"train": {"pairs_trained_on": pairs}}
    for name, content in (("run_summary", summary), ("test_metrics", test), ("data_audit", audit), ("run", {})):
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "training_progress.png").touch()
    log = pd.DataFrame(LOG, columns=NEEDED_COLUMNS).assign(step=range(1, len(LOG) + 1))
    log.to_csv(folder / "reward_model_log.csv", index=False)
    lengths = {"chosen_length": [5, 9, 9, 9], "rejected_length": [9, 5, 5, 9]}
    scores = {"row": rows, "prompt_id": rows, **lengths, "chosen_score": margins, "rejected_score": 0}
    pd.DataFrame(scores).to_csv(folder / "test_scores.csv", index=False)
    return folder


@pytest.fixture
def arms(page: Path) -> Path:
    """The study's setting and the recommended one, three seeds each."""
    folder, ours = page.parent / "results" / "recommendations", {"packed": True, "margins": (1, 2, 3, 4)}
    found = ((42, 0.50, 0.55, 0.68), (43, 0.52, 0.58, 0.69), (44, 0.54, 0.58, 0.67))
    for seed, theirs, accuracy, loss in found:
        collect(folder / f"findings-{seed}", theirs)
        collect(folder / f"one_epoch-{seed}", accuracy, loss, **ours)
    return folder


@pytest.fixture
def sizes(page: Path) -> Path:
    """Two sizes, two doublings apart, three seeds each."""
    folder = page.parent / "results" / "learning_curve"
    for seed, less in ((42, 0.52), (43, 0.53), (44, 0.54)):
        collect(folder / f"eighth-{seed}", less, pairs=368)
        collect(folder / f"half-{seed}", less + 0.02, pairs=1472)
    return folder


def filled(page: Path) -> dict[str, str]:
    """Each block of the page after refilling it."""
    write_results(PLANS, page.parent / "results", page)
    text = page.read_text()
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


def test_without_runs_every_arm_is_told_as_not_run(page: Path) -> None:
    blocks = filled(page)
    assert blocks["study_curve"] == (
        "No run yet: `python recipes/reproduce/reproduce.py --plan recipes/reproduce/study_curve.yaml`"
    )
    for name in BLOCKS[1:]:
        arms = re.findall(r"^  (\S+):\n    title", (ROOT / PLANS / f"{name}.yaml").read_text(), re.MULTILINE)
        assert re.findall(r"not run \(`--only (\S+)`\)", blocks[name]) == arms and len(arms) > 3
    assert not list((page.parent / "results").iterdir())


def test_recommendations_by_numbers_worked_by_hand(page: Path, arms: Path) -> None:
    """Of three values the interval is the mean -+ 4.303 standard deviations / sqrt(3).

    The study's accuracies 50, 52, 54 have mean 52 and deviation 2; the others' 55, 58, 58 mean 57, deviation sqrt(3).
    They gain 5, 6, 4: 5 with deviation 1, two and a half of the deviations between the study's seeds. Losses 0.68,
    0.69, 0.67 against 0.70: -0.02 with deviation 0.01. FLOPs: 6 x 1e6 weights x 3e6 padded or 1e6 unique tokens.
    """
    block = filled(page)["recommendations"]
    shared = ["0.6800 to 0.7500", "+20.0", "2.0 (0.5 to 9.0)"]
    assert cells(block, "the study's setting")[1:] == [
        *("3", "52.0% (47.0% to 57.0%)", "-", "-", "0.7000 (0.7000 to 0.7000)", "-", *shared, "1.8e13"),
    ]
    assert cells(block, "`one_epoch.yaml`")[1:] == [
        *("3", "57.0% (52.7% to 61.3%)", "+5.0 (+2.5 to +7.5)", "+2.5", "0.6800 (0.6552 to 0.7048)"),
        *("-0.0200 (-0.0448 to +0.0048)", *shared, "6.0e12"),
    ]
    assert cells(block, "LoRA")[1:] == ["not run (`--only lora`)", *["-"] * 9]
    assert cells(block, "`one_epoch-43`")[:10] == [
        *("`one_epoch-43`", "400", "7", "58.0% (25.0% to 75.0%)", "0.6900", "10.0%", "6.0e12", "2", "abc1234", "CPU"),
    ]


def test_the_same_pairs_are_compared_one_by_one(page: Path, arms: Path) -> None:
    """The study's is right on two of four pairs, the other on all: of four draws none, or all, may be those two.

    Margins 1, -1, 1, -1 have losses log(1 + e^-1) = 0.3133 and log(1 + e) = 1.3133; 1, 2, 3, 4 have 0.3133, 0.1269,
    0.0486 and 0.0181, less by 0, 1.1864, 0.2647 and 1.2952.
    """
    assert re.search(
        r"`one_epoch` against `findings` on the same 4 test pairs \(seeds: 42, 43, 44\): \*\*\+50\.0 \(\+0\.0 to "
        r"\+100\.0\) points\*\*, loss -0\.6865 \(-1\.[0-9]+ to -0\.[01][0-9]+\) \(95% intervals by test prompt; the "
        r"table's are by seed\), calibration error 10\.0% against 10\.0%, 0\.33 of the compute\.",
        filled(page)["recommendations"],
    )


def test_arms_are_drawn_once_they_have_three_seeds_in_common(page: Path, arms: Path) -> None:
    link, picture = "![Points gained and change of loss by each arm](results/recommendations.png)", arms.parent
    assert link in filled(page)["recommendations"] and (picture / "recommendations.png").stat().st_size > 10_000
    (picture / "recommendations.png").unlink()
    shutil.rmtree(arms / "one_epoch-42")
    assert link not in filled(page)["recommendations"] and not (picture / "recommendations.png").exists()


def test_learning_curve_by_numbers_worked_by_hand(page: Path, sizes: Path) -> None:
    """Means 53 and 55 two doublings apart: 1 point each. Squared residuals 4 x 0.01^2 over 4 degrees of freedom give a
    spread of 0.01, log2 sizes lie 1 to either side of their mean: 2.776 x 0.01 / sqrt(6) = 0.0113.

    At 144,720 pairs, log2(144,720 / 736) = 7.619 doublings from the middle, 54 + 7.6 points, and to either side
    2.776 x 0.01 x sqrt(1/6 + 7.619^2 / 6) = 0.0871. The longer of four texts is chosen twice, and one tie;
    the runs prefer it on one of three.
    """
    block = filled(page)["learning_curve"]
    assert cells(block, "368 ") == [
        *(
            "368",
            "3",
            "53.0% (50.5% to 55.5%)",
            "33.3%",
            "100.0%",
            "50.0% (0.0% to 100.0%)",
            "0.7000 (0.7000 to 0.7000)",
        ),
    ]
    assert cells(block, "1/4 of the pairs")[1] == "not run (`--only quarter`)"
    assert "A straight line through the 6 runs gains +1.0 (-0.1 to +2.1) points for each doubling of the pairs" in block
    assert "Drawn on to 144,720 pairs, which nothing here tests, it says 61.6% (52.9% to 70.3%)." in block
    assert "Always preferring the text of more tokens: 62.5%." in block
    collect(sizes / "all-42", 0.56, pairs=2944)
    block = filled(page)["learning_curve"]
    assert cells(block, "2,944 ")[1] == "1 (not run: 43, 44)"


def test_the_study_beside_the_run(page: Path) -> None:
    collect(page.parent / "results" / "study_curve" / "findings-42")
    block = filled(page)["study_curve"]
    assert [cells(block, start)[-1] for start in ("best eval a", "best eval l", "accuracy", "gap", "eval", "grad")] == [
        "56.0%, after 2.0 epochs",
        "0.6800, after 2.0 epochs",
        "75.0% (loss 0.50), in eval mode",
        "+1.0, +6.0, +20.0",
        "0.6800 to 0.7500",
        "2.0 (0.5 to 9.0), of the log's rows",
    ]
    assert "![Four panels of the run](results/study_curve/findings-42/training_progress.png)" in block


def test_full_plan_tells_what_it_expects_and_what_was_found(page: Path) -> None:
    """1.8e17 FLOPs at 1e14 a second are 1,800 seconds."""
    collect(page.parent / "results" / "full" / "findings-42", 0.65)
    block = filled(page)["full"]
    assert cells(block, "the study's setting")[1:] == ["1.8e17", "30", "65.0%"]
    assert cells(block, "the same with GPT-2 large")[1:] == ["1.9e17", "32", "not run (`--only gpt2-large`)"]
    assert cells(block, "`findings-42`")[3] == "65.0% (25.0% to 75.0%)"


def test_links_lead_to_the_files_that_a_run_has(page: Path) -> None:
    run = collect(page.parent / "results" / "full" / "findings-42")
    (run / "test_scores.csv").unlink()
    (run / "evaluation.md").touch()
    links = [("log", "reward_model_log.csv"), ("picture", "training_progress.png"), ("figures", "test_metrics.json")]
    links += [("evaluation", "evaluation.md"), ("command", "run.json")]
    assert cells(filled(page)["full"], "`findings-42`")[-1] == ", ".join(
        f"[{name}](results/full/findings-42/{file})" for name, file in links
    )


def test_refilling_changes_nothing_and_the_rest_of_the_page_stays(page: Path, arms: Path, sizes: Path) -> None:
    filled(page)
    picture = page.parent / "results" / "learning_curve.png"
    first = (page.read_bytes(), picture.read_bytes())
    filled(page)
    assert (page.read_bytes(), picture.read_bytes()) == first
    assert first[1].startswith(b"\x89PNG") and not broken_links(page)
    for name in BLOCKS:
        assert f"Before {name}.\n<!-- begin {name} -->\n" in page.read_text()
    assert page.read_text().startswith("# Page\nBefore") and page.read_text().count("-->\nAfter.\n") == len(BLOCKS)


def test_links_are_relative_to_the_page(page: Path, arms: Path) -> None:
    (page.parent / "docs").mkdir()
    moved = page.rename(page.parent / "docs" / "RESULTS.md")
    write_results(PLANS, page.parent / "results", moved)
    assert "(../results/recommendations/findings-42/run.json)" in moved.read_text() and not broken_links(moved)


def test_runs_without_scores_are_left_out_of_what_needs_them(page: Path, arms: Path, sizes: Path) -> None:
    (arms / "findings-42" / "test_scores.csv").unlink()
    (sizes / "eighth-42" / "test_scores.csv").unlink()
    blocks = filled(page)
    assert "(seeds: 43, 44): **+50.0" in blocks["recommendations"]
    assert cells(blocks["recommendations"], "the study's setting")[2] == "52.0% (47.0% to 57.0%)"
    assert cells(blocks["learning_curve"], "368 ")[1:4] == ["3", "53.0% (50.5% to 55.5%)", "33.3%"]
    for path in page.parent.glob("results/*/*/test_scores.csv"):
        path.unlink()
    blocks = filled(page)
    assert "against `" not in blocks["recommendations"] and "Always preferring" not in blocks["recommendations"]
    assert cells(blocks["learning_curve"], "368 ")[3:6] == ["-"] * 3
    assert "+1.0 (-0.1 to +2.1) points" in blocks["learning_curve"] and "Always" not in blocks["learning_curve"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("test_metrics.json", None, "expected a file at .*test_metrics.json, found: No such file"),
        ("run_summary.json", None, "expected a file at .*run_summary.json, found: "),
        ("reward_model_log.csv", None, "expected a training log at .*, found: No such file"),
        ("data_audit.json", "{", "data_audit.json: expected a mapping, found: .*; mend it; or collect the run anew"),
        ("test_metrics.json", "[1]", "test_metrics.json: expected a mapping, found list"),
        (
            "run_summary.json",
            '{"kept_step": 1, "commit": "", "device": "", "cost": {}}',
            "expected weights, .*found {}",
        ),
        ("data_audit.json", '{"train": {}}', "data_audit.json: expected pairs_trained_on, found {}"),
        ("reward_model_log.csv", f"{','.join(NEEDED_COLUMNS)}\n", "reward_model_log.csv: expected an evaluation"),
        ("run_summary.json", '{"cost": 1}', "run_summary.json: expected kept_step, commit, device, cost, found"),
        ("test_scores.csv", "", "expected .*test_scores.csv of a finished run, found: No columns"),
        ("test_scores.csv", "row,score\n1,2\n", "expected .*test_scores.csv of a finished run, found: Usecols"),
        ("reward_model_log.csv", "step\n1\n", "expected a training log at .*, found: 1 columns, without epoch"),
    ],
)
def test_broken_files_are_told_in_one_line(name: str, content: str | None, told: str, page: Path, arms: Path) -> None:
    path, before = arms / "findings-43" / name, page.read_text()
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=told) as mistake:
        filled(page)
    assert len(str(mistake.value).splitlines()) == 1 and page.read_text() == before


@pytest.mark.parametrize("rows", [(0, 2, 3, 6), (5, 3, 2, 0)])
def test_scores_of_other_pairs_are_refused(rows: tuple[int, ...], page: Path, sizes: Path) -> None:
    shutil.rmtree(sizes / "half-44")
    collect(sizes / "half-44", pairs=1472, rows=rows)
    with pytest.raises(UserError, match=r"scores of the same test pairs in .*half-42 and .*half-44, found other rows"):
        filled(page)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<!-- begin full -->", ""),
        ("<!-- end full -->", ""),
        ("<!-- begin full -->", "<!-- begin full --><!-- begin full -->"),
        ("<!-- end full -->", "<!-- end full --> <!-- end full -->"),
        ("<!-- begin full -->\n<!-- end full -->", "<!-- end full -->\n<!-- begin full -->"),
    ],
)
def test_a_page_without_one_place_for_each_table_is_refused(old: str, new: str, page: Path) -> None:
    page.write_text(page.read_text().replace(old, new))
    before = page.read_text()
    with pytest.raises(UserError, match="expected `<!-- begin full -->` and `<!-- end full -->` once, in this order"):
        filled(page)
    assert page.read_text() == before


def test_command_line(page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["results", "--results_dir", str(page.parent / "results"), "--page"]
    monkeypatch.setattr(sys, "argv", [*words, str(page)])
    results.main()
    assert "No run yet" in page.read_text()
    before = page.read_bytes()
    for name, argv in (("none.md", [*words, str(page.parent / "none.md")]), ("none", ["", "--results_dir", "none"])):
        monkeypatch.setattr(sys, "argv", [*argv, "--page", str(page)] if name == "none" else argv)
        with pytest.raises(SystemExit):
            run_cli(results.main)
        assert re.fullmatch(rf"error: .*{re.escape(name)}.*\n", capsys.readouterr().err)
    assert page.read_bytes() == before


def test_the_page_of_this_repository_is_what_its_results_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No figure between the marks is typed by hand: `make results` mends what this finds."""
    monkeypatch.chdir(ROOT)
    shutil.copytree("results", tmp_path / "results")
    shutil.copy("RESULTS.md", tmp_path)
    write_results(PLANS, tmp_path / "results", tmp_path / "RESULTS.md")
    assert (tmp_path / "RESULTS.md").read_text() == (ROOT / "RESULTS.md").read_text()


def test_every_collected_run_of_this_repository_is_on_its_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of another name than those of its plan's runs would be passed over."""
    monkeypatch.chdir(ROOT)
    for name in BLOCKS:
        collected = {path.name for path in Path("results", name).glob("*") if path.is_dir()}
        assert collected <= {run.name for run in read_plan(PLANS / f"{name}.yaml").runs()}


@pytest.mark.parametrize("name", ["README.md", "RESULTS.md", "recipes/README.md"])
def test_links_of_the_pages_lead_to_files(name: str) -> None:
    assert not broken_links(ROOT / name)


def test_every_module_is_named_where_modules_are_explained() -> None:
    package = ROOT / "src" / "reward_recipes"
    named = set(re.findall(r"`([a-z_]+\.py)`", (package / "README.md").read_text()))
    assert named == {path.name for path in package.rglob("*.py") if path.name != "__init__.py"}
