"""Hostile or broken input ends in one clear line, or is counted and dropped: no traceback, no hang, no wrong pair."""

import gzip
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import POSITIONS, hh_pairs, save_reward_model
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, ScriptArguments

from reward_recipes.config import RewardRecipeConfig, parse_recipe
from reward_recipes.packing.collators import PackedCollator, PaddedCollator
from reward_recipes.packing.tap import ScoreTap
from reward_recipes.pairs.audit import audit_split
from reward_recipes.pairs.encode import Status, encode_pairs
from reward_recipes.pairs.source import checked_pairs, is_conversational, load_pairs
from reward_recipes.pairs.tokens import encode_dialogues, encode_texts, load_tokenizer
from reward_recipes.run.errors import UserError
from reward_recipes.score.__main__ import score_stream
from reward_recipes.score.scorer import Scorer, load_scorer

SECONDS = 30  # after which a case counts as a hang, on a machine that has other work
GOOD = hh_pairs(3)
LINES = [json.dumps(pair).encode() for pair in GOOD]
LONG = "x" * 1_000_000  # without a space


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    """End a case that hangs."""

    def fail(*args: object) -> None:
        pytest.fail(f"no end after {SECONDS} s")  # derives from BaseException, so that no reader takes it for its own

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def plain(gpt2_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(gpt2_dir))


@pytest.fixture(scope="module")
def chat(chat_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(chat_dir))


def way(path: Path, plain: PreTrainedTokenizerBase, chat: PreTrainedTokenizerBase) -> tuple[Any, Any, dict[str, Any]]:
    """From a file to the audit, as a run goes: checked pairs, tokenised pairs, counts."""
    pairs = checked_pairs(load_pairs(str(path))["train"], "here")
    tokenizer = chat if is_conversational(pairs.features) else plain
    subsets = sorted({str(name) for name in pairs.unique("subset")}) if "subset" in pairs.column_names else []
    encoded = encode_pairs(pairs, tokenizer, 64, "drop", subsets)
    return pairs.to_list(), encoded.to_list(), audit_split(encoded)


def same(given: Any, read: Any) -> bool:
    """Whether what was read is what the file says: text or nothing as it is, messages by role and content."""
    if not isinstance(given, list) or not isinstance(read, list):
        return type(given) is type(read) and given == read
    turns = [[m and (m.get("role"), m.get("content")) for m in side] for side in (given, read)]
    return turns[0] == turns[1]


def without_eos(text: str) -> str:
    while text.rstrip().endswith("<|endoftext|>"):
        text = text.rstrip().removesuffix("<|endoftext|>")
    return text


def whole_text(row: dict[str, Any], side: str) -> str:
    return (row.get("prompt") or "") + row[side]


def hold_against(rows: list[Any], pairs: list[Any], encoded: list[Any], counts: dict[str, Any], plain: Any) -> None:
    """Every row of the file is there as it was given, and is used as it was given or counted as dropped."""
    assert len(rows) == len(pairs) == len(encoded) == counts["pairs_read"]
    dropped = ("missing_or_blank", "identical", "identical_after_cut", "overlong_dropped")
    assert counts["pairs_used"] + sum(counts[reason] for reason in dropped) == len(rows)
    for row, pair, record in zip(rows, pairs, encoded, strict=True):
        assert all(same(row.get(name), pair.get(name)) for name in ("prompt", "chosen", "rejected"))
        used = record["status"] <= Status.CUT
        assert used == bool(record["chosen_ids"])
        for side in ("chosen", "rejected") if used else ():
            ids = record[f"{side}_ids"]
            assert len(ids) <= 64 and not {plain.pad_token_id, *range(plain.vocab_size, 10**6)} & set(ids)
            if isinstance(row[side], str):
                assert ids[-1] == plain.eos_token_id and plain.decode(ids[:-1]) == without_eos(whole_text(row, side))
        if "margin" in record:
            assert record["margin"] == pytest.approx(row["margin"])


