"""The folder of a run gives the same score to whoever loads it, by the plain way of each library."""

import ast
import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import hh_pairs, write_jsonl
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.data_utils import _tokenize
from whole_runs import arguments, run

from reward_recipes import RewardFunction
from reward_recipes.evaluate import evaluation
from reward_recipes.pairs import encode_prompt, save_tokenizer
from reward_recipes.score import load_scorer

pytestmark = pytest.mark.usefixtures("sketched")

# A template that writes a line end behind EOS, and one that opens with BOS and writes no EOS at all.
ENDED = "{% for m in messages %}{{ m.role + '\\n' + m.content + eos_token + '\\n' }}{% endfor %}"
ENDED += "{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}\n"
OPEN = "{{ bos_token }}{% for m in messages %}{{ '[' + m.role + ']\\n' + m.content }}{% endfor %}"
OPEN += "{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}"
# The base, LoRA or not, and the chat template of a model that is trained on messages.
RUNS = [("llama_dir", True, None), ("gpt2_dir", True, ENDED), ("llama_dir", False, OPEN)]


PROMPT = "\n\nHuman: What is {0} and {0}, and what is not?\n\nAssistant:"
TEXTS = [(PROMPT.format(number), f" It is {2 * number}." + " Yes, of course." * (number % 5)) for number in range(200)]
DIALOGUES = [
    ([{"role": "user", "content": f"How do I bake {n}?"}], [{"role": "assistant", "content": f"Mix {n}. "}])
    for n in range(50)
]


