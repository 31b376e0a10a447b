"""Two processes over gloo score and evaluate what one does, in its order; a kill changes no byte of what they write."""

import json
from pathlib import Path

import pytest
import shared_script
from conftest import write_jsonl
from whole_runs import by_two_processes


@pytest.mark.reliability
def test_two_processes_equal_one(reward_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """25 lines, of which replies to one prompt stay together, in blocks of 4 and of 8: the last has one line."""
    lines = [{"text": "Yes. " * number, "id": number} for number in range(20)]
    lines += [{"prompt": f"Q{number}: ", "responses": ["a", "b" * number, "c"]} for number in range(5)]
    write_jsonl(tmp_path / "lines.jsonl", lines)
    rows = [{"prompt": f"Q{number}", "chosen": ["a", "bc"], "rejected": ["d" * number]} for number in range(1, 4)]
    write_jsonl(tmp_path / "answers" / "test.jsonl", rows)
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    shared_script.main(one, tmp_path, reward_dir, data)
    printed = by_two_processes(shared_script.__file__, *map(str, (two, tmp_path, reward_dir, data)))
    assert "2 processes of MULTI_CPU" in printed and printed.count("report: ") == 2
    for folder in (one, two):
        assert (folder / "again.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()
    scored = [map(json.loads, (folder / "whole.jsonl").read_text().splitlines()) for folder in (one, two)]
    for line, mine, other in zip(lines, *scored, strict=True):
        assert list(mine) == list(other) and mine.items() >= line.items()
        for name in ("reward", "rewards"):
            assert mine.get(name) == pytest.approx(other.get(name), abs=1e-6)
    for file in ("pairs/evaluation.json", "answers/best_of_n.json"):
        mine, other = (json.loads((folder / file).read_text()) for folder in (one, two))
        assert mine.keys() == other.keys() and mine["subsets"] == other["subsets"]
        for figure in ("accuracy", "loss", "mean_margin", "score", "length_score"):
            assert mine.get(figure) == pytest.approx(other.get(figure), abs=1e-6)
