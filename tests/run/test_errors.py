"""A mistake ends in one line on standard error and status 2, without a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import hh_pairs, write_jsonl

from reward_recipes import audit
from reward_recipes.run import UserError, run_cli


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


def test_audit_names_the_broken_line(
    gpt2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", hh_pairs(2))
    path.write_text(path.read_text() + "{broken\n")
    monkeypatch.setattr(sys, "argv", ["audit", "--dataset_name", str(path), "--model_name_or_path", str(gpt2_dir)])
    with pytest.raises(SystemExit) as stopped:
        run_cli(audit.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith("error: ")
    assert f"{path}, line 3: " in line and "found b'{broken" in line


def test_a_process_of_its_own_ends_with_one_line_and_status_2(gpt2_dir: Path, tmp_path: Path) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"good": "a", "bad": "b"}])
    command = [sys.executable, "-m", "reward_recipes.train", "--dataset_name", str(pairs), "--bf16", "false"]
    command += ["--model_name_or_path", str(gpt2_dir), "--max_length", "64", "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    assert errors[-1].startswith("error:") and "found ['bad', 'good']" in errors[-1]
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
