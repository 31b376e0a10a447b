"""A command starts quickly: a missing source is named before torch is imported, and what is needed late comes late."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import reward_recipes
from reward_recipes.early import refuse_missing_sources

ROOT = Path(reward_recipes.__file__).parents[1]
LATE = {"matplotlib", "evaluate", "scipy.stats", "sklearn", "reward_recipes.policy"}


def imports_of(name: str, seen: set[str]) -> set[str]:
    """What importing a module of ours imports, outside functions, in other modules of ours too."""
    path = ROOT / name.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if name in seen or not path.is_file():
        return seen
    seen.add(name)
    for node in ast.parse(path.read_text()).body:
        origin = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else []:
            parts = (origin + alias.name).split(".")
            for end in range(1, len(parts) + 1):
                imports_of(part := ".".join(parts[:end]), seen)
                seen.add(part)
    return seen


def test_training_begins_without_what_it_needs_later() -> None:
    found = imports_of("reward_recipes.train", set())
    assert {"torch", "scipy", "reward_recipes.evaluate.uncertainty"} <= found and not LATE & found


def test_a_missing_source_is_named_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit(9)")
    (tmp_path / "recipe.yaml").write_text("dataset_name: ./pairs\nmodel_name_or_path: gpt2\n")
    command = [sys.executable, "-m", "reward_recipes.train", "--config", "recipe.yaml"]
    paths = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: dataset_name: ") and "'./pairs'" in done.stderr
    (tmp_path / "pairs").mkdir()
    assert subprocess.run(command, cwd=tmp_path, env=os.environ | paths).returncode == 9


@pytest.mark.parametrize("value", ["/no", "~/no", "a/b/c", "no.jsonl", "a/no.jsonl", ".no", "a b"])
def test_what_can_be_no_hub_id_must_be_there(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    refuse_missing_sources(["--dataset_name", "a/b.c", "--model_name_or_path=gpt2", "--config", value])
    with pytest.raises(SystemExit, match="2"):
        refuse_missing_sources(["--dataset_name", "a/b", "--model_name_or_path", value])
    assert repr(value) in capsys.readouterr().err
