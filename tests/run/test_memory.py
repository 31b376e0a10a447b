"""A process on a CPU uses the memory that tensors free again, in place of asking the kernel for pages each step."""

import resource
import sys

import pytest
import torch
from whole_runs import in_child

from reward_recipes.run import keep_freed_memory

PAGES_OF_A_STEP = 3 * 40_000_000 // resource.getpagesize()


def print_page_faults() -> None:
    """How many pages the kernel hands out in the last of eight steps, each with three tensors of 40 MB."""
    keep_freed_memory()
    for step in range(8):
        if step == 7:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        held = [torch.ones(10_000_000) for _ in range(3)]
        del held
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


@pytest.mark.skipif(sys.platform != "linux" or torch.accelerator.is_available(), reason="concerns CPUs on Linux")
def test_memory_that_a_step_frees_serves_the_next_one() -> None:
    status, printed = in_child(print_page_faults)
    assert status == 0, printed
    assert int(printed) < PAGES_OF_A_STEP / 10
