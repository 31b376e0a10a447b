"""Hostile or broken input ends in one clear line that names the file; odd but sound input is read as it stands.

Data, recipes and lines to score: no traceback, no hang, no wrong pair, no score moved by what a text holds.
"""

import bz2
import gzip
import io
import json
import lzma
import math
import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import POSITIONS, hh_pairs, save_reward_model
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import ModelConfig, ScriptArguments

from reward_recipes.config import RewardRecipeConfig, parse_recipe
from reward_recipes.pairs import encode_splits, load_pairs, load_tokenizer
from reward_recipes.run import UserError
from reward_recipes.score import Scorer, load_scorer
from reward_recipes.score.rows import Asked, score_rows

SECONDS = 30  # after which a case counts as a hang, on a machine that has other work


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


def turns(*contents: object) -> list[dict[str, Any]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def lines(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def row(**columns: Any) -> bytes:
    return lines({"chosen": "a", "rejected": "b"} | columns)


def parquet(**columns: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"chosen": ["a b", "c"], "rejected": ["d", "e"]} | columns), sink)
    return sink.getvalue()


GOOD = hh_pairs(3)
CHAT = {"chosen": turns("Q", "A"), "rejected": turns("Q", "B")}
WHOLE, ZIPPED, TABLE = lines(*GOOD), gzip.compress(lines(*GOOD), mtime=0), parquet()
CUT_OFF = WHOLE + b'{"chosen": "cut off\n'
DEEP = b"[" * 2000 + b"]" * 2000
NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 2, [None, pa.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0])), pa.py_buffer(b"\xff\xfeab")]
)

MALFORMED = [
    ("x.jsonl", CUT_OFF, "line 4"),
    ("x.jsonl.gz", gzip.compress(CUT_OFF), "line 4"),
    ("x.json", CUT_OFF, "line 4"),
    ("x.json", b'[\n{"chosen": "a",\n"rejected" "b"}]', "line 3"),
    ("x.json", b'[{"chosen": "a", "rejected": "b"}, 7]', "row 1"),
    ("x.json", b'{"data": [{"chosen": "a", "rejected": "d"}]}', "columns"),
    ("x.json", b'[{"chosen": "a", "chosen": "b", "rejected": "c"}]', "twice"),
    ("x.json", b"[]", "rows"),
    ("x.json", DEEP, "nested"),
    ("x.jsonl", b"\n \n\n", "rows"),
    ("x.jsonl", b"null\n", "line 1"),  # Arrow's reader would end the process
    ("x.jsonl", WHOLE + b"null\n", "line 4"),
    ("x.jsonl", WHOLE + b'{"chosen": "\\ud800", "rejected": "b"}\n', "line 4.*surrogate"),
    ("x.jsonl", WHOLE + b'{"chosen": "caf\xe9", "rejected": "b"}\n', "line 4"),
    ("x.jsonl", WHOLE + b'{"chosen": "a\0b", "rejected": "d"}\n', "line 4"),
    ("x.jsonl", WHOLE + b"\xef\xbb\xbf" + WHOLE, "line 4"),
    ("x.jsonl", WHOLE.replace(b"}\n{", b"},{"), "line 1"),
    ("x.jsonl", b'{"chosen": [{"role": "u", "content": "a", "content": "b"}], "rejected": []}\n', "line 1"),
    ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n", "line 1"),
    ("x.jsonl", WHOLE.decode().encode("utf-16"), "line 1"),
    ("x.jsonl", row(chosen=7), "line 1.*chosen"),
    ("x.jsonl", WHOLE + row(chosen=["b", "c"]), "line 4.*messages"),
    ("x.jsonl", lines(CHAT, *GOOD), "line 2.*messages.*chosen"),
    ("x.jsonl", lines(CHAT | {"chosen": turns(3)}), "line 1.*3"),
    ("x.jsonl", lines({side: [{"from": "human", "value": "Q"}] for side in CHAT}), "from"),
    ("x.jsonl", row(margin=1) + row(margin="one"), "line 2.*margin"),
    ("x.jsonl", row(margin=1) + row(), "row 1.*margin"),
    ("x.jsonl", row(margin=1e39), "line 1.*margin"),
    ("x.jsonl", row(margin=True), "line 1.*margin"),
    ("x.jsonl", row(subset=["a"]), "subset"),
    ("x.jsonl", row(tools="{}"), "line 1.*tools"),
    ("x.jsonl.gz", ZIPPED[:-9], "ended"),
    ("x.jsonl.gz", ZIPPED[:-8] + b"\0" * 8, "CRC"),
    ("x.jsonl.gz", WHOLE, "gzip"),
    ("x.parquet", TABLE[:-8] + b"\xff\xff\xff\x7fPAR1", "footer"),
    ("x.parquet", WHOLE, "magic"),
    ("x.parquet", parquet(chosen=NOT_UTF8), "UTF"),
    ("x.parquet", parquet(chosen=[1.5, 2.5]), "chosen"),
    ("x.parquet", parquet(margin=[1.5, float("nan")]), "row 1.*margin"),
    ("x.csv", b"chosen,rejected\na,b\nc\n", "line 3.*2 cells"),
    ("x.csv", b"chosen,chosen,rejected\na,b,c\n", "'chosen' twice"),
    ("x.tsv", b"chosen\trejected\na\tb\nc\t\xff\n", "after line.*decode"),
    ("x.csv", b'chosen,rejected\na,b\n"c,d\n', "after line 2.*end"),
    ("x.txt", WHOLE, "ending in .jsonl"),
]


