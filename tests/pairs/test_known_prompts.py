"""Pairs on one prompt are on one side of the validation split, whatever the layout; with a sign, prompts stay apart.

Prompts are known here since they are generated: some begin alike, some have several pairs, whose replies begin alike.
"""

import random
from pathlib import Path

import pytest
from conftest import as_pairs

from reward_recipes.pairs import KnownBy, encode_splits, hold_out, load_tokenizer
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_pairs_on_a_prompt_have_its_name_and_with_a_sign_no_other_has(layout: str, gpt2_dir: Path) -> None:
    """So that no prompt is on both sides of a share that is held out, which is the one that was asked for."""
    refused, tokenizer, sign = 0, load_tokenizer(str(gpt2_dir)), LAYOUTS[layout][1]
    for seed in SEEDS:
        prompts, rows = generated(layout, seed)
        marker = MARKER if layout == "Q and A" else None
        pairs = encode_splits({"": as_pairs(rows)}, tokenizer, 9999, "drop", [], marker=marker)[""]
        names = {prompt: set() for prompt in prompts}
        for prompt, name in zip(prompts, pairs["prompt_id"], strict=True):
            names[prompt].add(name)
        assert all(len(found) == 1 for found in names.values())
        assert set(pairs["known_by"]) == {sign}
        apart = len(set.union(*names.values())) / len(names)
        assert apart >= (0.8 if sign == KnownBy.BEGINNING else 0.9)
        try:
            train, validation = (part["row"][:] for part in hold_out(pairs, 0.2, seed))
        except UserError as error:
            assert "can be held out by whole prompts" in str(error)
            refused += 1
            continue
        assert len(train) + len(validation) == len(rows)
        assert not {prompts[row] for row in train} & {prompts[row] for row in validation}
        assert abs(len(validation) - 0.2 * len(rows)) <= max(1, 0.02 * len(rows))
    assert refused == 0 or sign == KnownBy.BEGINNING
