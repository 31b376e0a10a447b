"""Which checkpoints count: those whose files are all there, as the manifest that is written last says."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from reward_recipes.run.files import replacing

MANIFEST = "manifest.json"
_PREFIX = "checkpoint-"


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, the oldest first."""
    found = [path for path in output_dir.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=step_of)


def write_manifest(checkpoint: Path) -> None:
    """Write the manifest of a checkpoint that holds all its files: from then on it counts."""
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST)
    files = {
        path.relative_to(checkpoint).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in paths
    }
    with replacing(checkpoint / MANIFEST) as partial:
        partial.write_text(json.dumps(files, indent=2) + "\n")


def find_damage(checkpoint: Path) -> str | None:
    """Why a checkpoint does not count, in words; None if it is whole."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())
        for name, expected in files.items():
            size = (checkpoint / name).stat().st_size
            if size != expected["size"]:
                return f"{name} has {size:,} of {expected['size']:,} bytes"
        changed = (name for name, expected in files.items() if _sha256(checkpoint / name) != expected["sha256"])
        return next((f"{name} is not as it was written" for name in changed), None)
    except FileNotFoundError as error:
        missing = Path(error.filename).relative_to(checkpoint)
        return "it was not written to its end" if missing.name == MANIFEST else f"{missing} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"its {MANIFEST} cannot be read"


def latest_valid(output_dir: Path, say: Callable[[str], None] = lambda line: None) -> Path | None:
    """The checkpoint to resume from; `say` gets a line about each newer one that is skipped."""
    for checkpoint in reversed(checkpoints(output_dir)):
        problem = find_damage(checkpoint)
        if problem is None:
            return checkpoint
        say(f"skipping {checkpoint}: {problem}")
    return None


def delete_after(step: int, output_dir: Path) -> None:
    """Delete what a run that goes on after `step` will write anew."""
    for checkpoint in checkpoints(output_dir):
        if step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