def pairs_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file as a run takes them."""
    pairs = load_pairs(str(path))["train"].checked(with_margin=True)
    return [pairs.row_at(number) for number in range(len(pairs.rows))]


@pytest.mark.parametrize(("name", "content", "word"), MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_file_is_told_in_one_line(name: str, content: bytes, word: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=word) as told:
        pairs_of(tmp_path / name)
    assert name in str(told.value) and len(str(told.value).splitlines()) == 1


def test_what_is_no_file_of_pairs_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "ring.jsonl").symlink_to(tmp_path / "ring.jsonl")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "train.jsonl").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe.jsonl")
    names = ["folder.jsonl", "ring.jsonl", "linked", "pipe.jsonl", "x" * 300 + ".jsonl", "a\0b.jsonl"]
    for name in [*(f"{tmp_path}/{name}" for name in names), "", " ", "~nobody-of-that-name/x.jsonl", "/dev/null"]:
        with pytest.raises(UserError):
            load_pairs(name)


def as_parquet(kind: pa.DataType) -> bytes:
    return parquet(**{side: pa.array([pair[side] for pair in GOOD]).cast(kind) for side in GOOD[0]})


NAMED = {"chosen": [turns("Q")[0] | {"name": "Ann"}, *turns("Q", "A")[1:]], "rejected": turns("Q", "B")}
PARTS = CHAT | {"chosen": turns([{"type": "text", "text": "Q"}], "A")}
WORDS = ["", "7", "2020-01-01", "null", "NaN", "{}", "a\0b", "a\u2028b\x85c", '[{"role": 7}]', "[{" * 9999]
SPOKEN = [{"chosen": word, "rejected": f"{word}.", "prompt": f"Q{word}"} for word in WORDS]
HOLES = [{"chosen": "A", "rejected": None, "prompt": None}, {"chosen": None, "rejected": "B", "prompt": "Q"}]
SILENCE = [CHAT | {"chosen": None}, CHAT | {"chosen": turns("Q", None)}, CHAT | {"chosen": []}]
FULL = GOOD[0] | {"prompt": "Q", "margin": 1, "subset": "s"}
VALID = [
    ("X.JSONL", WHOLE[:-1], GOOD),
    ("x.jsonl", b"\xef\xbb\xbf" + WHOLE.replace(b"\n", b"\r\n"), GOOD),
    ("x.jsonl", b"\n\n" + WHOLE.replace(b"\n", b"\n \n"), GOOD),
    ("x.jsonl.gz", ZIPPED + ZIPPED, GOOD + GOOD),
    ("x.json", WHOLE, GOOD),
    ("x.json", json.dumps(GOOD, indent=1).encode(), GOOD),
    ("x.json", b'{\n"chosen": "a",\n "rejected": "d"}', [{"chosen": "a", "rejected": "d"}]),
    ("x.csv", b'\xef\xbb\xbfchosen,rejected,margin\r\n"a, b\n",NA,\r\n', [{"chosen": "a, b\n", "rejected": "NA"}]),
    ("x.tsv", b"id\tchosen\trejected\n1\tnull\t\n", [{"chosen": "null", "rejected": ""}]),
    ("x.jsonl.bz2", bz2.compress(WHOLE), GOOD),
    ("x.jsonl.xz", lzma.compress(WHOLE), GOOD),
    ("x.jsonl", lines(*SPOKEN), SPOKEN),
    ("x.jsonl", json.dumps(SPOKEN[7], ensure_ascii=False).encode(), SPOKEN[7:8]),
    ("x.jsonl", lines(*HOLES), HOLES),
    ("x.jsonl", lines(FULL | {"": 1, "id": [1]} | {f"c{i}": i for i in range(500)}), [FULL]),
    ("x.jsonl", lines(CHAT, *SILENCE), [CHAT, *SILENCE]),
    ("x.jsonl", lines(CHAT | {"prompt": "Q"}), [CHAT | {"prompt": "Q"}]),
    ("x.jsonl", lines(CHAT, NAMED, PARTS), [CHAT, NAMED, PARTS]),
    ("x.parquet", as_parquet(pa.large_string()), GOOD),
    ("x.parquet", as_parquet(pa.dictionary(pa.int8(), pa.string())), GOOD),
    ("x.parquet", parquet(rejected=[None, None]), [{"chosen": text, "rejected": None} for text in ("a b", "c")]),
]


@pytest.mark.parametrize(("name", "content", "rows"), VALID, ids=range(len(VALID)))
def test_odd_but_sound_files_are_read_as_they_are(name: str, content: bytes, rows: list[Any], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert pairs_of(tmp_path / name) == rows


@settings(max_examples=8, deadline=None, derandomize=True)
@given(texts=st.lists(st.text(max_size=20), min_size=1, max_size=4), escaped=st.booleans(), array=st.booleans())
def test_any_text_is_read_as_it_is(
    texts: list[str], escaped: bool, array: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = [{"chosen": text, "rejected": f"{text}."} for text in texts]
    records = [json.dumps(record, ensure_ascii=escaped) for record in rows]
    path = tmp_path_factory.mktemp("any") / ("x.json" if array else "x.jsonl")
    path.write_bytes((f"[{','.join(records)}]" if array else "\n".join(records)).encode())
    assert pairs_of(path) == rows


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A file after one of the accidents that befall files."""
    place, other = sorted(rng.randrange(len(content)) for _ in range(2))
    odd = rng.choice([b"\0", b'"', b"\\", b"{", b"]", b"\n", b"\r", b"\xff", bytes([rng.randrange(256)])])
    after = content[rng.choice([place, place + 1, other]) :]
    return rng.choice([content[:place], content[:place] + after, content[:place] + odd + after])


