"""The score command: rows in, the same with rewards; a bad one is told, and costs no other; a kill costs a block."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import save_reward_model, write_jsonl
from datasets import Dataset

from reward_recipes.run import UserError
from reward_recipes.score import Scorer, load_scorer
from reward_recipes.score import rows as rows_module
from reward_recipes.score.__main__ import main
from reward_recipes.score.rows import Asked, score_rows

LINES = [
    {"text": "\n\nHuman: How?\n\nAssistant: So.", "id": 7, "reward": 9, "overlong": True, "error": "of an earlier run"},
    {"prompt": "\n\nHuman: How?\n\nAssistant:", "response": " So."},
    {"prompt": "\n\nHuman: How?\n\nAssistant:", "responses": [" So.", " No idea.", " Mix flour."]},
    {"text": "Grüße, 世界"},
]


@pytest.fixture(scope="module")
def judge(chat_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    """A model whose chat template knows no role x."""
    judge = load_scorer(str(save_reward_model(chat_dir, tmp_path_factory.mktemp("chat"))))
    refusing = "{% if m.role == 'x' %}{{ raise_exception('no x') }}{% endif %}"
    judge.tokenizer.chat_template = "{% for m in messages %}" + refusing + "{{ m.content }}{% endfor %}"
    return judge


def scored(judge: Scorer, lines: list[dict[str, object]], **asked: Any) -> list[dict[str, Any]]:
    rows = [(f"line {number}", json.dumps(line)) for number, line in enumerate(lines, start=1)]
    answers = [answer for block in score_rows(judge, rows, Asked(**asked)) for answer in block]
    return [json.loads(answer.line) for answer in answers if answer.line is not None]


def test_every_form_gains_its_reward_in_order_and_what_is_too_long_a_null(judge: Scorer) -> None:
    text, reply, best_of, other = scored(judge, LINES)
    assert set(text) == {"text", "id", "reward"} and text["id"] == 7 and text["text"] == LINES[0]["text"]
    assert text["reward"] == pytest.approx(judge.score([LINES[0]["text"]])[0], abs=1e-5)
    assert reply["reward"] == pytest.approx(text["reward"], abs=1e-5)
    expected = judge.score([LINES[2]["prompt"] + response for response in LINES[2]["responses"]])
    assert best_of["rewards"] == pytest.approx(expected, abs=1e-5)
    assert best_of["best"] == expected.index(max(expected))
    assert other["text"] == "Grüße, 世界"
    turns = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": " So."}]
    dialogue, joined = scored(judge, [{"messages": turns}, {"prompt": turns[:1], "response": " So."}])
    assert dialogue["reward"] == joined["reward"] != text["reward"]
    strict = Scorer(judge.model, judge.tokenizer, max_length=12)
    long, some = scored(strict, [{"text": "Yes. " * 20}, {"prompt": "A", "responses": ["Yes. " * 20, "b"]}])
    assert (long["reward"], long["overlong"]) == (None, True)
    assert (some["rewards"][0], some["best"], some["overlong"]) == (None, 1, True)


def test_a_bad_line_stops_after_those_before_it_or_is_passed_through(judge: Scorer) -> None:
    for bad, complaint in {
        "{not json": "line 2",
        '{"txt": "a"}': "expected a JSON object .*'txt'",
        '{"text": 3}': "expected text, or messages .* in 'text', found 3",
        '{"text": "a", "messages": []}': "expected a JSON object",
        '{"prompt": "a", "responses": []}': "list of replies",
        '{"messages": [{"from": "human", "value": "a"}]}': "`role` and `content`",
        '{"messages": [{"role": "x", "content": "Hi."}]}': "no x",  # the chat template rejects it
        '{"text": "\\ud800"}': "surrogates",
    }.items():
        lines = ['{"text": "Yes."}', bad, '{"messages": [{"role": "user", "content": "No."}]}']
        rows = [(f"line {number}", line) for number, line in enumerate(lines, start=1)]
        stopping = score_rows(judge, rows, Asked())
        assert [json.loads(answer.line)["text"] for answer in next(stopping)] == ["Yes."]
        with pytest.raises(UserError, match=complaint):
            next(stopping)
        ((first, middle, last),) = score_rows(judge, rows, Asked(skip_bad=True))
        assert first.error is last.error is None and middle.error == json.loads(middle.line)["error"]
        assert middle.error.startswith("line 2: ")


def test_constant_memory_reads_no_further_than_it_must(judge: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "ROWS_AT_ONCE", 4)
    read: list[int] = []
    rows = ((read.append(number) or "here", json.dumps({"text": "Yes." * number})) for number in range(10))
    assert [(len(read), len(block)) for block in score_rows(judge, rows, Asked())] == [(4, 4), (8, 4), (10, 2)]


def test_the_best_reply_is_a_row_for_fine_tuning(judge: Scorer) -> None:
    """Text stays text and messages stay messages; replies that hold their prompt lose it; without a score no row."""
    turn, replies = {"role": "user", "content": "How?"}, [" So.", " No idea.", " Mix flour."]
    spoken = [[{"role": "assistant", "content": reply}] for reply in replies]
    tools = [{"type": "function", "function": {"name": "look"}}]
    forms = [
        {"prompt": "How?", "responses": replies},
        {"prompt": "How do I?", "responses": ["How do I?" + reply for reply in replies]},
        {"prompt": [turn], "responses": replies, "tools": tools},
        {"prompt": "How?", "responses": [[turn, *reply] for reply in spoken]},
        {"prompt": "Hi", "responses": ["Hi there", "Hi you", "So"]},  # not all hold it, so none does
        {"prompt": "How do I?\n", "responses": ["How do I?" + reply for reply in replies]},
        {"prompt": "How?", "responses": ["Yes. " * 60]},
    ]
    strict = Scorer(judge.model, judge.tokenizer, max_length=40)
    rewarded, rows = scored(strict, forms), scored(strict, forms, best_of=True)
    assert len(rows) == 6 and rewarded[6]["rewards"] == [None]
    best = [line["best"] for line in rewarded[:6]]
    for row, line, place in zip(rows, rewarded[:6], best, strict=True):
        assert row["reward"] == line["rewards"][place] == max(line["rewards"])
    assert [row["prompt"] for row in rows] == ["How?", "How do I?", [turn], [turn], "Hi", "How do I?"]
    assert [row["completion"] for row in rows[:2]] == [replies[best[0]], replies[best[1]]]
    assert [row["completion"] for row in rows[2:4]] == [spoken[best[2]], spoken[best[3]]] and rows[2]["tools"] == tools
    assert [row["completion"] for row in rows[4:]] == [forms[4]["responses"][best[4]], replies[best[5]]]
    with pytest.raises(UserError, match="of which to write the best"):
        scored(judge, [{"text": "a"}], best_of=True)


@pytest.fixture
def call(reward_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The command with these options, of a toy model; it scores blocks of four rows."""

    def run(**options: object) -> None:
        given = {"model_name_or_path": reward_dir} | options
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["score", *words])
        main()

    monkeypatch.setattr(rows_module, "ROWS_AT_ONCE", 4)
    return run


