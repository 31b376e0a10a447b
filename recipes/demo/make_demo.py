"""Write a demo that needs no network: preference pairs with a known answer and a tiny GPT-2 to train on them.

`python recipes/demo/make_demo.py --output_dir outputs/demo` writes `model/` (random GPT-2 weights and a byte-level BPE
tokenizer without a pad token), `data/train.jsonl` and `data/test.jsonl` (`chosen`, `rejected`: whole dialogues in the
HH format) and `demo.json` (how the pairs were made, and the best accuracy they allow).

Each sentence of a reply opens with a cue whose weight is in `CUES`; what follows the cue is noise. The better reply is
the one with the higher `reply_quality`, and a stated share of labels is flipped at random. A model can learn the rule,
which holds for unseen questions too; it can only memorise a flipped label.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from reward_recipes.run import run_cli

END_OF_TEXT = "<|endoftext|>"
HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "

CUES: dict[str, int] = {
    "Read the label before you": 2,
    "Set a timer when you": 2,
    "Ask a friend to watch while you": 2,
    "Test a small corner, then": 2,
    "Take your time as you": 1,
    "Open a window while you": 1,
    "Perhaps you could": -1,
    "Some people just": -1,
    "Skip the instructions and": -2,
    "Hurry up and": -2,
    "Guess the amount and": -2,
    "Do not bother to look, just": -2,
}
VERBS = "rinse move wrap clean fill cover dry lift label stack turn warm sort fold shake store".split()
SHADES = "blue green red white grey brown old new small large heavy light round square plain spare".split()
THINGS = (
    "bowl towel basket bucket jar brush tray cloth box pan shelf spoon lid bottle sponge plate rack cup bag tin "
    "pot hook drawer kettle"
).split()
PLACES = (
    "near the sink|by the door|on the table|in the garden|under the lamp|after lunch|before noon|in the evening|"
    "with warm water|with cold water|on the balcony|in the hall|at the weekend|with both hands|next to the stove|"
    "on the floor"
).split("|")
TASKS = (
    "bake bread|grow tomatoes|paint a fence|clean the oven|plan a picnic|mend a shirt|polish shoes|cook rice|"
    "brew tea|knit a scarf|fix a chair|wash curtains|make soup|pack a suitcase|build a kite|press flowers|"
    "train a vine|dry herbs|frame a photo|sharpen pencils|tidy a garage|plant bulbs|make candles|pickle onions|"
    "hang a mirror|store apples|wax a table|roast peanuts|feed wild birds|make jam"
).split("|")
OPENERS = "How do I|What is a good way to|Can you help me|What is the easiest way to|What do I need to".split("|")
OCCASIONS = (
    "for my sister|for two guests|for ten guests|for a school fair|for the first time|for a neighbour|on Monday|"
    "on Friday|on a rainy day|on a small budget|in a tiny kitchen|in an old house|in spring|in winter|"
    "before a long trip|without much noise|with three children|with one hand|within an hour|at short notice"
).split("|")
FOLLOW_UPS = "What comes next?|And after that?|Is there more to do?|Then what?|Anything else?".split("|")

PAIRS = {"train": 1500, "test": 500}
SHARE_FLIPPED = 0.2
MIN_GAP = 3  # in quality, between the two replies of a pair
VOCAB_SIZE = 1000
MODEL = {"n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 4}

Rows = list[dict[str, str]]


def reply_quality(dialogue: str) -> int:
    """The hidden quality of a dialogue's last reply: the sum of the weights of the cues in it, each counted once."""
    reply = dialogue.rpartition(ASSISTANT)[2]
    return sum(weight for cue, weight in CUES.items() if cue in reply)


def _reply(rng: random.Random, sentences: int) -> str:
    cues = rng.sample(list(CUES), sentences)
    rests = [f"{rng.choice(VERBS)} the {rng.choice(SHADES)} {rng.choice(THINGS)} {rng.choice(PLACES)}" for _ in cues]
    return " ".join(f"{cue} {rest}." for cue, rest in zip(cues, rests, strict=True))


def _pair(rng: random.Random, first_turn: str) -> tuple[str, str]:
    """A better and a worse dialogue that differ in the last reply only."""
    prompt = HUMAN + first_turn
    for _ in range(rng.randint(0, 2)):
        prompt += ASSISTANT + _reply(rng, rng.randint(1, 2)) + HUMAN + rng.choice(FOLLOW_UPS)
    while True:
        pair = [prompt + ASSISTANT + _reply(rng, rng.randint(2, 3)) for _ in range(2)]
        worse, better = sorted(pair, key=reply_quality)
        if reply_quality(better) - reply_quality(worse) >= MIN_GAP:
            return better, worse


def make_splits(seed: int) -> dict[str, Rows]:
    """`train` and `test` rows (`chosen`, `rejected`); no first human turn occurs twice, in one or both.

    The share of flipped labels is exact in each split, and so is the ceiling.
    """
    rng = random.Random(seed)
    questions = [f"{opener} {task} {occasion}?" for opener in OPENERS for task in TASKS for occasion in OCCASIONS]
    first_turns = iter(rng.sample(questions, sum(PAIRS.values())))
    splits = {}
    for name, size in PAIRS.items():
        flipped = set(rng.sample(range(size), round(SHARE_FLIPPED * size)))
        pairs = [_pair(rng, next(first_turns)) for _ in range(size)]
        labelled = [pair[::-1] if i in flipped else pair for i, pair in enumerate(pairs)]
        splits[name] = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in labelled]
    return splits


def _train_tokenizer(rows: Rows) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer like GPT-2's: it can encode any text, and it has no pad token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text for row in rows for text in row.values()], trainer)
    special = dict.fromkeys(("eos_token", "bos_token", "unk_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MODEL["n_positions"], **special)


def write_demo(output_dir: Path, seed: int = 0) -> dict[str, Any]:
    """Write the demo under `output_dir`, over an earlier one's files, and return what `demo.json` holds.

    `ceiling` there is the accuracy of the true quality: one less the share of flipped labels.
    """
    (output_dir / "data").mkdir(parents=True, exist_ok=True)
    (output_dir / "model").mkdir(exist_ok=True)
    splits = make_splits(seed)
    for name, rows in splits.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (output_dir / "data" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    tokenizer = _train_tokenizer(splits["train"])
    tokenizer.save_pretrained(output_dir / "model")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(seed)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **MODEL, **ids)).save_pretrained(output_dir / "model")
    facts = {"seed": seed, **{f"{name}_pairs": size for name, size in PAIRS.items()}, "share_flipped": SHARE_FLIPPED}
    facts |= {"min_gap": MIN_GAP, "vocab_size": VOCAB_SIZE, **MODEL}
    facts |= {f"share_flipped_{name}": SHARE_FLIPPED for name in PAIRS} | {"ceiling": 1 - SHARE_FLIPPED}
    (output_dir / "demo.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def main() -> None:
    """Read the command line, write the demo and print the known ceiling."""
    parser = argparse.ArgumentParser(description="Write a demo model and preference pairs with a known answer.")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write model/, data/ and demo.json to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the pairs and of the weights (default 0)")
    args = parser.parse_args()
    facts = write_demo(args.output_dir, args.seed)
    print(f"wrote {args.output_dir}: {facts['train_pairs']} pairs to train on, {facts['test_pairs']} to test on")
    print(f"best reachable test accuracy: {facts['ceiling']:.1%} ({facts['share_flipped_test']:.1%} of labels flipped)")


if __name__ == "__main__":
    run_cli(main)