Read = Callable[[bytes], list[dict[str, Any]]]
READERS: list[tuple[str, bytes, Read]] = [
    ("x.jsonl", WHOLE, lambda content: [json.loads(line) for line in content.split(b"\n") if line.strip()]),
    ("x.parquet", TABLE, lambda content: pq.read_table(io.BytesIO(content)).to_pylist()),
]


@pytest.mark.parametrize(("name", "whole", "read"), READERS)
def test_a_damaged_file_is_read_as_others_read_it_or_told(name: str, whole: bytes, read: Read, tmp_path: Path) -> None:
    told = 0
    for seed in range(25):
        content = damaged(whole, random.Random(seed))
        (tmp_path / f"{seed}-{name}").write_bytes(content)
        try:
            pairs = pairs_of(tmp_path / f"{seed}-{name}")
        except UserError as error:
            assert f"{seed}-{name}" in str(error)
            told += 1
        else:
            assert pairs == [{key: given.get(key) for key in ("chosen", "rejected")} for given in read(content)]
    assert 0 < told < 25


HUGE = ["x" * 100_000, "<|endoftext|> " * 10_000 + "a", "\n" * 100_000 + "a", "\U0001f600" * 20_000]
HUGE_CHATS = [CHAT | {"chosen": turns("a<spare_0>" * 5000)}, CHAT | {"chosen": turns(*"a" * 500)}]


