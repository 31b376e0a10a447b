"""The log is read leniently, summed up correctly and drawn without a warning, whatever state it is in."""

import os
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from reward_recipes import plot_training as command
from reward_recipes.evaluate import read_log, summarise
from reward_recipes.evaluate.training_picture import plot_training
from reward_recipes.run import UserError, run_cli

COLUMNS = (
    "step,epoch,train_loss,train_accuracy,eval_loss,eval_accuracy,overfitting_gap,learning_rate,grad_norm,"
    "train_probe_loss,train_probe_accuracy,eval_margin,mean_reward,tokens_seen,pairs_per_second,elapsed_seconds"
)
pytestmark = pytest.mark.filterwarnings("error")


def row(step: int, accuracy: object = "", gap: object = "", loss: object = 0.6, norm: object = 2.5) -> str:
    probe = (0.6, 0.7) if accuracy != "" else ("", "")
    cells = (step, step / 100, 0.65, 0.62, loss, accuracy, gap, 1e-5, norm, *probe, 0.2, 0.1, 9000, 12.5, 33.25)
    return ",".join(map(str, cells))


def write(folder: Path, *rows: str, end: str = "\n") -> Path:
    path = folder / "reward_model_log.csv"
    path.write_text("\n".join((COLUMNS, *rows)) + end)
    return path


# Step, accuracy, gap, loss: best at 200 (a tie with 300), lowest loss at 100; the gap passes 5 points for good at 500.
EVALUATIONS = (
    *((100, 0.60, 0.06, 0.640), (200, 0.65, 0.01, 0.645), (300, 0.65, 0.06, 0.650)),
    *((400, 0.64, 0.05, 0.660), (500, 0.63, 0.08, 0.670), (600, 0.625, 0.1234, 0.680)),
)
OVERFITTED = (row(50), *(row(*cells) for cells in EVALUATIONS), row(650))


def test_summary_of_an_overfitted_run(tmp_path: Path) -> None:
    summary = summarise(read_log(write(tmp_path, *OVERFITTED)))
    assert (summary.best_loss_step, summary.best_loss) == (100, 0.640)
    assert str(summary) == (
        "best step      200: eval accuracy 65.00%\n"
        "last step      600: eval accuracy 62.50%, gap +12.3 points\n"
        "overfitting    from step 500 on: the gap stays above 5 points"
    )


def test_no_overfitting_is_seen_without_a_lasting_gap(tmp_path: Path) -> None:
    for rows, best_step, words in (
        ((row(1, 0.7, 0.0), row(2, 0.6, 0.2), row(3, 0.6, 0.05)), 1, "not seen: "),  # the gap closes again
        ((row(1, 0.6, 0.2), row(2, 0.7, 0.3)), 2, "not seen: "),  # the best step is the last
        ((row(1, 0.6, 0.0), row(2, 0.5, "nan", 0.5, "inf")), 1, "gap unknown"),
        ((row(1000, 0.52, 0.015),), 1000, "1,000: eval accuracy 52.00%, gap +1.5 points"),
        ((row(10), row(20)), None, "none: no evaluation"),
    ):
        summary = summarise(read_log(write(tmp_path, *rows)))
        assert (summary.best_step, summary.overfitting_began) == (best_step, None)
        assert words in str(summary)


def test_half_a_last_line_is_dropped_and_an_unusable_log_is_told(tmp_path: Path) -> None:
    for kept in (1, 9, 30):
        log = read_log(write(tmp_path, row(10, 0.6), row(20, 0.7)[:kept], end=""))
        assert log["step"].tolist() == [10]
    for content, complaint in (
        ("\n".join((COLUMNS, row(1), row(2, "oops"), row(3), "")), "could not convert string to float: 'oops'"),
        ("\n".join((COLUMNS, row(1), row(2) + ",7", "")), "Expected 16 fields in line 3, saw 17"),
        ("step,loss\n1,0.5\n", "a table without epoch, train_loss"),
        ("\x89PNG\r\n\x1a\n\xff\x00", "codec can't decode"),
    ):
        (tmp_path / "log.csv").write_bytes(content.encode("latin-1"))
        with pytest.raises(UserError, match=complaint):
            read_log(tmp_path / "log.csv")


def test_command_draws_every_series_beside_the_log_and_prints_its_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = write(tmp_path, *OVERFITTED).rename(tmp_path / "reward_model_log.csv")
    monkeypatch.setattr("sys.argv", ["plot_training", str(tmp_path), "--ceiling", "0.7"])  # a run's folder
    run_cli(command.main)
    printed = capsys.readouterr()
    assert (printed.out.count("\n"), printed.out[:19], printed.err) == (3, "best step      200:", "")
    assert sorted(os.listdir(tmp_path)) == [log.name, "training_progress.png"]
    pixels = np.round(imread(tmp_path / "training_progress.png")[..., :3] * 255).astype(int)
    assert pixels.shape[0] > 900 and pixels.shape[1] > 1400
    assert 0.5 < (pixels == 255).all(axis=-1).mean() < 0.97
    for colour in ((0x00, 0x72, 0xB2), (0x00, 0x9E, 0x73), (0xD5, 0x5E, 0x00), (0xCC, 0x79, 0xA7), (0, 0, 0)):
        assert (pixels == colour).all(axis=-1).sum() > 200, colour
    for words, complaint in (
        ([str(tmp_path / "none.csv")], "No such file"),
        ([str(log), "--output", str(tmp_path / "out.pdf")], "ends in .png"),
        ([str(log), "--ceiling", "75"], "a fraction such as 0.75, found 75"),
        ([str(log), "--output", str(log / "out.png")], "File exists"),
    ):
        monkeypatch.setattr("sys.argv", ["plot_training", *words])
        with pytest.raises(SystemExit, match="2"):
            run_cli(command.main)
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and complaint in error


def test_an_empty_log_and_a_long_one_with_odd_gradient_norms_are_drawn(tmp_path: Path) -> None:
    """Into a new folder, where the second picture takes the place of the first."""
    norms, output = [0, -1, "", "nan", "inf", 1e-9, 1e9], tmp_path / "new" / "folder" / "out.png"
    pictures = []
    for rows in ([], [row(step, norm=norms[step % 7]) for step in range(1, 302)]):
        plot_training(write(tmp_path, *rows), output)
        pictures.append(output.read_bytes())
    assert os.listdir(output.parent) == ["out.png"]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures) and pictures[0] != pictures[1]
