"""Pairs on one prompt are on one side of the validation split, whatever the layout; with a sign, prompts stay apart.

Prompts are known here since they are generated: some begin alike, some have several pairs, whose replies begin alike.
"""

import random
from pathlib import Path

import pytest
from conftest import as_pairs, write_jsonl
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments

from reward_recipes.config import RewardRecipeConfig
from reward_recipes.data import prepare_data
from reward_recipes.pairs import KnownBy, encode_splits, load_tokenizer
from reward_recipes.run import UserError

WORDS = "stone lamp north quiet apple walk river seven green paper table cloud".split()
PREAMBLE = "You are a helpful assistant. Answer in one sentence.\n\n"
ALPACA = "Below is an instruction.\n\n### Instruction:\n{}\n\n### Response:\n{}"
# How a prompt and a reply are written, and by which sign the prompt is known in that.
LAYOUTS: dict[str, tuple[str, KnownBy]] = {
    "HH": ("\n\nHuman: {}\n\nAssistant: {}", KnownBy.HH_LAYOUT),
    "INST": ("[INST] {} [/INST] {}", KnownBy.MARKER),
    "Alpaca": (ALPACA, KnownBy.MARKER),
    "ChatML": ("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>", KnownBy.MARKER),
    "Q and A": ("Q: {}\nA: {}", KnownBy.MARKER),  # by the option prompt_marker
    "preamble": (PREAMBLE + "{}\n\n{}", KnownBy.BEGINNING),
    "bare": ("{} {}", KnownBy.BEGINNING),
}
MARKER = "\nA:"
ENDS = [*[""] * 8, "\n\nHuman: And?\n\nAssistant: So.", " [/INST]"]  # some replies run on
SEEDS = range(6)


@pytest.fixture(scope="module")
def gpt2(gpt2_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(gpt2_dir))


def some(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def generated(layout: str, seed: int) -> tuple[list[str], list[dict[str, str]]]:
    """The prompt of each pair, and the pairs as whole texts, in any order."""
    rng, (written, _) = random.Random(seed), LAYOUTS[layout]
    stems = [f"What {some(rng, 1, 3)}", *(some(rng, 1, 2) for _ in range(9))]
    prompts = list(dict.fromkeys(f"{rng.choice(stems)} {some(rng, 4, 9)}?" for _ in range(60)))
    pairs = []
    for prompt in prompts:
        opening = some(rng, 1, 3)  # of all replies to it
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            shared = f"{opening} {some(rng, 0, 4)}"  # of both replies of a pair
            sides = [f"{shared} {end} {some(rng, 1, 9)}.{rng.choice(ENDS)}" for end in ("yes", "no")]
            gaps = [" "] if layout == "HH" else [" ", " ", "  "]
            spaced = [prompt.replace(" ", rng.choice(gaps), 1) for _ in sides]
            texts = [written.format(*parts) for parts in zip(spaced, sides, strict=True)]
            pairs.append((prompt, dict(zip(("chosen", "rejected"), texts, strict=True))))
    rng.shuffle(pairs)
    return [prompt for prompt, _ in pairs], [pair for _, pair in pairs]


def encoded(layout: str, seed: int, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], Dataset]:
    prompts, rows = generated(layout, seed)
    marker = MARKER if layout == "Q and A" else None
    return prompts, encode_splits({"": as_pairs(rows)}, tokenizer, 9999, "drop", [], marker=marker)[""]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_pairs_on_a_prompt_have_its_name_and_with_a_sign_no_other_has(
    layout: str, gpt2: PreTrainedTokenizerBase
) -> None:
    for seed in SEEDS:
        prompts, pairs = encoded(layout, seed, gpt2)
        names = {prompt: set() for prompt in prompts}
        for prompt, name in zip(prompts, pairs["prompt_id"], strict=True):
            names[prompt].add(name)
        assert all(len(found) == 1 for found in names.values())
        assert set(pairs["known_by"]) == {LAYOUTS[layout][1]}
        apart = len(set.union(*names.values())) / len(names)
        assert apart >= (0.8 if LAYOUTS[layout][1] == KnownBy.BEGINNING else 0.9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_prompt_is_on_both_sides_of_a_share_that_was_asked_for(
    layout: str, gpt2: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    refused = 0
    for seed in SEEDS:
        prompts, rows = generated(layout, seed)
        path = write_jsonl(tmp_path / f"{seed}.jsonl", rows)
        marker = MARKER if layout == "Q and A" else None
        options = {"bf16": False, "max_length": 9999, "validation_fraction": 0.2, "prompt_marker": marker, "seed": seed}
        try:
            data = prepare_data(ScriptArguments(str(path)), RewardRecipeConfig("unused", **options), gpt2)
        except UserError as error:
            assert "can be held out by whole prompts" in str(error)
            refused += 1
            continue
        train, validation = (part["row"][:] for part in (data.train, data.evaluation["validation"]))
        assert len(train) + len(validation) == len(rows)
        assert not {prompts[row] for row in train} & {prompts[row] for row in validation}
        assert abs(len(validation) - 0.2 * len(rows)) <= max(1, 0.02 * len(rows))
    assert refused == 0 or LAYOUTS[layout][1] == KnownBy.BEGINNING
