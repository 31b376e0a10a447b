"""A mistake ends in one line on standard error and status 2, without a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import hh_pairs, write_jsonl

from reward_recipes.run.errors import UserError, run_cli


def fail(error: Exception) -> None:
    raise error


def test_user_error_becomes_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: fail(UserError("expected a,\n  found b;\n\nuse c")))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: expected a, found b; use c\n"


def test_other_errors_keep_their_traceback_and_success_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda: fail(ZeroDivisionError()))
    run_cli(lambda: None)
    assert capsys.readouterr().err == ""


def failed(module: str, *options: object) -> list[str]:
    """Run an entry point as a user does; return the lines of its standard error."""
    command = [sys.executable, "-m", f"reward_recipes.{module}", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr + done.stdout
    return done.stderr.splitlines()


def test_audit_names_the_broken_line(gpt2_dir: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", hh_pairs(2))
    path.write_text(path.read_text() + "{broken\n")
    (line,) = failed("audit", "--dataset_name", path, "--model_name_or_path", gpt2_dir)
    assert line.startswith(f"error: unreadable data: {path}, line 3: expected one JSON object, found b'{{broken")


def test_train_names_an_unknown_key_before_anything_is_written(gpt2_dir: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", hh_pairs(2))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"dataset_name: {path}\nmodel_name_or_path: {gpt2_dir}\nmaxlength: 5\n")
    (line,) = failed("train", "--config", recipe, "--output_dir", tmp_path / "run")
    assert line == "error: unknown option: --maxlength 5; remove or correct it, `--help` lists all options"
    assert not (tmp_path / "run").exists()
