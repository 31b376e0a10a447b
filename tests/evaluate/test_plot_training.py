"""The log is read leniently, summed up correctly and drawn without a warning, whatever state it is in."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from reward_recipes.evaluate.training_log import read_log, summarise
from reward_recipes.evaluate.training_picture import plot_training
from reward_recipes.run.errors import UserError

COLUMNS = (
    "step,epoch,train_loss,train_accuracy,eval_loss,eval_accuracy,overfitting_gap,learning_rate,grad_norm,"
    "train_probe_loss,train_probe_accuracy,eval_margin,mean_reward,tokens_seen,pairs_per_second,elapsed_seconds"
)
pytestmark = pytest.mark.filterwarnings("error")


def row(step: int, accuracy: object = "", gap: object = "", loss: object = "", norm: object = 2.5) -> str:
    probe = (0.6, 0.7) if accuracy != "" else ("", "")
    cells = (
        step,
        step / 100,
        0.65,
        0.62,
        loss,
        accuracy,
        gap,
        1e-5,
        norm,
        *probe,
        0.2,
        0.1,
        9000,
        12.5,
        33.25,
    )
    return ",".join(map(str, cells))


def write(folder: Path, *rows: str, end: str = "\n") -> Path:
    path = folder / "reward_model_log.csv"
    path.write_text("\n".join((COLUMNS, *rows)) + end)
    return path


def overfitted(folder: Path) -> Path:
    """Best at 200 (a tie with 300), lowest loss at 100; the gap passes 5 points at 300, for good at 500."""
    return write(
        folder,
        row(50),
        row(100, 0.60, 0.06, 0.640),
        row(200, 0.65, 0.01, 0.645),
        row(250),
        row(300, 0.65, 0.06, 0.650),
        row(400, 0.64, 0.05, 0.660),
        row(500, 0.63, 0.08, 0.670),
        row(600, 0.625, 0.1234, 0.680),
        row(650),
    )


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "reward_recipes.plot_training", *map(str, arguments)]
    paths = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=60)


def test_summary_of_an_overfitted_run(tmp_path: Path) -> None:
    summary = summarise(read_log(overfitted(tmp_path)))
    assert (summary.best_step, summary.best_accuracy) == (200, 0.65)
    assert (summary.best_loss_step, summary.best_loss) == (100, 0.640)
    assert (summary.final_step, summary.final_accuracy, summary.final_gap) == (600, 0.625, 0.1234)
    assert summary.overfitting_began == 500
    assert str(summary) == (
        "best step 200 with eval accuracy 65.00%; final eval accuracy 62.50% at step 600; "
        "final gap +12.3 points; overfitting began at step 500"
    )


def test_no_overfitting_when_the_gap_closes_again_or_the_best_step_is_the_last(tmp_path: Path) -> None:
    closes = write(tmp_path, row(1, 0.7, 0.0), row(2, 0.6, 0.2), row(3, 0.6, 0.05))
    assert summarise(read_log(closes)).overfitting_began is None
    assert "no overfitting seen" in str(summarise(read_log(closes)))
    still_best = write(tmp_path, row(1, 0.6, 0.2), row(2, 0.7, 0.3))
    assert summarise(read_log(still_best)).overfitting_began is None


def test_diverged_values_do_not_count(tmp_path: Path) -> None:
    path = write(tmp_path, row(1, 0.6, 0.0, 0.6), row(2, 0.5, "nan", "nan", "inf"))
    summary = summarise(read_log(path))
    assert (summary.best_loss_step, summary.final_accuracy, summary.final_gap) == (1, 0.5, None)
    assert "gap unknown" in str(summary)


def test_log_without_evaluation(tmp_path: Path) -> None:
    for rows, end in (((), "\n"), ((), ""), ((row(10), row(20)), "\n")):
        summary = summarise(read_log(write(tmp_path, *rows, end=end)))
        assert (summary.evaluations, summary.best_step, summary.overfitting_began) == (0, None, None)
        assert str(summary).startswith("no evaluation in the log yet")
    plot_training(write(tmp_path), tmp_path / "header_only.png")


def test_log_with_one_evaluation(tmp_path: Path) -> None:
    summary = plot_training(write(tmp_path, row(1000, 0.52, 0.015, 0.69)), tmp_path / "out.png")
    assert (summary.best_step, summary.final_step, summary.overfitting_began) == (1000, 1000, None)
    assert str(summary).startswith("one evaluation so far: eval accuracy 52.00% at step 1,000, gap +1.5 points")


@pytest.mark.parametrize("kept", [1, 9, 30])
def test_half_written_last_line_is_dropped(tmp_path: Path, kept: int) -> None:
    log = read_log(write(tmp_path, row(10, 0.6), row(20, 0.7)[:kept], end=""))
    assert log["step"].tolist() == [10]


def test_unusable_logs_are_told_in_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a training log .* found: No such file .* pass the"):
        read_log(tmp_path / "none.csv")
    with pytest.raises(UserError, match=r"could not convert .*oops"):
        read_log(write(tmp_path, row(1), row(2, "oops"), row(3)))
    with pytest.raises(UserError, match="no step in row 2"):
        read_log(write(tmp_path, row(1), "," * 15, row(3)))
    with pytest.raises(UserError, match="Expected 16 fields in line 3, saw 17"):
        read_log(write(tmp_path, row(1), row(2) + ",7"))
    other = tmp_path / "other.csv"
    other.write_text("step,loss\n1,0.5\n")
    with pytest.raises(UserError, match="2 columns, without epoch, train_loss"):
        read_log(other)
    other.write_bytes(b"\x89PNG\r\n\x1a\n\xff\x00")
    with pytest.raises(UserError, match="codec can't decode"):
        read_log(other)


def test_picture_shows_every_series_and_leaves_nothing_else(tmp_path: Path) -> None:
    output = tmp_path / "new" / "folder" / "progress.png"
    for _ in range(2):
        plot_training(overfitted(tmp_path), output, ceiling=0.7)
    assert os.listdir(output.parent) == ["progress.png"]
    pixels = np.round(imread(output)[..., :3] * 255).astype(int)
    assert pixels.shape[0] > 900 and pixels.shape[1] > 1400
    assert 0.5 < (pixels == 255).all(axis=-1).mean() < 0.97
    for colour in ((0x00, 0x72, 0xB2), (0x00, 0x9E, 0x73), (0xD5, 0x5E, 0x00), (0xCC, 0x79, 0xA7), (0, 0, 0)):
        assert (pixels == colour).all(axis=-1).sum() > 200, colour


def test_long_log_is_smoothed_and_odd_gradient_norms_are_drawn(tmp_path: Path) -> None:
    norms = [0, -1, "", "nan", "inf", 1e-9, 1e9]
    rows = [row(step, norm=norms[step % 7]) for step in range(1, 302)]
    pictures = []
    for log in (rows, [row(1, norm=0)]):
        plot_training(write(tmp_path, *log), tmp_path / "out.png")
        pictures.append((tmp_path / "out.png").read_bytes())
    assert all(picture.startswith(b"\x89PNG") for picture in pictures) and pictures[0] != pictures[1]


@pytest.mark.parametrize(
    ("output", "ceiling", "message"),
    [
        ("out.pdf", None, "ends in .png"),
        ("out.png", 75.0, "a fraction such as 0.75, found 75"),
        ("reward_model_log.csv/out.png", None, "expected to write"),
    ],
)
def test_unusable_arguments(tmp_path: Path, output: str, ceiling: float | None, message: str) -> None:
    log = overfitted(tmp_path)
    with pytest.raises(UserError, match=message):
        plot_training(log, tmp_path / output, ceiling)
    assert os.listdir(tmp_path) == [log.name]


def test_command_draws_beside_the_log_and_prints_one_line(tmp_path: Path) -> None:
    done = run(overfitted(tmp_path), "--ceiling", 0.7)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1 and done.stdout.startswith("best step 200 ")
    assert (tmp_path / "training_progress.png").stat().st_size > 20_000


def test_command_tells_a_bad_file_in_one_line(tmp_path: Path) -> None:
    done = run(tmp_path / "none.csv", "--output", tmp_path / "out.png")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: expected a training log") and done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
