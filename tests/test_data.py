"""What becomes of each pair: its ids, why it is dropped, how it is cut, and on which side of the split it lands."""

from pathlib import Path

import numpy as np
import pytest
from conftest import REAL_DATA, hh_pairs, needs_real_data, write_jsonl
from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments

from reward_recipes.config import RewardRecipeConfig, parse_recipe
from reward_recipes.data import PreparedData, prepare_data, split_by_prompt
from reward_recipes.pairs.encode import Status, common_prefix_length, encode_pairs
from reward_recipes.pairs.tokens import load_tokenizer
from reward_recipes.run.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
FINDINGS = ROOT / "recipes/gpt2-small/hh-rlhf/findings.yaml"


@pytest.fixture
def gpt2(gpt2_dir: Path) -> PreTrainedTokenizerBase:
    """EOS is 0; `!`, `"`, `#`, `$`, ... are 1, 2, 3, 4, ..."""
    return load_tokenizer(str(gpt2_dir))


@pytest.fixture
def chat(chat_dir: Path) -> PreTrainedTokenizerBase:
    """EOS is 2, pad 3; the template is ChatML."""
    return load_tokenizer(str(chat_dir))


def encode(
    rows: list[dict], tokenizer: PreTrainedTokenizerBase, max_length: int = 100, overlong: str = "drop"
) -> Dataset:
    return encode_pairs(Dataset.from_list(rows), tokenizer, max_length, overlong, [])


def user(content: str | None) -> dict[str, str | None]:
    return {"role": "user", "content": content}


def assistant(content: str | None) -> dict[str, str | None]:
    return {"role": "assistant", "content": content}


def test_ids_prefix_lengths_and_row_of_a_pair(gpt2: PreTrainedTokenizerBase) -> None:
    first, second = encode([{"chosen": "!!#", "rejected": "!!"}, {"chosen": '"', "rejected": "$$"}], gpt2)
    assert (first["chosen_ids"], first["rejected_ids"]) == ([1, 1, 3, 0], [1, 1, 0])
    assert (first["prefix"], first["chosen_length"], first["rejected_length"], first["row"]) == (2, 4, 3, 0)
    assert (second["chosen_ids"], second["rejected_ids"]) == ([2, 0], [4, 4, 0])
    assert (second["prefix"], second["status"], second["row"], second["subset"]) == (0, Status.KEPT, 1, -1)


@pytest.mark.parametrize(
    ("left", "right", "prefix"),
    [
        ([1, 2, 0], [1, 3, 0], 1),
        ([1, 2, 0], [1, 2, 3, 0], 2),  # one side continues the other
        ([0], [0], 0),  # EOS is never part of the prefix, so a score is left to read on each side
        ([0], [1, 0], 0),
        ([], [], 0),
        ([1, 5, 5, 0], [1, 4, 5, 0], 1),  # what is equal again later is no prefix
    ],
)
def test_common_prefix_ends_before_eos(left: list[int], right: list[int], prefix: int) -> None:
    assert common_prefix_length(np.array(left), np.array(right)) == prefix
    assert common_prefix_length(np.array(right), np.array(left)) == prefix


def test_dropped_pairs_are_counted_beside_kept_ones(gpt2: PreTrainedTokenizerBase) -> None:
    """Every reason in one batch, at 4 tokens: three and EOS fit."""
    rows = [
        {"chosen": "!!!", "rejected": "#"},
        {"chosen": None, "rejected": "#"},
        {"chosen": "!", "rejected": " \n\t"},
        {"chosen": "", "rejected": "#"},
        {"chosen": "!#", "rejected": "!#"},
        {"chosen": "!#<|endoftext|>", "rejected": "!#"},  # alike once the literal EOS is off
        {"chosen": "!!!!", "rejected": "#"},
        {"chosen": "#", "rejected": "!!!!!!!"},
        {"chosen": "!!!!!!!", "rejected": "!!!!!!!"},
    ]
    encoded = encode(rows, gpt2, max_length=4)
    blank, same, long = Status.BLANK, Status.IDENTICAL, Status.OVERLONG
    assert encoded["status"][:] == [Status.KEPT, blank, blank, blank, same, same, long, long, same]
    assert [len(ids) for ids in encoded["chosen_ids"]] == [4, 0, 0, 0, 0, 0, 0, 0, 0]
    assert encoded["chosen_length"][:] == [4, 0, 0, 0, 3, 3, 5, 2, 8]
    assert encoded["row"][:] == list(range(9))


