"""The score command: JSON lines in, the same lines with rewards out."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import save_reward_model

from reward_recipes.run.errors import UserError
from reward_recipes.score.__main__ import main, score_stream
from reward_recipes.score.scorer import Scorer, load_scorer

LINES = [
    {"text": "\n\nHuman: How?\n\nAssistant: So.", "id": 7},
    {"prompt": "\n\nHuman: How?\n\nAssistant:", "response": " So."},
    {"prompt": "\n\nHuman: How?\n\nAssistant:", "responses": [" So.", " No idea.", " Mix flour."]},
    {"text": "Grüße, 世界"},
]


@pytest.fixture(scope="module")
def judge(reward_dir: Path) -> Scorer:
    return load_scorer(str(reward_dir))


def scored(judge: Scorer, lines: list[str], on_error: str = "stop") -> list[dict[str, object]]:
    sink = io.StringIO()
    score_stream(judge, iter(lines), sink, on_error)
    return [json.loads(line) for line in sink.getvalue().splitlines()]


def test_every_form_gains_its_reward_in_order(judge: Scorer) -> None:
    text, reply, best_of, other = scored(judge, [json.dumps(line) + "\n" for line in LINES])
    assert text["id"] == 7 and text["text"] == LINES[0]["text"]
    assert text["reward"] == pytest.approx(judge.score([LINES[0]["text"]])[0], abs=1e-5)
    assert reply["reward"] == pytest.approx(text["reward"], abs=1e-5)
    prompt = LINES[2]["prompt"]
    expected = judge.score([prompt + response for response in LINES[2]["responses"]])
    assert best_of["rewards"] == pytest.approx(expected, abs=1e-5)
    assert best_of["best"] == expected.index(max(expected))
    assert other["text"] == "Grüße, 世界"


def test_overlong_under_drop_is_null(judge: Scorer) -> None:
    strict = Scorer(judge.model, judge.tokenizer, max_length=12, overlong="drop")
    lines = [{"text": "Yes. " * 20}, {"prompt": "A", "responses": ["Yes. " * 20, "b"]}, {"text": "Yes."}]
    long, some, short = scored(strict, [json.dumps(line) for line in lines])
    assert (long["reward"], long["overlong"]) == (None, True)
    assert some["rewards"][0] is None and some["best"] == 1 and some["overlong"] is True
    assert "overlong" not in short


BAD = {
    "{not json": "line 2",
    "[1, 2]": "expected a JSON object",
    '{"txt": "a"}': "found \\['txt'\\]",
    '{"text": 3}': "expected text in 'text'",
    '{"text": "a", "messages": []}': "expected `text`",
    '{"prompt": "a", "responses": []}': "list of replies",
    '{"prompt": "a", "responses": ["b", null]}': "expected text or messages in 'responses'",
    '{"messages": [{"role": "user"}]}': "`role` and `content`",
    '{"text": "\\ud800"}': "surrogates",
    '{"response": "a"}': "expected `text`",
    "[" * 100_000: "line 2",
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_stops_after_those_before_it_or_is_passed_through(judge: Scorer, bad: str) -> None:
    lines = ['{"text": "Yes."}', bad, "", '{"text": "No."}']
    sink = io.StringIO()
    with pytest.raises(UserError, match=BAD[bad]):
        score_stream(judge, iter(lines), sink, "stop")
    assert [json.loads(line)["text"] for line in sink.getvalue().splitlines()] == ["Yes."]
    sink = io.StringIO()
    assert score_stream(judge, iter(lines), sink, "skip") == {"scored": 2, "bad": 1}
    assert len(sink.getvalue().splitlines()) == 3
    assert json.loads(sink.getvalue().splitlines()[1])["error"].startswith("line 2: ")


def test_constant_memory_reads_no_further_than_it_must(judge: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reward_recipes.score.__main__.LINES_AT_ONCE", 4)
    read, written = [], []

    class Sink(io.StringIO):
        def flush(self) -> None:
            written.append((len(read), len(self.getvalue().splitlines())))

    def source() -> object:
        for number in range(10):
            read.append(number)
            yield json.dumps({"text": "Yes." * number})

    score_stream(judge, source(), Sink(), "stop")
    assert written == [(4, 4), (8, 8), (10, 10)]


def test_standard_input_to_standard_output(reward_dir: Path) -> None:
    command = [sys.executable, "-m", "reward_recipes.score", "--model_name_or_path", str(reward_dir), "--input", "-"]
    text = json.dumps(LINES[0]) + "\n" + '{"text": "\\udc80"}\n'
    done = subprocess.run([*command, "--on_error", "skip"], input=text, capture_output=True, text=True, check=True)
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert isinstance(first["reward"], float) and second["text"] == "\udc80" and "error" in second
    assert "1 lines scored, 1 bad lines" in done.stderr


def test_arguments_are_checked_first(reward_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = tmp_path / "in.jsonl"
    lines.write_text('{"text": "a"}\n')
    good = {"model_name_or_path": reward_dir, "input": lines, "output": tmp_path / "out.jsonl"}
    for name, value, complaint in (
        ("input", tmp_path / "none.jsonl", "input: expected a file"),
        ("output", lines, "another file than the input"),
        ("output", tmp_path / "no" / "out.jsonl", "existing folder"),
        ("on_error", "ignore", "on_error: expected"),
        ("inptu", lines, "unknown option"),
    ):
        named = good | {name: value}
        monkeypatch.setattr(sys, "argv", ["score", *(word for k, v in named.items() for word in (f"--{k}", str(v)))])
        with pytest.raises(UserError, match=complaint):
            main()
    assert lines.read_text() == '{"text": "a"}\n'


def test_a_dialogue_that_the_template_rejects_is_one_bad_line(chat_dir: Path, tmp_path: Path) -> None:
    judge = load_scorer(str(save_reward_model(chat_dir, tmp_path / "chat")))
    refusing = "{% if m.role == 'x' %}{{ raise_exception('no x') }}{% endif %}"
    judge.tokenizer.chat_template = "{% for m in messages %}" + refusing + "{{ m.content }}{% endfor %}"
    lines = [json.dumps({"messages": [{"role": role, "content": "Hi."}]}) for role in ("user", "x", "user")]
    first, second, third = scored(judge, lines, "skip")
    assert first["reward"] == third["reward"] and "no x" in second["error"]
    sink = io.StringIO()
    with pytest.raises(UserError, match=r"line 2: .*no x"):
        score_stream(judge, iter(lines), sink, "stop")
    assert len(sink.getvalue().splitlines()) == 1


def test_scoring_a_scored_file_again_leaves_nothing_stale(judge: Scorer) -> None:
    (line,) = scored(judge, ['{"text": "Yes.", "reward": 9, "overlong": true, "error": "old"}'])
    assert set(line) == {"text", "reward"} and line["reward"] != 9
