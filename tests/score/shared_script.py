"""What one process and two score and evaluate alike. Run by `test_shared.py` in itself and by torchrun."""

import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState

from reward_recipes.evaluate.__main__ import main as evaluate
from reward_recipes.run import UserError
from reward_recipes.score import Scorer
from reward_recipes.score import rows as rows_module
from reward_recipes.score.__main__ import main as score


def call(door: Any, **options: object) -> None:
    """Call an entry point as from the command line."""
    sys.argv = ["door", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
    door()


def main(folder: Path, source: Path, model: Path, pairs: Path) -> None:
    """Score whole, with an error on one process, and killed in the third block and resumed; then evaluate."""
    rows_module.ROWS_AT_ONCE = 4
    asked = {"model_name_or_path": model, "input": source / "lines.jsonl"}
    call(score, **asked, output=folder / "whole.jsonl")
    blocks, score_ids, state = iter(range(99)), Scorer.score_ids, PartialState()

    def broken(*args: Any) -> Any:
        if state.is_last_process:
            raise UserError("broken")
        return score_ids(*args)

    def killed(*args: Any) -> Any:
        if next(blocks) == 2:
            raise KeyboardInterrupt
        return score_ids(*args)

    # A process hears of another's error; the one that writes ends with status 130.
    for name, work, ends in (("broken", broken, UserError), ("again", killed, (KeyboardInterrupt, SystemExit))):
        Scorer.score_ids = work
        with pytest.raises(ends):
            call(score, **asked, output=folder / f"{name}.jsonl")
    Scorer.score_ids = score_ids
    assert (folder / "again.jsonl.progress").exists()
    state.wait_for_everyone()  # both see the note before the first one goes on and takes it away
    call(score, **asked, output=folder / "again.jsonl", resume=True)
    for name, data in (("pairs", pairs), ("answers", source / "answers")):
        call(evaluate, model_name_or_path=model, dataset_name=data, output_dir=folder / name)
    state.print(f"{state.num_processes} processes of {state.distributed_type.value}")
    state.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]))
