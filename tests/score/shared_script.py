"""What one process and two score and evaluate alike. Run by `test_shared.py` in itself and by `accelerate launch`."""

import sys
from pathlib import Path
from typing import Any

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


def main(folder: Path, source: Path, model: Path) -> None:
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

    Scorer.score_ids = broken
    try:
        call(score, **asked, output=folder / "broken.jsonl")
        raise AssertionError("a process did not hear of another's error")
    except UserError:
        Scorer.score_ids = killed
    try:
        call(score, **asked, output=folder / "again.jsonl")
        raise AssertionError("the scoring was not stopped")
    except (KeyboardInterrupt, SystemExit):  # the process that writes ends with status 130
        Scorer.score_ids = score_ids
    assert (folder / "again.jsonl.progress").exists()
    state.wait_for_everyone()  # both see the note before the first one goes on and takes it away
    call(score, **asked, output=folder / "again.jsonl", resume=True)
    for name in ("pairs", "answers"):
        call(evaluate, model_name_or_path=model, dataset_name=source / name, output_dir=folder / name)
    state.print(f"{state.num_processes} processes of {state.distributed_type.value}")
    state.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
