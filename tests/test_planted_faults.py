"""The faults of `tests/README.md` can still be planted: each stands once in its file, and its test is there."""

from pathlib import Path

from plant_faults import ROOT, ROW


def test_each_fault_has_its_place_and_its_test() -> None:
    rows = ROW.findall((ROOT / "tests" / "README.md").read_text())
    assert len(rows) >= 40
    for name, file, old, new, test in rows:
        path, _, function = test.partition("::")
        assert (ROOT / "src" / "reward_recipes" / file).read_text().count(old) == 1, name
        assert old != new and f"def {function}(" in Path(ROOT, "tests", path).read_text(), name
