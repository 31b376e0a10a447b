"""What is in the preference pairs: counted before training, printed and saved."""

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
from datasets import Dataset

from reward_recipes.pairs.encode import Status, status_counts
from reward_recipes.pairs.prompts import KnownBy
from reward_recipes.run import numbers_of

# How prompts were found, where that was no column, message or known layout.
WORDS = {KnownBy.MARKER: "a marker in whole texts", KnownBy.BEGINNING: "the beginnings that pairs share"}


def audit_split(encoded: Dataset) -> dict[str, Any]:
    """Count what one split from `encode_splits` holds, dropped pairs included.

    Returns:
        Counts of pairs; lengths in tokens, EOS included, before any cut; shares from 0 to 1. `exact_duplicates` are
        pairs that repeat an earlier one, `contradictions` pairs that stand the other way round elsewhere (both kept:
        they are votes of annotators), `longer_chosen` is the share of unequal pairs whose chosen text has more tokens,
        `common_prefix` the share of all tokens that stand in a prefix common to both sides.
    """
    columns = [name for name in encoded.column_names if name not in ("chosen_ids", "rejected_ids")]
    table = encoded.select_columns(columns).to_pandas()
    counts = status_counts(table.status.to_numpy())
    read = table[table.status != Status.BLANK]
    used = table[table.status <= Status.CUT]
    differing = read[read.status != Status.IDENTICAL]
    lengths = pd.concat([read.chosen_length, read.rejected_length]).to_numpy()
    unequal = used[used.chosen_length != used.rejected_length]
    return {
        "pairs_read": len(table),
        "pairs_used": len(used),
        "missing_or_blank": counts[Status.BLANK],
        "identical": counts[Status.IDENTICAL],
        "identical_after_cut": counts[Status.IDENTICAL_AFTER_CUT],
        "overlong_dropped": counts[Status.OVERLONG],
        "overlong_cut": counts[Status.CUT],
        "exact_duplicates": int(differing.duplicated(["chosen_hash", "rejected_hash"]).sum()),
        "contradictions": _contradictions(differing),
        "longer_chosen": _share((unequal.chosen_length > unequal.rejected_length).sum(), len(unequal)),
        "common_prefix": _share(2 * int(used.prefix.sum()), _tokens(encoded)),
        "tokens_mean": float(lengths.mean()) if len(lengths) else None,
        "tokens_p95": float(np.percentile(lengths, 95)) if len(lengths) else None,
        "tokens_max": int(lengths.max()) if len(lengths) else None,
        **_oddities(read, used),
    }


def _oddities(read: pd.DataFrame, used: pd.DataFrame) -> dict[str, Any]:
    """Rare properties, told only where they stand."""
    found: dict[str, Any] = {name: int(read[name].sum()) for name in ("special_tokens", "left_out") if read[name].any()}
    if signs := [WORDS[sign] for sign in sorted(set(used.known_by)) if sign in WORDS]:
        found |= {"prompts": int(used.prompt_id.nunique()), "prompts_known_by": " and ".join(signs)}
    return found


def _contradictions(pairs: pd.DataFrame) -> int:
    forward = set(zip(pairs.chosen_hash, pairs.rejected_hash, strict=True))
    return sum((rejected, chosen) in forward for chosen, rejected in forward) // 2


def _tokens(encoded: Dataset) -> int:
    """Tokens of both sides as trained on, that is after any cut; dropped pairs have none."""
    ids = encoded.select_columns(["chosen_ids", "rejected_ids"]).with_format("arrow")[:]
    return sum(pc.sum(pc.list_value_length(ids[side])).as_py() for side in ids.column_names)


def _share(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None


def audit(
    encoded: Mapping[str, Dataset],
    train: Dataset,
    train_split: str,
    evaluation: Mapping[str, Dataset],
    unread: Sequence[str] = (),
    template: str = "the tokenizer",
) -> dict[str, dict[str, Any]]:
    """Audit every split that was read; count pairs elsewhere whose first turn occurs in training.

    Args:
        encoded: every split by name, dropped pairs included.
        train: the pairs to train on.
        train_split: name of the split that they come from.
        evaluation: eval sets by name, of which a held-out one is no split of the source.
        unread: columns of the source that are not used.
        template: whose chat template it is, named where that leaves something out.
    """
    report = {name: audit_split(split) for name, split in encoded.items()}
    for name, dataset in {**evaluation, **encoded}.items():  # a split whole, not what is drawn of it
        if name != train_split:
            report.setdefault(name, {"pairs_used": len(dataset)})
            report[name]["first_turn_in_train"] = int(np.isin(_used_prompts(dataset), _used_prompts(train)).sum())
    report[train_split]["pairs_trained_on"] = len(train)
    if unread:
        report[train_split]["unread_columns"] = ", ".join(unread)
    for counts in report.values():
        if counts.get("left_out"):
            counts["chat_template_of"] = template
    return report


def _used_prompts(dataset: Dataset) -> np.ndarray:
    return numbers_of(dataset, "prompt_id")[numbers_of(dataset, "status") <= Status.CUT]


def format_audit(report: dict[str, dict[str, Any]]) -> str:
    """A table for people: a line a measure, a column a split; below it words, and what is 0 in all splits."""
    measures = dict.fromkeys(measure for counts in report.values() for measure in counts)
    words = {
        measure: dict.fromkeys(counts[measure] for counts in report.values() if isinstance(counts.get(measure), str))
        for measure in measures
    }
    nothing = [name for name in measures if all(counts.get(name, 0) == 0 for counts in report.values())]
    lines = [f"{'data audit':<22}" + "".join(f"{split:>14}" for split in report)]
    for measure in measures:
        if not words[measure] and measure not in nothing:
            lines.append(f"{measure:<22}" + "".join(f"{_cell(counts.get(measure)):>14}" for counts in report.values()))
    lines += [f"{measure:<22}  {'; '.join(said)}" for measure, said in words.items() if said]
    if nothing:
        lines += wrap(f"{'none of these':<24}{', '.join(nothing)}", 79, subsequent_indent=24 * " ")
    return "\n".join(lines)


def _cell(value: float | int | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.1%}" if value <= 1 else f"{value:.1f}"