@pytest.fixture(scope="module", params=RUNS, ids=["texts-lora-bos", "dialogues-lora", "dialogues-bos"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of one step leaves. test_parity.py holds a model of texts without BOS."""
    base, lora, template = request.param
    folder, pairs = tmp_path_factory.mktemp("anywhere"), hh_pairs(8)
    options: dict[str, Any] = {"max_steps": 1, "overlong": "keep_end", "learning_rate": 0.1}
    options |= {"eval_strategy": "no", "train_probe_size": 0, "validation_fraction": 0}
    if lora:
        options |= {"use_peft": True, "lora_target_modules": "c_attn" if base == "gpt2_dir" else "q_proj"}
    if template:
        (folder / "template.jinja").write_text(template)
        options |= {"chat_template_path": folder / "template.jinja"}
        turns = {"chosen": "So.", "rejected": "No."}
        pairs = [{"prompt": prompt} | turns for prompt, _ in DIALOGUES[:8]]
    data = write_jsonl(folder / "pairs.jsonl", pairs)
    run(*arguments(request.getfixturevalue(base), data, folder / "run", **options))
    return folder / "run"


def plain_scores(folder: Path, encode: Callable[[Any], dict[str, Any]], texts: list[Any]) -> list[float]:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return [model(**encode(text)).logits.item() for text in texts]


def trl_rewards(kind: str, folder: Path, policy: Path) -> list[float]:
    """What TRL's trainer, given the folder as its reward function, makes of the dialogues."""
    trainer_type, config_type = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[kind]
    prompts, replies = map(list, zip(*DIALOGUES, strict=True))
    rows = [{"prompt": prompt} for prompt in prompts]
    trainer = trainer_type(
        str(policy),
        reward_funcs=str(folder),
        args=config_type(str(folder / kind), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(policy, pad_token="<|endoftext|>"),
    )
    return trainer._calculate_rewards(rows, prompts, replies, [[0]] * len(rows))[:, 0].tolist()


def test_texts_score_alike_wherever_the_folder_is_loaded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With nothing added by the user, alone and padded, and cut in front where a text is too long; also by README.

    An EOS at the end is not doubled where nothing else of the tokenizer stands against that.
    """
    scorer, tokenizer = load_scorer(folder), AutoTokenizer.from_pretrained(folder)
    texts, long = [prompt + reply for prompt, reply in TEXTS], TEXTS[0][0] * 20
    snippet = re.search(r"```python\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text(), re.DOTALL)[1]
    texts.append(ast.literal_eval(re.search(r'judge\((".*")\)', snippet)[1]))
    exec(snippet.replace("outputs/demo/run", str(folder)), {})
    (shown,) = ast.literal_eval(capsys.readouterr().out)
    ours = scorer.score(texts)
    assert max(ours) - min(ours) > 0.02 and shown["score"] == pytest.approx(ours[-1], abs=1e-5)
    judge = pipeline("text-classification", str(folder))
    assert [found["score"] for found in judge(texts, batch_size=16)] == pytest.approx(ours, abs=1e-5)
    found = plain_scores(folder, lambda text: tokenizer(text, return_tensors="pt"), texts[:40])
    assert found == pytest.approx(ours[:40], abs=1e-5)
    if not encode_prompt(scorer.tokenizer, ""):  # BOS, which stays in front of a text that plain transformers cuts
        assert judge(long, truncation=True)[0]["score"] == pytest.approx(scorer.score([long])[0], abs=1e-5)
    if not tokenizer.chat_template:
        assert RewardFunction(folder)(*zip(*TEXTS, strict=True)) == pytest.approx(ours[:-1], abs=1e-5)
        ended = judge([text + tokenizer.eos_token for text in texts[:20]])
        assert [found["score"] for found in ended] == pytest.approx(ours[:20], abs=1e-5)


def test_dialogues_score_alike_wherever_the_folder_is_loaded(folder: Path, gpt2_dir: Path) -> None:
    scorer, tokenizer = load_scorer(folder), AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        pytest.skip("a model of texts")
    dialogues = [prompt + reply for prompt, reply in DIALOGUES]
    ours, options = scorer.score(dialogues), {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    assert max(ours) - min(ours) > 0.02
    found = plain_scores(folder, lambda dialogue: tokenizer.apply_chat_template(dialogue, **options), dialogues)
    assert found == pytest.approx(ours, abs=1e-5)
    assert RewardFunction(folder)(*zip(*DIALOGUES, strict=True)) == pytest.approx(ours, abs=1e-5)
    for kind in ("grpo", "rloo"):
        assert trl_rewards(kind, folder, gpt2_dir) == pytest.approx(ours, abs=1e-5)


def test_ppo_and_further_training_read_the_same(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PPO's prompts end in no EOS, stock TRL trains on texts with one, and the folder can be saved again as it is."""
    scorer, plain = load_scorer(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer, asked = scorer.tokenizer, DIALOGUES if plain.chat_template else TEXTS
    prompts = {"prompt": [prompt for prompt, _ in asked[:3]]}
    prompts["input_ids"] = [encode_prompt(tokenizer, prompt) for prompt in prompts["prompt"]]
    assert all(ids[-1] != tokenizer.eos_token_id for ids in prompts["input_ids"])
    with suppress(ImportError):  # TRL 1.12 is the last release with PPO
        from reward_recipes.policy import ppo

        monkeypatch.setattr(ppo, "PARITY", 1e-5)
        ppo.check_parity(scorer, prompts)
    ours = scorer.encode([prompt + reply for prompt, reply in asked])
    ended = [whole if plain.chat_template else whole + plain.eos_token for whole in (p + r for p, r in asked)]
    assert [_tokenize(plain, whole)["input_ids"] for whole in ended] == ours
    assert {ids.count(tokenizer.eos_token_id) for ids in ours} <= {1, 2}  # a turn of the user's may end in one too
    save_tokenizer(tokenizer, tmp_path, 128)
    for path in tmp_path.iterdir():
        assert path.read_text() == (folder / path.name).read_text()
    # Transformers 4.57 knows no TokenizersBackend, and adds token_type_ids unless it is told not to.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert (settings["model_max_length"], settings["truncation_side"]) == (128, "left")
    assert json.loads((folder / "config.json").read_text())["problem_type"] == "regression"


def test_a_model_of_another_tool_is_read_as_plain_transformers_reads_it(
    chat_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind EOS, where its template ends in a line end; before it, where a text ends in EOS, which is its padding."""
    model = AutoModelForSequenceClassification.from_pretrained(chat_dir, num_labels=1)
    model.score.weight.data.normal_(std=0.5)
    model.save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(chat_dir)
    tokenizer.save_pretrained(tmp_path / "model")
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    dialogues, texts = [prompt + reply for prompt, reply in DIALOGUES], ["Yes.", "Yes.<|im_end|>", "Yes.<|im_end|>\n"]
    plain = plain_scores(tmp_path / "model", lambda each: tokenizer.apply_chat_template(each, **options), dialogues)
    plain += plain_scores(tmp_path / "model", lambda text: tokenizer(text, return_tensors="pt"), texts)
    scorer = load_scorer(tmp_path / "model")
    assert scorer.score(dialogues + texts) == pytest.approx(plain, abs=1e-5)
    assert scorer.score_groups([dialogues])[0] == pytest.approx(plain[:50], abs=1e-5)
    assert plain[50] == pytest.approx(plain[51], abs=1e-5) != pytest.approx(plain[52], abs=1e-3)
    monkeypatch.setattr(evaluation, "draw_report", lambda report, path: path.touch())
    pairs = [{"chosen": one, "rejected": other} for one, other in zip(dialogues[::2], dialogues[1::2], strict=True)]
    write_jsonl(tmp_path / "data" / "test.jsonl", pairs)
    names = [str(tmp_path / name) for name in ("model", "data", "out")]
    report = evaluation.evaluate(evaluation.EvaluationArguments(*names, baseline_model_name_or_path=names[0]))
    margins = [one - other for one, other in zip(plain[:50:2], plain[1:50:2], strict=True)]
    assert report["mean_margin"] == pytest.approx(sum(margins) / 25, abs=1e-5)
    assert capsys.readouterr().err.count("another tool's model, read as plain transformers reads it") == 2
