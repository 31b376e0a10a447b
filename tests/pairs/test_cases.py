"""Each fault that was seen on other people's data has its right value here: of a text, of a prompt, of a data set."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CHATML, as_pairs, trl_ids, write_jsonl
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments

from reward_recipes.config import RewardRecipeConfig
from reward_recipes.data import PreparedData, prepare_data
from reward_recipes.pairs import Dialogue, encode_splits, encode_texts, load_pairs, load_tokenizer
from reward_recipes.pairs.audit import audit_split
from reward_recipes.run import UserError
from reward_recipes.score import texts_of

# It knows tools, calls, no content and content in parts.
TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string %}{{ m['content'] }}"
    "{% elif m['content'] %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + ' ' + (c.function.arguments | string) }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LOOK = "Let me look."
Row = dict[str, Any]


@pytest.fixture(scope="module")
def chat(chat_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(chat_dir), chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def gpt2(gpt2_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(gpt2_dir))


def user(content: Any) -> Row:
    return {"role": "user", "content": content}


def reply(content: Any, **call: Any) -> Row:
    calls = {"tool_calls": [{"type": "function", "function": {"name": "now", "arguments": call}}]} if call else {}
    return {"role": "assistant", "content": content, **calls}


def encoded(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    return encode_splits({"": as_pairs(rows)}, tokenizer, 9999, "drop", [])[""]


def texts(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """Both sides of each pair as they are read, without EOS."""
    found = encoded(rows, tokenizer)
    sides = zip(found["chosen_ids"], found["rejected_ids"], strict=True)
    return [(tokenizer.decode(chosen[:-1]), tokenizer.decode(rejected[:-1])) for chosen, rejected in sides]


def assert_as_trl(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> None:
    """All pairs are used, with the ids that TRL gives."""
    found = encoded(rows, tokenizer)
    assert audit_split(found)["pairs_used"] == len(rows)
    for row, pair in zip(rows, found, strict=True):
        tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
        for side in ("chosen", "rejected"):
            dialogue = Dialogue([*row.get("prompt", []), *row[side]], tools)
            assert pair[f"{side}_ids"] == trl_ids(tokenizer, dialogue)


def prepare(source: Path, tokenizer: PreTrainedTokenizerBase, **options: Any) -> PreparedData:
    config = RewardRecipeConfig(output_dir="unused", bf16=False, max_length=1000, **options)
    return prepare_data(ScriptArguments(str(source)), config, tokenizer)


TOOLS = [{"type": "function", "function": {"name": "now", "description": "Time", "parameters": {"type": "object"}}}]
CALLS = [
    {"prompt": [user("Time?")], "chosen": [reply(LOOK, city="a")], "rejected": [reply(LOOK)]},
    {"prompt": [user("Time now?")], "chosen": [reply("Nine.")], "rejected": [reply(LOOK, city="a")]},
]
NO_CONTENT = [{"prompt": [user("Time?")], "chosen": [reply(None, city="a")], "rejected": [reply(None, city="b")]}]
EARLIER = [user("Time?"), reply(None, city="a"), {"role": "tool", "content": "9"}]
PARTS = [{"type": "text", "text": "Why"}, {"type": "text", "text": "?"}]
WHOLE = [{"chosen": [*EARLIER, reply("Nine.")], "rejected": [*EARLIER, reply("Ten.")]}]
AS_IN_TRL = {
    "calls": CALLS,
    "no content": NO_CONTENT,
    "no content in an earlier turn": WHOLE,
    "tools": [row | {"tools": TOOLS} for row in NO_CONTENT],
    "no tools": [row | {"tools": []} for row in NO_CONTENT],
    "tools as JSON": [row | {"tools": json.dumps(TOOLS)} for row in NO_CONTENT],
    "parts": [{"prompt": [user(PARTS)], "chosen": [reply(PARTS[:1])], "rejected": [reply(PARTS[1:])]}],
}


@pytest.mark.parametrize("rows", AS_IN_TRL.values(), ids=AS_IN_TRL)
def test_calls_tools_and_parts_train_as_in_trl(rows: list[Row], chat: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    assert_as_trl(rows, chat)
    pairs = encoded(rows, chat)
    read = encode_splits(load_pairs(str(write_jsonl(tmp_path / "x.jsonl", rows))), chat, 1000, "drop", [])["train"]
    assert read.to_list() == pairs.to_list()
    for row, ids in zip(rows, pairs["chosen_ids"], strict=True):
        line = {"tools": row.get("tools"), "messages": [*row.get("prompt", []), *row["chosen"]]}
        assert encode_texts(chat, texts_of(line, chat)) == [ids]


def test_what_is_no_list_of_tools_is_told(chat: PreTrainedTokenizerBase) -> None:
    for name, odd in (("tools", 3), ("tools", "{}"), ("tools", "now"), ("chat_template_kwargs", "[1]")):
        with pytest.raises(ValueError, match=f"{name}|Expecting value"):
            texts_of({"messages": [user("Time?")], name: odd}, chat)


def test_a_call_beside_content_that_a_template_leaves_out_is_still_read(chat_dir: Path) -> None:
    silent = TEMPLATE.replace("{% if m['content'] is string %}", "{% if m['content'] is string and not m.tool_calls %}")
    assert_as_trl(CALLS, load_tokenizer(str(chat_dir), chat_template=silent))


def test_rendered_text_is_read_as_plain_transformers_reads_it(chat: PreTrainedTokenizerBase) -> None:
    opening = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    rows = [{"prompt": opening, "chosen": "So.<|im_end|>\n", "rejected": "No.<|im_end|>"}]
    rows += [{"prompt": "Why?", "chosen": "So.", "rejected": end} for end in ("No.<|im_end|>", "No.<spare_0>")]
    found = encoded(rows, chat)
    assert found["chosen_ids"][0] == chat(f"{opening}So.<|im_end|>\n<|im_end|>")["input_ids"]
    assert found["rejected_ids"][:2] == [
        chat(text)["input_ids"] for text in (f"{opening}No.<|im_end|>", "Why?No.<|im_end|>")
    ]
    assert chat.pad_token == "<spare_0>" and chat.pad_token_id not in found["rejected_ids"][2]
    assert found["special_tokens"][:] == [True, False, True] and audit_split(found)["special_tokens"] == 2


def test_what_a_template_leaves_out_of_both_sides_is_counted(chat: PreTrainedTokenizerBase) -> None:
    sides = [reply("So.") | {"reasoning_content": thought} for thought in ("a", "b")]
    counts = audit_split(encoded([{"prompt": [user("Why?")], "chosen": sides[:1], "rejected": sides[1:]}], chat))
    assert (counts["identical"], counts["left_out"]) == (1, 1)


def test_a_row_that_the_template_refuses_is_named_with_its_file(chat_dir: Path, tmp_path: Path) -> None:
    refusing = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer = load_tokenizer(str(chat_dir), chat_template=f"{refusing}{{{{ m.content }}}}{{% endfor %}}")
    rows = [{"chosen": [user(f"q{i}"), reply("a")], "rejected": [user(f"q{i}"), reply("b")]} for i in range(5)]
    rows[3] = {side: [{"role": "system", "content": "Be brief."}, *turns] for side, turns in rows[3].items()}
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(UserError, match=r"x\.jsonl, row 3: .*no system; .*another chat template"):
        encode_splits(load_pairs(str(path)), tokenizer, 1000, "drop", [])
    parts = AS_IN_TRL["parts"]
    with pytest.raises(UserError, match="here, row 0: the chat template rejects"):
        encoded(parts, load_tokenizer(str(chat_dir), chat_template=CHATML))


def test_a_dated_template_writes_one_date_for_ever(chat_dir: Path, tmp_path: Path) -> None:
    dated = "{{ strftime_now('%d %b %Y') }}" + TEMPLATE
    for asks in ("{% set f = '%d %b' %}{{ strftime_now(f ~ ' %Y') }}", "\n{{ strftime_now(format='%d %b %Y') }}"):
        found = texts(CALLS, load_tokenizer(str(chat_dir), chat_template=asks + TEMPLATE))[0]
        assert all(text.lstrip().startswith("01 Jan 2026<|im_start|>") for text in found)
    several = load_tokenizer(str(chat_dir))
    several.chat_template = {"default": dated, "tool_use": "none"}
    for saved in (load_tokenizer(str(chat_dir), chat_template=dated), several):
        saved.save_pretrained(tmp_path)
        found = texts(CALLS, load_tokenizer(str(tmp_path)))[0]
        assert all(text.startswith("01 Jan 2026<|im_start|>") for text in found)


def test_a_marked_prompt_is_known_though_replies_begin_alike(gpt2: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    for sky, marker in (("[INST] Why is the sky blue? [/INST]", None), ("Q: Why is the sky blue?\nA:", "\nA:")):
        write_jsonl(tmp_path / "train.jsonl", [{"chosen": f"{sky} It is light.", "rejected": f"{sky} It is paint."}])
        write_jsonl(tmp_path / "test.jsonl", [{"chosen": f"{sky} Air scatters blue.", "rejected": f"{sky} No idea."}])
        report = prepare(tmp_path, gpt2, prompt_marker=marker).audit
        assert report["test"]["first_turn_in_train"] == 1
        assert {part["prompts_known_by"] for part in report.values()} == {"a marker in whole texts"}


BLUE = [user("Blue?"), reply("Sky."), user("And red?"), reply("Rose.")]
RED = [*BLUE[:-1], reply("Sea.")]
SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = "\n\nHuman: Blue?\n\nAssistant: Sky.\n\nHuman: Red?\n\nAssistant:"
SEA = [BLUE[0], reply("Sea.")]
# A prompt and two sides; and what they are together, where the prompt is not in them already.
JOINED: list[tuple[Any, list[Any], list[Any] | None]] = [
    ("And red?", [BLUE, RED], None),  # it is the last turn
    ("Blue?\n", [BLUE, RED], None),  # it differs in white space
    ("Blue?", [[SYSTEM, *BLUE], [SYSTEM, *RED]], None),
    ([BLUE[0] | {"id": 7}], [BLUE, RED], None),
    ("Q?\n", ["Q?\na", "Q? \nb"], None),  # both sides repeat it
    ("A: ", [" A:x", "A: A: x"], None),
    ("Why\nis it?", ["Why is\u00a0it? a", "Why is it? b"], None),
    ("Red?", [f"{ASKED} a", f"{ASKED} b"], None),  # a turn of it
    ("Red?", [f"<|user|>\nRed?</s>\n<|assistant|>\n{end}" for end in "ab"], None),
    ("Why is it?\n", ["Why is it? a", "b"], ["Why is it? a", "Why is it?\nb"]),
    ("Yes", ["Yesterday", "Yes."], ["YesYesterday", "YesYes."]),  # a word that goes on
    ("Hi", ["Hi there!", " What?"], ["HiHi there!", "Hi What?"]),  # an echo
    ([SYSTEM, BLUE[2]], [BLUE, RED], [[SYSTEM, *BLUE], [SYSTEM, *RED]]),
    (BLUE[:1], ["Sky.", "Sea."], [BLUE[:2], SEA]),
    ("Blue?", [BLUE[1:2], SEA[1:]], [BLUE[:2], SEA]),
]


@pytest.mark.parametrize(("prompt", "sides", "whole"), JOINED, ids=range(len(JOINED)))
def test_a_prompt_is_never_doubled_and_joined_alike_everywhere(
    prompt: Any, sides: list[Any], whole: list[Any] | None, chat: PreTrainedTokenizerBase
) -> None:
    whole = whole or sides
    pair = {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}
    assert texts([pair], chat) == texts([{"chosen": whole[0], "rejected": whole[1]}], chat)
    scored = texts_of({"prompt": prompt, "responses": sides}, chat)
    assert [getattr(text, "messages", text) for text in scored] == whole


def test_a_prompt_that_has_no_place_is_told(chat: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": "Blue?", "chosen": BLUE, "rejected": RED}]
    for side in ([user("Green?"), reply("Grass.")], [{"role": "system", "content": "S"}, user("Green?"), reply("a")]):
        with pytest.raises(UserError, match=r"here, row 1: expected a dialogue that holds its prompt.*'Blue\?'"):
            encoded([*rows, rows[0] | {"rejected": side}], chat)


def plain(count: int, start: int = 0) -> list[Row]:
    return [
        {"prompt": f"what {i}? ", "chosen": f"yes {i}", "rejected": f"no {i} way"} for i in range(start, start + count)
    ]


def test_unread_columns_are_listed_and_can_be_named(gpt2: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"system": "S", "question": f"Q{i}? ", "chosen": "a", "rejected": "b"} for i in range(3)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    for columns, unread, first in ((None, "question, system", "a"), ({"prompt": "question"}, "system", "Q0? a")):
        data = prepare(path, gpt2, eval_strategy="no", columns=columns)
        assert data.audit["train"]["unread_columns"] == unread
        assert gpt2.decode(data.train["chosen_ids"][0][:-1]) == first
    with pytest.raises(
        UserError, match=r"columns: .*\['query'\] that are none of \['chosen', 'question', 'rejected', "
    ):
        prepare(path, gpt2, eval_strategy="no", columns={"prompt": "query", "rejected": "rejected"})


def test_messages_in_text_are_messages(chat: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """As JSON, or as Python prints them; and scored as they are trained on."""
    row = {"chosen": [user("long " * 999), *BLUE[1:]], "rejected": RED}
    for write in (json.dumps, str):
        path = write_jsonl(tmp_path / "x.jsonl", [{side: write(turns) for side, turns in row.items()}])
        assert load_pairs(str(path))["train"].row_at(0) == row
        assert texts_of({"text": write(BLUE)}, chat) == texts_of({"messages": BLUE}, chat)


def test_what_save_to_disk_wrote_is_read_with_its_splits(tmp_path: Path) -> None:
    parts = {"part_a": Dataset.from_list(plain(3)), "part-b.v1": Dataset.from_list(plain(2, 5))}
    DatasetDict(parts).save_to_disk(tmp_path / "dict")
    parts["part_a"].save_to_disk(tmp_path / "one", num_shards=2)
    for folder, expected in (("dict", {"part_a": plain(3), "part-b.v1": plain(2, 5)}), ("one", {"train": plain(3)})):
        found = load_pairs(str(tmp_path / folder))
        assert {name: [split.row_at(i) for i in range(len(split.rows))] for name, split in found.items()} == expected


def test_evaluation_needs_no_margin(gpt2: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [row | {"margin": 0.5} for row in plain(6)])
    for name, margins in (("test", [{}] * 3), ("validation", [{"margin": 1}, {"margin": None}])):
        write_jsonl(tmp_path / f"{name}.jsonl", [row | more for row, more in zip(plain(9, 50), margins, strict=False)])
    data = prepare(tmp_path, gpt2, eval_splits=["validation", "test"])
    assert data.train["margin"][:] == [0.5] * 6 and [len(part) for part in data.evaluation.values()] == [2, 3]
    write_jsonl(tmp_path / "train.jsonl", [row | {"margin": i or None} for i, row in enumerate(plain(6))])
    with pytest.raises(UserError, match=r"train\.jsonl, row 0: .*'margin', found None"):
        prepare(tmp_path, gpt2)


def test_a_column_that_is_not_used_breaks_nothing(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "few" / "train-0.jsonl", plain(10))
    write_jsonl(
        tmp_path / "few" / "train-1.jsonl", [row | {"source": "a", "id": [i]} for i, row in enumerate(plain(10))]
    )
    turning = [row | {"note": None if i < 29_999 else "text"} for i, row in enumerate(plain(30_000))]
    write_jsonl(tmp_path / "many" / "train.jsonl", turning)
    for folder, rows, unread in (("few", 20, ("id", "source")), ("many", 30_000, ("note",))):
        pairs = load_pairs(str(tmp_path / folder))["train"]
        assert (len(pairs.rows), pairs.unread) == (rows, unread)
    late = pa.array([2**60], pa.timestamp("ms"))  # a date that Python cannot hold
    pq.write_table(pa.table({"chosen": ["a"], "rejected": ["b"], "made": late}), tmp_path / "late.parquet")
    assert load_pairs(str(tmp_path / "late.parquet"))["train"].unread == ("made",)
    with (tmp_path / "few" / "train-1.jsonl").open("a") as file:
        file.write('{"prompt": 1, "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(UserError, match=r"train-1\.jsonl, line 11: expected text in every row of 'prompt', found 1"):
        load_pairs(str(tmp_path / "few"))


def test_all_kinds_of_files_in_a_folder_are_read_and_text_stays_text(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train" / "a.jsonl", plain(2))
    (tmp_path / "train" / "b.csv").write_text("prompt,chosen,rejected\nNA,null,1.50\n")
    (tmp_path / "train" / "c.tsv").write_text("prompt\tchosen\trejected\nNA\tNone\t1.50\n")
    table = Dataset.from_list(plain(3)).data.table
    with pa.ipc.new_file(tmp_path / "train" / "d.arrow", table.schema) as file:
        file.write_table(table)
    found = load_pairs(str(tmp_path))["train"]
    assert [count for _, count in found.files] == [2, 1, 1, 3]
    assert [list(found.row_at(row).values()) for row in (2, 3)] == [["NA", "null", "1.50"], ["NA", "None", "1.50"]]
