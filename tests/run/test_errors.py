"""A mistake ends in one line on standard error and status 2, without a traceback, at each door."""

import re
import runpy
import signal
import sys
from pathlib import Path

import pytest
from conftest import hh_pairs, write_jsonl

from reward_recipes import audit, train
from reward_recipes.run import UserError, run_cli

DOORS = ("train", "audit", "score", "evaluate", "push", "ppo", "rloo", "plot_training")


def fail(error: Exception) -> None:
    raise error


def test_only_a_user_error_becomes_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: fail(UserError("expected a,\n  found b;\n\nuse c")))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: expected a, found b; use c\n"
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda: fail(ZeroDivisionError()))


def test_a_mistake_in_the_data_is_named(
    gpt2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *args: None)  # training would take over this process's signals
    broken, other = tmp_path / "broken.jsonl", write_jsonl(tmp_path / "other.jsonl", [{"good": "a", "bad": "b"}])
    broken.write_text(write_jsonl(broken, hh_pairs(2)).read_text() + "{broken\n")
    cases = {audit: (broken, f"{broken}, line 3: .*found b'{{broken"), train: (other, r"found \['bad', 'good'\]")}
    for command, (pairs, told) in cases.items():
        words = ["--dataset_name", str(pairs), "--model_name_or_path", str(gpt2_dir), "--bf16", "false"]
        monkeypatch.setattr(sys, "argv", ["command", *words, "--output_dir", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as stopped:
            run_cli(command.main)
        said = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2 and said.startswith("error: ")
        assert re.search(told, said), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", DOORS)
def test_a_door_leads_to_its_command(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "ppo":
        pytest.importorskip("trl.experimental.ppo", reason="PPO needs TRL 1.12")
    is_room = name in ("score", "evaluate", "push")
    monkeypatch.delitem(sys.modules, f"reward_recipes.{name}" + is_room * ".__main__", raising=False)
    monkeypatch.setattr(signal, "signal", lambda *args: None)  # training would take over this process's signals
    monkeypatch.setattr(sys, "argv", [name, "--no_such_option", "1"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(f"reward_recipes.{name}", run_name="__main__", alter_sys=True)
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and "error: " in told and "Traceback" not in told