def test_keep_end_cuts_both_sides_alike(gpt2: PreTrainedTokenizerBase) -> None:
    """At 5 tokens: `!"#$%` and EOS are one too many, so one goes from both sides, and the prefix stays aligned."""
    rows = [
        {"chosen": '!"#$%', "rejected": '!"#&'},
        {"chosen": '!"#&', "rejected": '!"#$%'},
        {"chosen": "!!!!!!!!", "rejected": "!#"},  # 9 and 3 tokens: nothing of the second would be left
        {"chosen": "!!!!!#", "rejected": "!#"},  # 7 and 3 tokens: only EOS would be left
        {"chosen": '"!!!!!', "rejected": "#!!!!!"},  # differ in what is cut off
        {"chosen": '"!!!!#', "rejected": '"!!!!$'},
    ]
    encoded = encode(rows, gpt2, max_length=5, overlong="keep_end")
    assert (encoded[0]["chosen_ids"], encoded[0]["rejected_ids"]) == ([2, 3, 4, 5, 0], [2, 3, 6, 0])
    assert (encoded[1]["chosen_ids"], encoded[1]["rejected_ids"]) == ([2, 3, 6, 0], [2, 3, 4, 5, 0])
    assert [encoded[row]["prefix"] for row in (0, 1)] == [2, 2]
    assert [encoded[row]["chosen_length"] for row in (0, 1)] == [6, 5]
    cut = Status.CUT
    assert encoded["status"][:] == [cut, cut, Status.OVERLONG, Status.OVERLONG, Status.IDENTICAL_AFTER_CUT, cut]
    assert (encoded[5]["chosen_ids"], encoded[5]["rejected_ids"]) == ([1, 1, 1, 3, 0], [1, 1, 1, 4, 0])
    assert encoded[4]["chosen_ids"] == [] and encoded[4]["chosen_length"] == 7