def is_sound(row: Any) -> bool:
    """Whether nobody could object to a row of texts; what other columns hold may be too much for a reader."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except ValueError:  # half a surrogate pair, in a key say
        return False
    texts = [row.get("chosen"), row.get("rejected"), *(row.get(name, "") for name in ("prompt", "subset", "other"))]
    sound = all(isinstance(text, str) and text.isprintable() and not text[:1].isdigit() for text in texts)
    margin = row.get("margin", 0)
    return sound and isinstance(margin, (int, float)) and not isinstance(margin, bool) and abs(margin) < 1e30


def python_reads(line: bytes) -> Any:
    """A row as Python's own reader sees it; None where it sees no JSON object with each key once."""

    def once(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(items)) < len(items):
            raise ValueError("a key twice")
        return dict(items)

    with suppress(ValueError, RecursionError):
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=once)
        return row if isinstance(row, dict) else None


def survives(path: Path, content: bytes, plain: Any, chat: Any) -> str:
    """Take JSON lines to the audit and hold the result against Python's own reading; the message, or nothing."""
    rows = [python_reads(line) for line in content.splitlines() if line.strip()]
    try:
        pairs, encoded, counts = way(path, plain, chat)
    except UserError as error:
        assert str(error) and not (rows and all(row and is_sound(row) for row in rows))
        return str(error)
    assert None not in rows
    hold_against(rows, pairs, encoded, counts, plain)
    return ""


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


# As they stand in the file: some are no JSON, or none that Python's reader would write.
VALUES = {
    "null": "null",
    "number": "7",
    "nan": "NaN",
    "over float64": "1e400",
    "over all bounds": "1" * 5000,
    "blank": r'" \n\t"',
    "nul": r'"a\u0000b"',
    "half a pair": r'"\ud800"',
    "whole pair": r'"\ud83d\ude00"',
    "list": "[]",
    "list of lists": "[[]]",
    "messages": '[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]',
    "message of a number": '[{"role": "user", "content": 3}]',
    "parts": '[{"role": "user", "content": [{"type": "text", "text": "a"}]}]',
    "nested": '{"a": {"b": [1, {"c": 2}]}}',
    "nested 500 deep": nested(500),
    "special": '"<|endoftext|>a<|pad|>b<|endoftext|>"',
    "1 MB without a space": f'"{LONG}"',
}
FIELDS = ("chosen", "rejected", "prompt", "margin", "subset", "other")


def line_with(field: str, value: str) -> bytes:
    """A pair of which one field holds a value as it stands."""
    sides = {"chosen": '"a b"', "rejected": '"a c"'} | {field: value}
    return ("{" + ", ".join(f'"{name}": {text}' for name, text in sides.items()) + "}\n").encode()


@pytest.mark.parametrize("field", FIELDS)
def test_some_value_in_any_field(field: str, plain: Any, chat: Any, tmp_path: Path) -> None:
    """A seeded handful of the above for every run of the suite."""
    for number, value in enumerate(random.Random(field).sample(sorted(VALUES), 4)):
        content = b"\n".join([*LINES, line_with(field, VALUES[value])])
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(content)
        survives(path, content, plain, chat)