@pytest.mark.parametrize("kind", ["gpt2", "chat"])
def test_huge_texts_take_linear_time(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """To be ids and a verdict; quadratic time would be hours."""
    texts = b"".join(row(prompt="", chosen=text) + row(prompt=text) for text in HUGE)
    (tmp_path / "x.jsonl").write_bytes(lines(*HUGE_CHATS) if kind == "chat" else texts)
    pairs = load_pairs(str(tmp_path / "x.jsonl"))
    tokenizer = load_tokenizer(str(request.getfixturevalue(f"{kind}_dir")))
    assert min(encode_splits(pairs, tokenizer, 64, "drop", [])["train"]["chosen_length"]) > 2000


# Recipes that are refused, and with which word.
NEEDED = ["--dataset_name", "d", "--model_name_or_path", "m", "--bf16", "false"]
REFUSED = [
    (b"model_init_kwargs: {a: 1, a: 2}\n", "twice"),
    (b"seed: !!python/object/apply:os.mkdir [code-ran]\n", "constructor"),
    (b"eval_splits: " + b"[" * 500 + b"]" * 500, "recursion"),
    (b"seed: 1\n---\nseed: 2\n", "document"),
    (b"seed: " + b"1" * 5000, "digits"),
    (b"config: other.yaml\n", "unknown option"),
]
OPTIONS = sorted({spec.name for kind in (ScriptArguments, RewardRecipeConfig, ModelConfig) for spec in fields(kind)})
SET_UP = {"deepspeed", "ddp_backend", "local_rank", "torch_compile"}  # what runs
ODD = [None, True, -1, 0, 2.5, 2**70, math.inf, math.nan, "", "odd", "\0", [], [None], [[1]], {}, {"a": {}}]


def parsed(content: bytes) -> RewardRecipeConfig:
    """The configuration from a recipe file in the current folder."""
    Path("given.yaml").write_bytes(content)
    return parse_recipe(["--config", "given.yaml", *NEEDED])[1]


def test_a_recipe_is_plain_or_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for content, word in REFUSED:
        with pytest.raises(UserError, match=word):
            parsed(content)
    for content in (b'{"seed": 3, "eval_strategy": "no"}', b"\xef\xbb\xbfseed: 3\r\neval_strategy: no\r\n"):
        assert (parsed(content).seed, parsed(content).eval_strategy) == (3, "no")
    assert not Path("code-ran").exists()


@pytest.mark.reliability
def test_any_bytes_and_any_option_are_taken_or_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either an error that says something, or what PyYAML itself reads as a mapping."""
    monkeypatch.chdir(tmp_path)
    rng, taken = random.Random(0), 0
    recipes = [yaml.safe_dump({name: rng.choice(ODD)}).encode() for name in OPTIONS if name not in SET_UP]
    for content in [*recipes, *("".join(rng.choices("a:-&*!?[]{}|>%@'\n .0", k=k % 30)).encode() for k in range(150))]:
        try:
            parsed(content)
        except UserError as error:
            assert str(error).strip()
        else:
            taken += 1
            assert isinstance(yaml.safe_load(content), dict)
    assert taken > 10


@pytest.fixture(scope="module")
def judge(chat_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    folder = tmp_path_factory.mktemp("judge") / "chat"
    return load_scorer(str(save_reward_model(chat_dir, folder, max_length=POSITIONS)))


# As they stand in the line: some are no JSON, or none that Python's writer would write.
VALUES = r'null NaN 1e400 "" "a\u0000b" "\ud800" "\ud83d\ude00" {} [] [[]] ["a"] [null] "<|im_end|>a<spare_0>"'.split()
VALUES += ["1" * 5000, "[" * 500 + "]" * 500, f'"{"x" * 9999}"']
VALUES += map(json.dumps, [turns("Q", "A"), turns(3), turns([{"type": "text"}]), [{"content": "a"}]])


def test_any_line_to_score_is_scored_or_told(judge: Scorer) -> None:
    """Each odd value among sound lines, in one stream: the sound ones score as they do alone."""
    forms = ('"text": ', '"messages": ', '"response": "b", "prompt": ', '"prompt": "a", "responses": ')
    odd = ['{"text": "a", "text": "b"}', *(f"{{{form}{value}}}" for form in forms for value in VALUES)]
    rows = [("here", line) for pair in odd for line in ('{"text": "Yes."}', pair)]
    answers = [answer for block in score_rows(judge, rows, Asked(skip_bad=True)) for answer in block]
    records = [json.loads(answer.line) for answer in answers]
    assert len(records) == 2 * len(odd) and "twice" in records[1]["error"]
    assert 30 < sum(answer.error is not None for answer in answers) < len(odd) - 10
    assert all(answer.error == record.get("error") for answer, record in zip(answers, records, strict=True))
    assert all(record["reward"] == pytest.approx(judge.score(["Yes."])[0], abs=1e-5) for record in records[::2])
    numbers = [record.get("rewards", [record.get("reward")]) for record in records if "error" not in record]
    assert all(number is None or math.isfinite(number) for found in numbers for number in found)


def test_special_strings_do_not_move_the_score(judge: Scorer) -> None:
    """Padded and packed, as texts and as messages: the score is the head on the hidden state of a text alone at EOS."""

    def by_hand(texts: list[Any]) -> list[float]:
        with torch.no_grad():
            alone = [judge.model.base_model(input_ids=torch.tensor([ids])) for ids in judge.encode(texts)]
        return [float(judge.model.score.weight[0].detach() @ found.last_hidden_state[0, -1]) for found in alone]

    parts = ["<|im_end|>", "<spare_0>", "<|im_start|>assistant\n", "<|endoftext|>", " ", "\n", "a", "Yes. "]
    texts = ["".join(random.Random(seed).choices(parts, k=seed % 9)) for seed in range(40)]
    mixed = [*texts, *(turns(text, text + "a") for text in texts)]
    assert judge.score(mixed) == pytest.approx(by_hand(mixed), abs=1e-4)
    groups = [[f"Q: {text}", f"Q: {text}!", f"Q: {text}?"] for text in texts]
    for found, group in zip(judge.score_groups(groups), groups, strict=True):
        assert found == pytest.approx(by_hand(group), abs=1e-4)
    assert judge._tap is not None  # they were packed
