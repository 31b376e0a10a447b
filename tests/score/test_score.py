"""The score command: JSON lines in, the same lines with rewards out; a bad line is told, and costs no other."""

import io
import json
import sys
from pathlib import Path

import pytest
from conftest import save_reward_model

from reward_recipes.run import UserError
from reward_recipes.score import Scorer, load_scorer
from reward_recipes.score.__main__ import main, score_stream

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


def scored(judge: Scorer, lines: list[dict[str, object]]) -> list[dict[str, object]]:
    sink = io.StringIO()
    score_stream(judge, [json.dumps(line) + "\n" for line in lines], sink, "stop")
    return [json.loads(line) for line in sink.getvalue().splitlines()]


def test_every_form_gains_its_reward_in_order(judge: Scorer) -> None:
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


def test_overlong_under_drop_is_null(judge: Scorer) -> None:
    strict = Scorer(judge.model, judge.tokenizer, max_length=12, overlong="drop")
    lines = [{"text": "Yes. " * 20}, {"prompt": "A", "responses": ["Yes. " * 20, "b"]}, {"text": "Yes."}]
    long, some, short = scored(strict, lines)
    assert (long["reward"], long["overlong"], "overlong" in short) == (None, True, False)
    assert (some["rewards"][0], some["best"], some["overlong"]) == (None, 1, True)


def test_a_bad_line_stops_after_those_before_it_or_is_passed_through(judge: Scorer) -> None:
    for bad, complaint in {
        "{not json": "line 2",
        '["a"]': "expected a JSON object .*found .'a'",
        '{"txt": "a"}': "expected a JSON object .*'txt'",
        '{"text": 3}': "expected text, or messages .* in 'text', found 3",
        '{"text": "a", "messages": []}': "expected a JSON object",
        '{"response": "a"}': "expected a JSON object",
        '{"prompt": "a", "responses": []}': "list of replies",
        '{"messages": [{"from": "human", "value": "a"}]}': "`role` and `content`",
        '{"messages": [{"role": "x", "content": "Hi."}]}': "no x",  # the chat template rejects it
        '{"text": "\\ud800"}': "surrogates",
    }.items():
        lines, sink = ['{"text": "Yes."}', bad, "", '{"messages": [{"role": "user", "content": "No."}]}'], io.StringIO()
        with pytest.raises(UserError, match=complaint):
            score_stream(judge, lines, sink, "stop")
        assert [json.loads(line)["text"] for line in sink.getvalue().splitlines()] == ["Yes."]
        sink = io.StringIO()
        assert score_stream(judge, lines, sink, "skip") == {"scored": 2, "bad": 1}
        _, middle, _ = sink.getvalue().splitlines()
        assert json.loads(middle)["error"].startswith("line 2: ")


def test_constant_memory_reads_no_further_than_it_must(judge: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reward_recipes.score.__main__.LINES_AT_ONCE", 4)
    read, written, sink = [], [], io.StringIO()
    sink.flush = lambda: written.append((len(read), len(sink.getvalue().splitlines())))
    lines = (read.append(number) or json.dumps({"text": "Yes." * number}) for number in range(10))
    score_stream(judge, lines, sink, "stop")
    assert written == [(4, 4), (8, 8), (10, 10)]


def call(monkeypatch: pytest.MonkeyPatch, **options: object) -> None:
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["score", *words])
    main()


def test_standard_input_to_standard_output(
    reward_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half a surrogate pair, which no tokenizer takes, comes out as it went in."""
    source, sink = tmp_path / "in", tmp_path / "out"
    source.write_text(json.dumps(LINES[0]) + "\n" + '{"text": "\\udc80"}\n')
    with source.open() as stdin, sink.open("w") as stdout:
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(sys, "stdout", stdout)
        call(monkeypatch, model_name_or_path=reward_dir, input="-", on_error="skip")
    first, second = (json.loads(line) for line in sink.read_text().splitlines())
    assert isinstance(first["reward"], float) and second["text"] == "\udc80" and "error" in second
    assert "1 lines scored, 1 bad lines" in capsys.readouterr().err


def test_arguments_are_checked_first(reward_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = tmp_path / "in.jsonl"
    lines.write_text('{"text": "a"}\n')
    good = {"model_name_or_path": reward_dir, "input": lines, "output": tmp_path / "out.jsonl"}
    for name, value, complaint in (
        ("input", tmp_path / "none.jsonl", "input: expected a file"),
        ("output", lines, "another file than the input"),
        ("output", tmp_path / "no" / "out.jsonl", "existing folder"),
        ("on_error", "ignore", "on_error: expected"),
    ):
        with pytest.raises(UserError, match=complaint):
            call(monkeypatch, **good | {name: value})
    assert lines.read_text() == '{"text": "a"}\n'