WHOLE = b"\n".join(LINES) + b"\n"
UNREADABLE = {
    "a key twice": b'{"chosen": "a", "chosen": "b", "rejected": "c"}\n',
    "comma at the end": WHOLE + b'{"chosen": "a", "rejected": "d",}\n',
    "nul in a text": b'{"chosen": "a\0b", "rejected": "d"}\n',
    "nothing but nul": b"\0" * 5000,
    "Latin-1": '{"chosen": "café", "rejected": "d"}\n'.encode("latin-1"),
    "UTF-16": WHOLE.decode().encode("utf-16"),
    "cut off": WHOLE[:-20],
    "nothing but null": b"null\n",  # Arrow's reader alone would end the process
    "a pointer to the file": b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n",
    "a table": b"chosen,rejected\na,b\n",
    "nested 2000 deep": WHOLE + b'{"chosen": "a", "rejected": "d", "x": ' + nested(2000).encode() + b"}\n",
    "byte order mark among rows": WHOLE + b"\xef\xbb\xbf" + WHOLE,
    "text, then messages": WHOLE + line_with("chosen", VALUES["messages"]),
    "a margin too few": line_with("margin", "1") + WHOLE,
    "no rows but blank ones": b"\n \n\n",
    "other capitals": b'{"Chosen": "a", "rejected": "c"}\n',
}
READABLE = {
    "no line break at the end": (WHOLE[:-1], 3),
    "byte order mark and CRLF": (b"\xef\xbb\xbf" + WHOLE.replace(b"\n", b"\r\n"), 3),
    "blank lines": (b"\n\n" + WHOLE.replace(b"\n", b"\n\n"), 3),
    "other line separators in a text": ('{"chosen": "a\u2028b\x85c", "rejected": "d"}\n'.encode(), 1),
    "1 MB without a space": (line_with("chosen", f'"{LONG}"') + WHOLE, 3),
    "1 MB of EOS and text": (line_with("chosen", '"' + "<|endoftext|> " * 80_000 + 'a"') + WHOLE, 3),
    "a dialogue of pads": (
        line_with("chosen", json.dumps([{"role": "user", "content": "a<spare_0>" * 50_000}])).replace(
            b'"a c"', b'[{"role": "user", "content": "b"}]'
        ),
        0,
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_lines_that_cannot_be_read_are_an_error(name: str, plain: Any, chat: Any, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(UNREADABLE[name])
    assert survives(tmp_path / "x.jsonl", UNREADABLE[name], plain, chat)


@pytest.mark.parametrize("name", READABLE)
def test_odd_lines_are_read_as_they_are(name: str, plain: Any, chat: Any, tmp_path: Path) -> None:
    content, used = READABLE[name]
    (tmp_path / "x.jsonl").write_bytes(content)
    assert survives(tmp_path / "x.jsonl", content, plain, chat) == ""
    assert way(tmp_path / "x.jsonl", plain, chat)[2]["pairs_used"] == used


DOCUMENTS = {
    "columns": (b'{"chosen": ["a", "b"], "rejected": ["c", "d"]}', "expected"),
    "one object": (b'{"chosen": "a", "rejected": "d"}', 1),
    "wrapped": (b'{"data": [{"chosen": "a", "rejected": "d"}]}', "expected columns"),
    "no rows": (b"[]", "expected"),
    "a key twice": (b'[{"chosen": "a", "chosen": "b", "rejected": "c"}]', "twice"),
    "a number among rows": (b'[{"chosen": "a", "rejected": "b"}, 7]', "row 1: expected a JSON object, found int"),
    "cut off": (b'[{"chosen": "a", "rejected": "b"}, {"cho', "line 1"),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_json_document_is_rows_or_an_error(name: str, plain: Any, chat: Any, tmp_path: Path) -> None:
    content, expected = DOCUMENTS[name]
    (tmp_path / "x.json").write_bytes(content)
    if isinstance(expected, int):
        assert way(tmp_path / "x.json", plain, chat)[2]["pairs_used"] == expected
    else:
        with pytest.raises(UserError, match=expected):
            way(tmp_path / "x.json", plain, chat)


ZIPPED = gzip.compress(WHOLE, mtime=0)
ARCHIVES = {
    "whole": (ZIPPED, 3),
    "two members": (ZIPPED + ZIPPED, 6),
    "its end gone": (ZIPPED[:-9], "x.jsonl.gz: "),
    "a wrong sum": (ZIPPED[:-8] + b"\0" * 8, "x.jsonl.gz: "),
    "nothing in it": (gzip.compress(b""), "without rows"),
    "not zipped": (WHOLE, "Not a gzipped file"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_is_whole_or_an_error(name: str, plain: Any, chat: Any, tmp_path: Path) -> None:
    content, expected = ARCHIVES[name]
    (tmp_path / "x.jsonl.gz").write_bytes(content)
    if isinstance(expected, int):
        assert way(tmp_path / "x.jsonl.gz", plain, chat)[2]["pairs_used"] == expected
    else:
        with pytest.raises(UserError, match=expected):
            way(tmp_path / "x.jsonl.gz", plain, chat)


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A file after one of the accidents that befall files."""
    place, other = sorted(rng.randrange(len(content)) for _ in range(2))
    return rng.choice(
        [
            content[:place],
            content[place:],
            content[:place] + content[other:],
            content[:other] + content[place:],
            content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :],
            content[:place] + rng.choice([b"\0", b'"', b"\\", b"{", b"]", b"\n", b"\r", b"\xff"]) + content[place:],
        ]
    )


@pytest.mark.reliability
@pytest.mark.parametrize("seed", range(12))
def test_damaged_lines(seed: int, plain: Any, chat: Any, tmp_path: Path) -> None:
    content = mutated(WHOLE, random.Random(seed))
    (tmp_path / "x.jsonl").write_bytes(content)
    survives(tmp_path / "x.jsonl", content, plain, chat)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
TURNS = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "a", ""]), "content": st.text(max_size=20)}))
ROWS = st.lists(
    st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES | st.text(max_size=20) | TURNS, max_size=6), max_size=4
)
QUICK = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.reliability
@QUICK
@given(rows=ROWS, escaped=st.booleans())
def test_any_rows(rows: list[dict[str, Any]], escaped: bool, plain: Any, chat: Any) -> None:
    lines = [json.dumps(row, ensure_ascii=escaped).encode(errors="surrogatepass") for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.jsonl"
        path.write_bytes(b"\n".join(lines))
        survives(path, path.read_bytes(), plain, chat)


TEXT = pa.string()
MESSAGES = pa.list_(pa.struct([("role", TEXT), ("content", TEXT)]))
NOT_UTF8 = pa.Array.from_buffers(
    TEXT, 2, [None, pa.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0])), pa.py_buffer(b"\xff\xfeab")]
)
SIDES = {"chosen": pa.array(["a b", "c"]), "rejected": pa.array(["d", "e"])}
ARRAYS = {
    "ints": pa.array([1, 2]),
    "not UTF-8": NOT_UTF8,
    "decimals": pa.array([1, 2], pa.decimal128(5, 2)),
    "structs": pa.array([{"role": "user", "content": "Q"}] * 2),
    "messages": pa.array([[{"role": "user", "content": "Q"}], []], MESSAGES),
    "from and value": pa.array([[{"from": "user", "value": "a"}]] * 2),
    "overlong ints": pa.array([2**64 - 1, 1], pa.uint64()),
    "infinities": pa.array([float("inf"), -float("inf")]),
    "too large": pa.array([1e39, 1.0]),
    "nulls": pa.nulls(2),
    "null and text": pa.array([None, "a"]),
}
# Which of them a column may be, and how many of the two pairs are then used.
FITS = {
    ("chosen", "nulls"): 0,
    ("chosen", "null and text"): 1,
    ("prompt", "nulls"): 0,
    ("prompt", "null and text"): 1,
    ("margin", "ints"): 2,
    ("margin", "overlong ints"): 2,
}


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("column", ["chosen", "margin"])
def test_parquet_columns_of_any_type(column: str, kind: str, plain: Any, chat: Any, tmp_path: Path) -> None:
    pq.write_table(pa.table(SIDES | {column: ARRAYS[kind]}), tmp_path / "x.parquet")
    if (column, kind) in FITS:
        pairs, encoded, counts = way(tmp_path / "x.parquet", plain, chat)
        hold_against(pa.table(SIDES | {column: ARRAYS[kind]}).to_pylist(), pairs, encoded, counts, plain)
        assert counts["pairs_used"] == FITS[column, kind]
    else:
        with pytest.raises(UserError):
            way(tmp_path / "x.parquet", plain, chat)


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(SIDES), sink)
    return sink.getvalue()


def damaged_parquet() -> dict[str, bytes]:
    """Cut, spoilt in its footer, or changed in a few seeded bytes."""
    whole = parquet()
    files = {f"first {size} bytes": whole[:size] for size in (0, 4, 12, len(whole) // 2)}
    files |= {f"last {size} bytes gone": whole[:-size] for size in (1, 8)}
    files |= {
        "bytes after it": whole + b"xx",
        "bytes before it": b"xx" + whole,
        "zeros": b"\0" * 1000,
        "a long footer": whole[:-8] + b"\xff\xff\xff\x7fPAR1",
        "a negative footer": whole[:-8] + b"\xff\xff\xff\xffPAR1",
        "encrypted": whole[:-4] + b"PARE",
        "lines": WHOLE,
        "zipped": gzip.compress(whole),
    }
    for seed in range(6):
        rng, changed = random.Random(seed), bytearray(whole)
        for _ in range(rng.choice([1, 3, 10])):
            changed[rng.randrange(4, len(whole) - 8)] = rng.randrange(256)
        files[f"changed by seed {seed}"] = bytes(changed)
    return files


@pytest.mark.parametrize("name", damaged_parquet())
def test_damaged_parquet(name: str, plain: Any, chat: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(damaged_parquet()[name])
    try:
        pairs, encoded, counts = way(path, plain, chat)
    except UserError as error:
        assert str(error)
        return
    assert not name.startswith(("first", "last"))
    hold_against(pq.read_table(path).to_pylist(), pairs, encoded, counts, plain)  # what pyarrow alone reads


def test_what_is_no_file_of_pairs_is_an_error(plain: Any, chat: Any, tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "gone")
    (tmp_path / "ring.jsonl").symlink_to(tmp_path / "ring.jsonl")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "train.jsonl").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe.jsonl")
    names = ["folder.jsonl", "dangling.jsonl", "ring.jsonl", "linked", "pipe.jsonl", "x" * 300 + ".jsonl", "a\0b.jsonl"]
    for name in [*(f"{tmp_path}/{name}" for name in names), "", " ", "~nobody-of-that-name/x.jsonl", "/dev/null"]:
        with pytest.raises(UserError):
            way(name, plain, chat)


@pytest.mark.parametrize("odd", [b'{"chosen": 1, "rejected": 2.5}', b'{"chosen": {"a": 1}, "rejected": {"b": "x"}}'])
def test_what_is_no_text_in_a_second_file_is_not_made_one(odd: bytes, plain: Any, chat: Any, tmp_path: Path) -> None:
    (tmp_path / "train-0.jsonl").write_bytes(WHOLE)
    (tmp_path / "train-1.jsonl").write_bytes(odd)
    with pytest.raises(UserError, match=r"train-1\.jsonl, line 1: expected text or messages in 'chosen'"):
        way(tmp_path, plain, chat)


def test_numbers_in_a_second_parquet_file_are_not_made_text(plain: Any, chat: Any, tmp_path: Path) -> None:
    for number, values in enumerate([["a", "b"], [1.5, 2.5]]):
        pq.write_table(pa.table(SIDES | {"chosen": pa.array(values)}), tmp_path / f"train-{number}.parquet")
    with pytest.raises(UserError, match=r"train-1\.parquet: expected text or messages in 'chosen', found double"):
        way(tmp_path, plain, chat)


BOMB = b"a: &a [x, x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (97 + i, 97 + i, b", ".join([b"*%c" % (96 + i)] * 10)) for i in range(1, 12)
)
RECIPES = {
    "a bomb of lists": (BOMB, "alias"),
    "a key twice": (b"learning_rate: 1.0e-5\nlearning_rate: 1.0e-3\n", "'learning_rate' twice"),
    "an inner key twice": (b"model_init_kwargs: {a: 1, a: 2}\n", "'a' twice"),
    "a Python object": (b"seed: !!python/object/apply:os.mkdir [code-ran]\n", "could not determine a constructor"),
    "a date": (b"run_name: 2020-01-01\n", "run_name: expected text"),
    "nested 5000 deep": (b"eval_splits: " + b"[" * 5000 + b"]" * 5000, "RecursionError"),
    "two documents": (b"seed: 1\n---\nseed: 2\n", "single document"),
    "a list as a key": (b"? [a]\n: 1\n", "unhashable"),
    "a number as a key": (b"1: 2\n", "keywords must be strings"),
    "Latin-1": (b"run_name: caf\xe9\n", "can't decode"),
    "text": (b"just text\n", "must contain a YAML mapping, found str"),
    "NaN": (b"learning_rate: .nan\n", "learning_rate: expected a number, found nan"),
    "a float over float64": (b"learning_rate: 1" + b"0" * 400 + b"\n", "learning_rate: expected a number"),
    "Norway": (b"eval_strategy: no\n", None),
    "a byte order mark and CRLF": (b"\xef\xbb\xbfseed: 3\r\n", None),
    "an alias of a number": (b"logging_steps: &n 5\neval_steps: *n\n", "alias"),
    "20,000 options": (b"".join(b"k%d: 1\n" % i for i in range(20_000)), "unknown option"),
    "an option of the parser": (b"config: other.yaml\n", "unknown option: --config"),
}


def parsed(path: Path) -> tuple[Any, ...]:
    return parse_recipe(["--config", str(path), "--dataset_name", "d", "--model_name_or_path", "m", "--bf16", "false"])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_plain_or_an_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, message = RECIPES[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given.yaml").write_bytes(content)
    if message is None:
        parsed(tmp_path / "given.yaml")
    else:
        with pytest.raises(UserError, match=message):
            parsed(tmp_path / "given.yaml")
    assert not (tmp_path / "code-ran").exists()


OPTIONS = sorted(spec.name for kind in (ScriptArguments, RewardRecipeConfig, ModelConfig) for spec in fields(kind))
ODD = [
    None,
    True,
    -1,
    0,
    2.5,
    2**70,
    float("inf"),
    float("nan"),
    "",
    "odd",
    "\0",
    "a" * 5000,
    [],
    [None],
    [[1]],
    {},
    {"a": {}},
]
NOT_TRIED = {"deepspeed", "ddp_backend", "local_rank", "torch_compile"}  # they set up processes or a compiler


@pytest.mark.reliability
@pytest.mark.parametrize("part", range(8))
def test_any_value_of_any_option_is_taken_or_an_error(part: int, tmp_path: Path) -> None:
    """Every option with three odd values, drawn by seed."""
    taken = 0
    for name in OPTIONS[part::8]:
        for value in random.Random(name).sample(ODD, 3) if name not in NOT_TRIED else ():
            (tmp_path / "given.yaml").write_text(yaml.safe_dump({name: value}))
            with suppress(UserError):
                parsed(tmp_path / "given.yaml")
                taken += 1
    assert taken


@pytest.mark.reliability
@QUICK
@given(content=st.binary(max_size=60) | st.text(alphabet="a:-&*!?[]{}|>%@`'\"\n \t0.e~<", max_size=40).map(str.encode))
def test_any_bytes_as_a_recipe(content: bytes) -> None:
    """Either an error that says something, or what PyYAML itself reads as a mapping."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "given.yaml"
        path.write_bytes(content)
        try:
            parsed(path)
        except UserError as error:
            assert str(error).strip()
        else:
            assert isinstance(yaml.safe_load(content), dict)


@pytest.fixture(scope="module")
def judge(reward_dir: Path) -> Scorer:
    return load_scorer(str(reward_dir))


@pytest.fixture(scope="module")
def chat_judge(chat_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return load_scorer(str(save_reward_model(chat_dir, tmp_path_factory.mktemp("rewards") / "chat", max_length=128)))


SCORED = ("text", "messages", "response", "responses", "prompt", "other")


def score_line(field: str, value: str) -> str:
    given = {"response": '"b"'} if field == "prompt" else {"prompt": '"a"'} if field.startswith("response") else {}
    if field == "other":
        given = {"text": '"a"'}
    return "{" + ", ".join(f'"{name}": {text}' for name, text in (given | {field: value}).items()) + "}"


@pytest.mark.parametrize("field", SCORED)
def test_any_line_to_score_is_scored_or_told(field: str, chat_judge: Scorer) -> None:
    """Each odd value among sound lines, in one stream: the sound ones score as they do alone."""
    sound = '{"text": "Yes."}'
    lines = [line for value in VALUES.values() for line in (sound, score_line(field, value))]
    sink = io.StringIO()
    counts = score_stream(chat_judge, iter(lines), sink, "skip")
    records = [json.loads(line) for line in sink.getvalue().splitlines()]
    assert len(records) == sum(counts.values()) == 2 * len(VALUES)
    assert counts["bad"] == sum("error" in record for record in records)
    alone = chat_judge.score(["Yes."])[0]
    assert all(record["reward"] == pytest.approx(alone, abs=1e-5) for record in records[::2])
    for value, record in zip(VALUES, records[1::2], strict=True):
        given = [record.get("reward", record.get("rewards"))] if "error" not in record else []
        numbers = [n for part in given for n in (part if isinstance(part, list) else [part])]
        assert all(n is None or math.isfinite(n) for n in numbers), value


def test_a_line_to_score_with_a_key_twice_is_told(judge: Scorer) -> None:
    with pytest.raises(UserError, match=r"line 1: .*'text' twice"):
        score_stream(judge, iter(['{"text": "a", "text": "b"}']), io.StringIO(), "stop")


# Texts of an attacker, or of a careless export: they look like the end, like padding, like a turn.
PARTS = [
    "<|endoftext|>",
    "<|pad|>",
    "<spare_0>",
    "<|im_end|>",
    "<|im_start|>",
    "<|im_start|>assistant\n",
    "<|im_end|>\n",
]
PARTS += [" ", "\n", "a", "Yes. ", "<|", "\n\nAssistant:", "</s>", "<s>"]
TEXTS = ["".join(random.Random(seed).choices(PARTS, k=seed % 9)) for seed in range(60)]


def by_hand(judge: Scorer, ids: list[int]) -> float:
    """The score head on the last hidden state of a text alone, unpadded."""
    with torch.no_grad():
        hidden = judge.model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        return float(judge.model.score.weight[0] @ hidden)


def hold_ids(judge: Scorer, ids: list[int]) -> None:
    assert ids[-1] == judge.tokenizer.eos_token_id and judge.tokenizer.pad_token_id not in ids


@pytest.mark.parametrize("kind", ["judge", "chat_judge"])
def test_special_strings_do_not_move_the_score(kind: str, request: pytest.FixtureRequest) -> None:
    """Texts and dialogues, padded and packed, alone and in groups: the score is the one at the last token, EOS."""
    judge = request.getfixturevalue(kind)
    judge = Scorer(judge.model, judge.tokenizer, max_length=POSITIONS)
    texts = encode_texts(judge.tokenizer, TEXTS)
    for text, ids in zip(TEXTS, texts, strict=True):
        hold_ids(judge, ids)
        assert ids.count(judge.tokenizer.eos_token_id) == 1
        assert judge.tokenizer.decode(ids[:-1]) in text
    expected = [by_hand(judge, ids) for ids in texts]
    assert judge.score(TEXTS) == pytest.approx(expected, abs=1e-4)
    groups = [[f"Q: {TEXTS[i]}", f"Q: {TEXTS[i + 1]}", f"Q: {TEXTS[i]}!"] for i in range(0, 60, 2)]
    ids = [encode_texts(judge.tokenizer, group) for group in groups]
    for found, group in zip(judge.score_groups(groups), ids, strict=True):
        assert found == pytest.approx([by_hand(judge, text) for text in group], abs=1e-4)
    assert judge._tap is not None  # they were packed


def test_special_strings_in_messages_do_not_move_the_score(chat_judge: Scorer) -> None:
    dialogues = [
        [{"role": "user", "content": TEXTS[i]}, {"role": "assistant", "content": f"{TEXTS[i + 1]}a"}]
        for i in range(0, 60, 2)
    ]
    encoded = encode_dialogues(chat_judge.tokenizer, dialogues)
    for ids in encoded:
        hold_ids(chat_judge, ids)
    expected = [by_hand(chat_judge, ids) for ids in encoded]
    assert chat_judge.score(dialogues) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["judge", "chat_judge"])
def test_special_strings_do_not_move_the_score_in_training(kind: str, request: pytest.FixtureRequest) -> None:
    """The batches of a run, padded as TRL pads them and packed."""
    judge = request.getfixturevalue(kind)
    rows = [{"chosen": f"Q {TEXTS[i]}", "rejected": f"Q {TEXTS[i + 1]}"} for i in range(0, 60, 2)]
    encoded = encode_pairs(Dataset.from_list(rows), judge.tokenizer, POSITIONS, "drop", [])
    pairs = [pair for pair in encoded.to_list() if pair["status"] == Status.KEPT]
    texts = [pair[side] for side in ("chosen_ids", "rejected_ids") for pair in pairs]
    assert len(pairs) > 20
    for ids in texts:
        hold_ids(judge, ids)
    expected = [by_hand(judge, ids) for ids in texts]
    pad = judge.tokenizer.pad_token_id
    padded = PaddedCollator(pad_token_id=pad)(pairs)
    packed = PackedCollator(pad, 256)(pairs)
    tap = ScoreTap(judge.model)
    try:
        with torch.no_grad():
            names = ("input_ids", "attention_mask")
            plain = judge.model(**{name: padded[name] for name in names}).logits
            shared = tap.forward(judge.model, **packed).logits
    finally:
        tap.remove()
    assert plain.squeeze(-1).tolist() == pytest.approx(expected, abs=1e-4)
    assert shared.squeeze(-1).tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.reliability
@QUICK
@given(parts=st.lists(st.sampled_from(PARTS) | st.text(max_size=6), max_size=10))
def test_any_text_ends_in_its_one_eos(parts: list[str], plain: Any, chat: Any) -> None:
    text = "".join(parts)
    for tokenizer in (plain, chat):
        (ids,) = encode_texts(tokenizer, [text])
        assert ids.count(tokenizer.eos_token_id) == 1 == ids[::-1].index(tokenizer.eos_token_id) + 1
        assert tokenizer.pad_token_id not in ids
        kept = tokenizer.decode(ids[:-1])
        assert text.startswith(kept) and not text[len(kept) :].replace(tokenizer.eos_token, "").strip()
    dialogue = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    (ids,) = encode_dialogues(chat, [dialogue])
    assert ids[-1] == chat.eos_token_id != ids[-2] and chat.pad_token_id not in ids


@pytest.mark.reliability
def test_a_whole_command_ends_in_one_line(gpt2_dir: Path, tmp_path: Path) -> None:
    """As a user starts it: a broken line far down, status 2, no traceback, nothing written."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(WHOLE * 50 + b'{"chosen": "a", "rejected": ' + nested(5000).encode() + b"}\n")
    command = [sys.executable, "-m", "reward_recipes.train", "--dataset_name", str(path), "--bf16", "false"]
    command += ["--model_name_or_path", str(gpt2_dir), "--max_length", "64", "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "out").exists()
    assert done.stderr.splitlines()[-1].startswith(f"error: unreadable data: {path}, line 151: ")
