"""Plant each fault of `tests/README.md` in a copy of the package, one at a time, and see that its test fails.

Run by hand: `.venv/bin/python tests/plant_faults.py [WORD ...]`, for all faults or those that a word stands in. No
file of the checkout is touched. Status 1 if a fault survives, cannot be planted, or a test fails without one.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(r"\| ([^|]+) \| (\S+\.py) \| `(.+)` \| `(.+)` \| (\S+) \|")
LIMIT = 120  # seconds for one fault


def outcome(source: Path, *tests: str, limit: int | None = LIMIT) -> int | None:
    """Pytest's exit status on tests of the package in `source`; None where they took too long."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *(f"tests/{t}" for t in tests)]
    environment = os.environ | {"PYTHONPATH": str(source)}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.returncode


def planted(file: str, old: str, new: str, test: str) -> str:
    """What became of one fault."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(shutil.copytree(ROOT / "src", Path(folder) / "src"))
        path = source / "reward_recipes" / file
        text = path.read_text()
        if text.count(old) != 1:
            return f"NOT PLANTED: the text stands {text.count(old)} times in {file}"
        path.write_text(text.replace(old, new))
        return {0: "SURVIVED", 1: "caught"}.get(outcome(source, test), "NO VERDICT: no test ran, or not to its end")


def main(words: list[str]) -> int:
    """Plant the faults whose name holds one of the words, or all."""
    rows = ROW.findall((ROOT / "tests" / "README.md").read_text())
    chosen = [row for row in rows if not words or any(word in row[0] for word in words)]
    sound = outcome(ROOT / "src", *dict.fromkeys(row[-1] for row in chosen), limit=None) == 0
    print("without a fault:", "all pass" if sound else "A TEST FAILS", flush=True)
    for name, *fault in chosen:
        result = planted(*fault)
        sound &= result == "caught"
        print(f"{name}: {result}", flush=True)
    return int(not sound)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