def test_standard_input_to_standard_output(
    call: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half a surrogate pair, which no tokenizer takes, comes out as it went in."""
    source, sink = tmp_path / "in", tmp_path / "out"
    source.write_text(json.dumps(LINES[0]) + "\n" + '{"text": "\\udc80"}\n')
    with source.open() as stdin, sink.open("w") as stdout:
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(sys, "stdout", stdout)
        call(input="-", on_error="skip")
    first, second = (json.loads(line) for line in sink.read_text().splitlines())
    assert isinstance(first["reward"], float) and second["text"] == "\udc80" and "error" in second
    assert "1 lines scored, 1 bad lines" in capsys.readouterr().err


def test_arguments_are_checked_first(call: Callable[..., None], tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / "in.jsonl", [{"text": "a"}])
    for options, complaint in (
        ({"input": tmp_path / "none.jsonl"}, "input: expected a file"),
        ({"output": lines}, "another file than the input"),
        ({"input": "", "dataset_name": lines, "output": lines}, "another file than the input"),
        ({"output": tmp_path / "no" / "out.jsonl"}, "existing folder"),
        ({"on_error": "ignore"}, "on_error: expected"),
        ({"columns": '{"reply": "a"}'}, "columns: expected names among prompt, text"),
        ({"dataset_name": tmp_path}, "input: expected none beside dataset_name"),
    ):
        with pytest.raises(UserError, match=complaint):
            call(**{"input": lines, "output": tmp_path / "out.jsonl"} | options)
    assert lines.read_text() == '{"text": "a"}\n'


def test_a_table_is_read_and_written_like_lines(call: Callable[..., None], tmp_path: Path) -> None:
    """By named columns; another column that would ask is passed through, and rows need not have the same ones."""
    rows = [{"q": f"Q{number}", "a": ["Yes. " * number, "No."], "text": "t"} for number in range(1, 15)]
    lines = write_jsonl(tmp_path / "in.jsonl", [*rows, {"q": "late", "a": ["x"], "id": 1}])
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    columns = '{"prompt": "q", "responses": "a"}'
    call(columns=columns, input=lines, output=tmp_path / "out.jsonl")
    *expected, late = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert len(expected) == 14 and expected[0].keys() == {"q", "a", "text", "rewards", "best"} and late["id"] == 1
    for number, source in enumerate((tmp_path / "saved", tmp_path / "in.parquet", lines)):
        call(columns=columns, dataset_name=source, output=tmp_path / f"{number}.parquet")
        found = pq.read_table(tmp_path / f"{number}.parquet").to_pylist()
        assert [row["rewards"] for row in found[:14]] == [row["rewards"] for row in expected]
        assert found[0] == expected[0] | ({"id": None} if number == 2 else {})
    assert {path.name for path in tmp_path.glob("?.parquet*")} == {"0.parquet", "1.parquet", "2.parquet"}


def test_a_scoring_that_was_killed_goes_on_to_the_same_bytes(
    call: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed in the third of five blocks, with half a line behind the second; then finished, then asked again."""
    lines = write_jsonl(tmp_path / "in.jsonl", [{"text": "Yes. " * number} for number in range(18)])
    whole, part = tmp_path / "whole", tmp_path / "again"
    call(input=lines, output=whole)
    blocks, score_ids = iter(range(9)), Scorer.score_ids

    def killed(*args: Any) -> Any:
        if next(blocks) == 2:
            raise KeyboardInterrupt
        return score_ids(*args)

    again = {"input": lines, "output": part, "resume": True}
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(Scorer, "score_ids", killed)
        call(**again)
    assert "interrupted, 8 rows are scored; --resume true goes on" in capsys.readouterr().err
    assert len(part.read_text().splitlines()) == 8
    with part.open("a") as file:
        file.write('{"text": "half a li')
    for name, other in (("dtype", "float16"), ("dataset_config", "other")):
        with pytest.raises(UserError, match=f"{name}: expected .* as before, found '{other}'"):
            call(**again, **{name: other})
    call(**again)
    assert part.read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "whole", "again"}
    call(**again)
    assert capsys.readouterr().err.splitlines()[-2:] == ["18 lines scored", f"{part} is whole: nothing to resume"]
