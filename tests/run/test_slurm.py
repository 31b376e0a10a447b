"""The Slurm script, with stand-ins for Slurm's commands that run the tasks one after another."""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "launch.slurm"
SRUN = """#!/usr/bin/env bash
shift
for task in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) "$@" || status=$?
done
exit ${status:-0}
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then printf 'node7\\nnode8\\n'; else echo "$*" >> "$RECORD"; fi
"""
PYTHON = """#!/usr/bin/env bash
echo "$RANK/$WORLD_SIZE local $LOCAL_RANK at $MASTER_ADDR:$MASTER_PORT: $*" >> "$RECORD"
exit "$STATUS"
"""


@pytest.mark.parametrize("status", [0, 2, 143])
def test_each_task_is_a_trainer_and_an_interrupted_job_is_queued_again(status: int, tmp_path: Path) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", PYTHON)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "20007", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "node[7-8]"}
    slurm["SLURM_JOB_END_TIME"] = str(int(time.time()) + 3 * 3600 + 300)
    record = {"RECORD": str(tmp_path / "record"), "STATUS": str(status), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", SCRIPT, "a recipe.yaml", "--seed", "3"], env=os.environ | slurm | record, check=False, timeout=60
    )
    assert done.returncode == status
    lines = (tmp_path / "record").read_text().splitlines()
    hours = [re.search(r"--max_run_time (\S+)", line)[1] for line in lines[:4]]
    assert all(2.9 < float(each) <= 3 for each in hours)  # five minutes before the end
    words = f"-m reward_recipes.train --config a recipe.yaml --max_run_time {hours[0]} --seed 3"
    words += " --resume_from_checkpoint true"
    assert lines[:4] == [f"{rank}/4 local {rank % 2} at node7:20007: {words}" for rank in range(4)]
    assert lines[4:] == (["requeue 20007"] if status == 143 else [])
