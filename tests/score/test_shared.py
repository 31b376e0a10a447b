"""Two processes over gloo score and evaluate what one does, in its order; a kill changes no byte of what they write."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import shared_script
import yaml
from conftest import hh_pairs, write_jsonl


@pytest.mark.reliability
def test_two_processes_equal_one(reward_dir: Path, tmp_path: Path) -> None:
    """25 lines, of which replies to one prompt stay together, in blocks of 4 and of 8: the last has one line."""
    lines = [{"text": "Yes. " * number, "id": number} for number in range(20)]
    lines += [{"prompt": f"Q{number}: ", "responses": ["a", "b" * number, "c"]} for number in range(5)]
    write_jsonl(tmp_path / "lines.jsonl", lines)
    write_jsonl(tmp_path / "pairs" / "test.jsonl", hh_pairs(7))
    rows = [{"prompt": f"Q{number}", "chosen": ["a", "bc"], "rejected": ["d" * number]} for number in range(1, 4)]
    write_jsonl(tmp_path / "answers" / "test.jsonl", rows)
    settings = {"distributed_type": "MULTI_GPU", "use_cpu": True, "num_processes": 2, "mixed_precision": "no"}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(settings))
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    shared_script.main(tmp_path / "one", tmp_path, reward_dir)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", tmp_path / "two.yaml"]
    done = subprocess.run(
        [*launch, "--main_process_port", "0", shared_script.__file__, tmp_path / "two", tmp_path, reward_dir],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "2 processes of MULTI_CPU" in done.stdout and done.stdout.count("report: ") == 2
    for folder in ("one", "two"):
        assert (tmp_path / folder / "again.jsonl").read_bytes() == (tmp_path / folder / "whole.jsonl").read_bytes()
    scored = [map(json.loads, (tmp_path / name / "whole.jsonl").read_text().splitlines()) for name in ("one", "two")]
    for number, (one, two) in enumerate(zip(*scored, strict=True)):
        assert list(one) == list(two) and one.items() >= lines[number].items()
        for name in ("reward", "rewards"):
            assert one.get(name) == pytest.approx(two.get(name), abs=1e-6)
    for name, file in (("pairs", "evaluation.json"), ("answers", "best_of_n.json")):
        one, two = (json.loads((tmp_path / side / name / file).read_text()) for side in ("one", "two"))
        assert one.keys() == two.keys() and one["subsets"] == two["subsets"]
        for figure in ("accuracy", "loss", "mean_margin", "score", "length_score"):
            assert one.get(figure) == pytest.approx(two.get(figure), abs=1e-6)
