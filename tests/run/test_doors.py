"""`python -m reward_recipes.NAME` reaches its command: a mistake in its options is one line and status 2."""

import runpy
import signal
import sys

import pytest

DOORS = ("train", "audit", "score", "evaluate", "push", "ppo", "rloo", "plot_training")


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