@pytest.mark.parametrize("kind", ["gpt2_dir", "llama_dir"])
def test_no_kept_text_holds_a_pad_or_a_second_eos(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer(str(request.getfixturevalue(kind)))
    eos, pad = tokenizer.eos_token, tokenizer.pad_token
    rows = [
        {"chosen": f"{pad} {eos} a {eos}{eos}", "rejected": f"b{pad}"},
        {"chosen": f"c{eos}", "rejected": "c"},
        {"chosen": f"{pad * 9} end{eos}", "rejected": f"{pad * 9}{eos}and"},
    ]
    for overlong, length in (("drop", 500), ("keep_end", 40)):
        encoded = encode(rows, tokenizer, length, overlong)
        assert encoded[1]["status"] == Status.IDENTICAL
        for ids in [encoded[row][side] for row in (0, 2) for side in ("chosen_ids", "rejected_ids")]:
            assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
            assert tokenizer.pad_token_id not in ids and len(ids) <= length
    assert encoded[2]["status"] == Status.CUT


def test_explicit_and_implicit_prompts_give_the_same_ids_and_first_turn(gpt2: PreTrainedTokenizerBase) -> None:
    prompt = "\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: And?\n\nAssistant:"
    implicit = {"chosen": f"{prompt} Because.", "rejected": f"{prompt} No."}
    explicit = {"prompt": prompt, "chosen": " Because.", "rejected": " No."}
    (ours,), (theirs,) = encode([implicit], gpt2), encode([explicit], gpt2)
    assert ours == theirs and ours["prefix"] > 20


def test_dialogues_with_and_without_prompt_give_the_same_ids(chat: PreTrainedTokenizerBase) -> None:
    """The prompt as messages, as text beside replies, or as text beside whole dialogues (ultrafeedback_binarized)."""
    chosen, rejected = [assistant("Yes")], [assistant("No")]
    whole = {"chosen": [user("Q"), *chosen], "rejected": [user("Q"), *rejected]}
    layouts = [
        whole,
        {"prompt": [user("Q")], "chosen": chosen, "rejected": rejected},
        {"prompt": "Q", "chosen": chosen, "rejected": rejected},
        {"prompt": "Q", **whole},
        {"prompt": [user("Q")], **whole},
        {"prompt": [{**user("Q"), "id": 7}], **whole},
        {"prompt": "", **whole},
    ]
    first, *others = (encode([layout], chat)[0] for layout in layouts)
    assert all(other == first for other in others)
    assert chat.decode(first["chosen_ids"]) == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>"
    assert first["prefix"] == len(first["chosen_ids"]) - len(chat("Yes")["input_ids"]) - 1


def test_system_turn_before_the_prompt_is_kept_once(chat: PreTrainedTokenizerBase) -> None:
    system = {"role": "system", "content": "S"}
    row = {
        "prompt": "Q",
        "chosen": [system, user("Q"), assistant("A")],
        "rejected": [system, user("Q"), assistant("B")],
    }
    text = chat.decode(encode([row], chat)[0]["chosen_ids"])
    assert text.count("<|im_start|>") == 3 and text.startswith("<|im_start|>system\nS<|im_end|>")


def test_messages_without_text_are_missing(chat: PreTrainedTokenizerBase) -> None:
    good = [user("Q"), assistant("A")]
    rows = [
        {"prompt": "Q", "chosen": chosen, "rejected": good}
        for chosen in (
            [user("Q"), assistant("B")],
            [user("Q"), assistant(" ")],
            [user(None), assistant("B")],
            [{"role": None, "content": "B"}],
            [],
            None,
            [None],
        )
    ]
    rows.append({"prompt": None, "chosen": [assistant("B")], "rejected": good})
    assert encode(rows, chat)["status"][:] == [Status.KEPT, *[Status.BLANK] * 7]
    rows = [{"prompt": [user(None)], "chosen": [assistant("B")], "rejected": [assistant("C")]}]
    rows.append({"prompt": [user("Q")], "chosen": [assistant("B")], "rejected": [assistant("C")]})
    assert encode(rows, chat)["status"][:] == [Status.BLANK, Status.KEPT]


def test_margin_and_subset_are_kept(gpt2: PreTrainedTokenizerBase) -> None:
    rows = [
        {"chosen": "!", "rejected": "#", "margin": 1, "subset": "b"},
        {"chosen": "!", "rejected": None, "margin": 2, "subset": "a"},
    ]
    encoded = encode_pairs(Dataset.from_list(rows), gpt2, 10, "drop", ["a", "b"])
    assert encoded["margin"][:] == [1.0, 2.0] and encoded["subset"][:] == [1, 0]
    assert "margin" not in encode([{"chosen": "!", "rejected": "#"}], gpt2).column_names


def first_turn(gpt2: PreTrainedTokenizerBase, *texts: str, **more: str) -> int:
    (pair,) = encode([{"chosen": texts[0], "rejected": texts[1], **more}], gpt2)
    return pair["prompt_id"]


def test_first_turn_identifies_a_dialogue(gpt2: PreTrainedTokenizerBase) -> None:
    turn = "\n\nHuman: Why?\n\nAssistant:"
    same = first_turn(gpt2, f"{turn} A", f"{turn} B")
    assert same == first_turn(
        gpt2, f"{turn} C\n\nHuman: And?\n\nAssistant: D", f"{turn} C\n\nHuman: Or?\n\nAssistant: E"
    )
    assert same == first_turn(gpt2, " F", " G", prompt=turn)
    assert same != first_turn(gpt2, f"{turn.replace('Why', 'How')} A", f"{turn} B")
    # In other formats: the prompt where it is given, else what both sides share.
    asked = first_turn(gpt2, "A", "B", prompt="Q: why? ")
    assert asked == first_turn(gpt2, f"C{turn}D", "E", prompt="Q: why? ") == first_turn(gpt2, "Q: why? A", "Q: why? B")


def test_split_by_prompt_keeps_a_prompt_on_one_side() -> None:
    prompts = np.random.default_rng(0).integers(0, 300, 1000)
    kept, held_out = split_by_prompt(prompts, 0.1, seed=1)
    assert sorted([*kept, *held_out]) == list(range(1000)) and len(held_out) == 100
    assert not set(prompts[kept]) & set(prompts[held_out])
    assert np.array_equal(held_out, split_by_prompt(prompts, 0.1, seed=1)[1])
    assert not np.array_equal(held_out, split_by_prompt(prompts, 0.1, seed=2)[1])


def test_split_by_prompt_draws_at_random() -> None:
    prompts = np.arange(1000)
    held_out = split_by_prompt(prompts, 0.1, seed=0)[1]
    assert len(held_out) == 100 and 350 < held_out.mean() < 650 and len(np.unique(np.diff(held_out))) > 5


def test_split_by_prompt_stays_below_the_share_where_prompts_are_too_large() -> None:
    """Of 3 + 3 + 4 rows, 5 are wanted: 3 or 4 fit. Of 10 rows with one prompt, none."""
    sizes = {len(split_by_prompt(np.repeat([7, 8, 9], [3, 3, 4]), 0.5, seed)[1]) for seed in range(20)}
    assert sizes == {3, 4}
    assert len(split_by_prompt(np.zeros(10, dtype=int), 0.5, seed=0)[1]) == 0


def test_the_study_s_pairs_give_the_study_s_steps() -> None:
    """160,800 pairs, up to 20 on a prompt: 10% held out leave 144,720, and 3 epochs of 4 are 108,540 steps."""
    sizes = np.minimum(np.random.default_rng(0).geometric(0.8, 160_800), 20)
    prompts = np.repeat(np.arange(len(sizes)), sizes)[:160_800]
    _, config, *_ = parse_recipe(["--config", str(FINDINGS), "--bf16", "false"])
    kept, held_out = split_by_prompt(prompts, config.validation_fraction, config.seed)
    assert (len(kept), len(held_out)) == (144_720, 16_080)
    assert len(kept) / config.per_device_train_batch_size * config.num_train_epochs == 108_540


def maps(dataset: Dataset) -> int:
    """How many files of tokenised pairs lie in the cache beside a data set."""
    return len(list(Path(dataset.cache_files[0]["filename"]).parent.glob("cache-*.arrow")))


def test_tokenised_pairs_are_cached_until_something_changes(
    gpt2_dir: Path, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", hh_pairs(5))

    def encoded(folder: Path = gpt2_dir, length: int = 50, overlong: str = "drop", **tokens: str) -> int:
        dataset = load_dataset("json", data_files=str(path), split="train")
        tokenizer = load_tokenizer(str(folder))
        tokenizer.add_special_tokens(tokens)
        encode_pairs(dataset, tokenizer, length, overlong, [])
        encode_pairs(dataset, tokenizer, length, overlong, [])  # a tokenizer that was called is no other one
        return maps(dataset)

    assert [encoded(), encoded(), encoded()] == [1, 1, 1]
    assert encoded(length=60) == 2
    assert encoded(overlong="keep_end") == 3
    assert encoded(folder=llama_dir) == 4
    assert encoded(eos_token="!") == 5
    assert encoded(pad_token="!") == 6
    monkeypatch.setattr("reward_recipes.pairs.encode.ENCODING", 2)
    assert encoded() == 7
    write_jsonl(path, hh_pairs(6))
    assert encoded() == 1  # changed data are another data set


def prepare(
    source: Path, tokenizer: PreTrainedTokenizerBase, script: dict[str, str] | None = None, **options: object
) -> PreparedData:
    options = {"output_dir": "unused", "bf16": False, "max_length": 100} | options
    return prepare_data(ScriptArguments(str(source), **script or {}), RewardRecipeConfig(**options), tokenizer)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """40 training pairs, of which 6 and 7 share a first turn and 2 has blank text; and 7 test pairs."""
    train = hh_pairs(40)
    train[2] = train[2] | {"chosen": " "}
    train[7] = train[6] | {"rejected": train[6]["rejected"] + " Or not."}
    write_jsonl(tmp_path / "train.jsonl", train)
    write_jsonl(tmp_path / "test.jsonl", hh_pairs(7, start=100))
    return tmp_path


def test_test_split_evaluates_where_nothing_is_held_out(source: Path, gpt2: PreTrainedTokenizerBase) -> None:
    data = prepare(source, gpt2)
    assert {name: len(dataset) for name, dataset in data.evaluation.items()} == {"test": 7}
    assert (len(data.train), len(data.test), len(data.encoded["train"])) == (39, 7, 40)
    assert 2 not in data.train["row"][:] and data.subsets == []


def test_validation_is_held_out_of_the_usable_pairs(source: Path, gpt2: PreTrainedTokenizerBase) -> None:
    data = prepare(source, gpt2, validation_fraction=0.25)
    assert (len(data.train), len(data.evaluation["validation"]), len(data.test)) == (29, 10, 7)
    assert not set(data.train["prompt_id"]) & set(data.evaluation["validation"]["prompt_id"])
    assert list(data.evaluation) == ["validation"] and "validation" not in data.encoded
    named = prepare(source, gpt2, validation_fraction=0.25, eval_splits=["validation", "test"])
    assert [(name, len(dataset)) for name, dataset in named.evaluation.items()] == [("validation", 10), ("test", 7)]
    assert named.evaluation["validation"]["row"][:] == data.evaluation["validation"]["row"][:]


def test_a_smaller_draw_is_a_part_of_a_larger_one(source: Path, gpt2: PreTrainedTokenizerBase) -> None:
    """Of 29 pairs; the order stays that of the source, and what evaluates and tests stays what it was."""
    whole = prepare(source, gpt2, validation_fraction=0.25)
    everything, larger = whole.train["row"][:], []
    for size in (3, 10, 20, 28, 29, 1000):
        data = prepare(source, gpt2, validation_fraction=0.25, max_train_samples=size)
        drawn = data.train["row"][:]
        assert len(drawn) == min(size, 29) and set(larger) <= set(drawn) <= set(everything) and sorted(drawn) == drawn
        assert data.evaluation["validation"].to_list() == whole.evaluation["validation"].to_list()
        assert data.test.to_list() == whole.test.to_list()
        larger = drawn
    assert larger == everything


def test_a_draw_follows_the_seed_and_is_no_beginning(source: Path, gpt2: PreTrainedTokenizerBase) -> None:
    draws = [prepare(source, gpt2, max_train_samples=10, seed=seed).train["row"][:] for seed in (1, 1, 2, 3)]
    assert draws[0] == draws[1] and len({tuple(draw) for draw in draws}) == 3
    assert all(max(draw) > 20 for draw in draws)  # ten of 39


def test_a_draw_of_the_eval_splits_leaves_the_test_whole(source: Path, gpt2: PreTrainedTokenizerBase) -> None:
    splits = ["validation", "test"]
    data = prepare(source, gpt2, validation_fraction=0.25, eval_splits=splits, max_eval_samples=5)
    assert [len(data.evaluation[name]) for name in splits] == [5, 5] and (len(data.train), len(data.test)) == (29, 7)
    more = prepare(source, gpt2, validation_fraction=0.25, eval_splits=splits, max_eval_samples=6)
    assert all(set(data.evaluation[name]["row"]) < set(more.evaluation[name]["row"]) for name in splits)


def test_no_evaluation_needs_no_other_split(tmp_path: Path, gpt2: PreTrainedTokenizerBase) -> None:
    data = prepare(write_jsonl(tmp_path / "pairs.jsonl", hh_pairs(3)), gpt2, eval_strategy="no")
    assert (len(data.train), data.evaluation, data.test) == (3, {}, None)


def test_splits_that_are_not_used_are_not_judged(source: Path, gpt2: PreTrainedTokenizerBase) -> None:
    """Evaluation takes the validation split where there is one, unless the recipe names another."""
    write_jsonl(source / "validation.jsonl", [{"chosen": "!", "rejected": "!"}])
    assert set(prepare(source, gpt2, eval_splits=["test"]).encoded) == {"train", "test"}
    with pytest.raises(UserError, match=r"split validation: .*found all 1 dropped: {'identical': 1}"):
        prepare(source, gpt2)


def test_subsets_are_numbered_alike_in_every_split(tmp_path: Path, gpt2: PreTrainedTokenizerBase) -> None:
    for index, name in enumerate(("b", "a")):
        write_jsonl(tmp_path / name / "train.jsonl", hh_pairs(2, start=10 * index))
        write_jsonl(tmp_path / name / "test.jsonl", hh_pairs(1, start=50 + index))
    data = prepare(tmp_path, gpt2, dataset_data_dirs=["b", "a"])
    assert data.subsets == ["a", "b"]
    assert data.train["subset"][:] == [1, 1, 0, 0] and data.test["subset"][:] == [1, 0]


def test_several_processes_encode_alike(source: Path, gpt2: PreTrainedTokenizerBase) -> None:
    one, two = prepare(source, gpt2), prepare(source, gpt2, dataset_num_proc=2, max_length=101)
    assert one.train.to_list() == two.train.to_list()


def test_data_that_cannot_be_trained_on_says_why(source: Path, gpt2: PreTrainedTokenizerBase) -> None:
    for options, message in [
        ({"max_length": 5}, r"split train: .*found all 40 dropped: {'blank': 1, 'overlong': 39}; .*max_length"),
        (
            {"eval_splits": ["dev"]},
            r"expected a split 'dev', found \['test', 'train'\]; name another one, or set valid",
        ),
        ({"script": {"dataset_train_split": "training"}}, r"expected a split 'training', found \['test', 'train'\]"),
        ({"script": {"dataset_test_split": "final"}}, r"expected a split 'final'"),
        ({"validation_fraction": 0.01}, "leaves 39 to train on and 0 to validate; change it or give more pairs"),
    ]:
        with pytest.raises(UserError, match=message):
            prepare(source, gpt2, **options)
    write_jsonl(source / "validation.jsonl", hh_pairs(2, start=200))
    with pytest.raises(UserError, match="has a validation split of its own: set validation_fraction to 0"):
        prepare(source, gpt2, validation_fraction=0.25)
    assert list(prepare(source, gpt2, eval_splits=["validation", "test"]).evaluation) == ["validation", "test"]


def test_wrong_columns_are_told_before_a_missing_split(tmp_path: Path, gpt2: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"expected columns 'chosen' and 'rejected', found \['bad', 'good'\]"):
        prepare(write_jsonl(tmp_path / "pairs.jsonl", [{"good": "a", "bad": "b"}]), gpt2)


def test_error_of_a_worker_process_reaches_the_user(tmp_path: Path, gpt2: PreTrainedTokenizerBase) -> None:
    rows = [{"chosen": [user("Q"), assistant(str(i))], "rejected": [user("Q"), assistant("B")]} for i in range(4)]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(UserError, match="need a chat template, found none"):
        prepare(path, gpt2, eval_strategy="no", dataset_num_proc=2)


@needs_real_data
def test_real_pairs_with_the_real_tokenizer() -> None:
    """52 of the 1,482 pairs of harmless-base are over 512 tokens."""
    tokenizer = load_tokenizer(str(REAL_DATA / "gpt2-tokenizer"))
    data = prepare(REAL_DATA / "hh-rlhf", tokenizer, max_length=512, dataset_data_dirs=["harmless-base"])
    assert data.subsets == ["harmless-base"] and set(data.train["subset"]) == {0}
    assert (len(data.encoded["train"]), len(data.train)) == (1482, 1430)
    for side in ("chosen_ids", "rejected_ids"):
        for ids in data.test[side]:
            assert ids[-1] == 50256 and ids.count(50256) == 1 and 50257 not in ids
