"""PPO and RLOO end to end on toys: what a run leaves and logs, how it fails in one line, and that a seed fixes it."""

import csv
import importlib
import json
import os
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import PartialState
from conftest import CHATML, hh_pairs, save_reward_model, write_jsonl
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel, TrainerState
from trl import ModelConfig

from reward_recipes import RewardFunction
from reward_recipes.pairs import load_tokenizer, save_tokenizer
from reward_recipes.policy import log, rloo
from reward_recipes.policy.common import load_policy_tokenizer, parse_policy_recipe
from reward_recipes.policy.samples import Measure, Samples
from reward_recipes.run import UserError
from reward_recipes.score import load_scorer

try:
    from trl.experimental.ppo import ppo_trainer

    from reward_recipes.policy import ppo
except ImportError:
    ppo = None
needs_ppo = pytest.mark.skipif(ppo is None, reason="TRL 1.12 is the last release with PPO")
names = [pytest.param("ppo", marks=needs_ppo), "rloo"]
both = pytest.mark.parametrize("name", names)
of_ppo = pytest.mark.parametrize("finished", names[:1], indirect=True)

COMMON = {
    **{"per_device_train_batch_size": 4, "learning_rate": 1e-2, "sample_prompts": 3, "bf16": False},
    **{"gradient_checkpointing": False, "use_cpu": True, "disable_tqdm": True, "report_to": "none"},
}
TWO_UPDATES = {
    "ppo": {"total_episodes": 8, "response_length": 12, "kl_coef": 0.01, "num_ppo_epochs": 2, "num_mini_batches": 2},
    "rloo": {"max_steps": 2, "max_completion_length": 12, "num_generations": 2, "beta": 0.01},
}
ONE_UPDATE = {"ppo": {"total_episodes": 4}, "rloo": {"max_steps": 1}}
Sources = dict[str, dict[str, Path]]
Reply = tuple[list[int], int]  # its token ids, and which of them its reward was read at
Finished = tuple[str, Path, list[list[Reply]]]


def start(name: str, measures: dict[str, Measure] | None = None, **options: object) -> None:
    """Run `ppo` or `rloo` in this process, through the parser."""
    module, named = {"ppo": ppo, "rloo": rloo}[name], COMMON | TWO_UPDATES[name] | options
    words = [text for option, value in named.items() for text in (f"--{option}", str(value))]
    module.train(parse_policy_recipe(getattr(module, f"{name.upper()}RecipeConfig"), module.LOG, words), measures)


@pytest.fixture(scope="module")
def sources(gpt2_dir: Path, llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Options: twelve prompts, a reward model that reads as far as the policy writes, for RLOO another tokenizer.

    PPO's policy ends its replies early.
    """
    folder = tmp_path_factory.mktemp("sources")
    policy, tokenizer = GPT2LMHeadModel.from_pretrained(gpt2_dir), load_policy_tokenizer(ModelConfig(str(gpt2_dir)))
    direction = policy.transformer.wte.weight.detach()[tokenizer.eos_token_id]
    policy.transformer.ln_f.bias.data += 4 * direction / direction.square().sum()  # adds 4 to the logit of EOS
    for part in (policy, tokenizer):
        part.save_pretrained(folder / "policy")
    reward = save_reward_model(gpt2_dir, folder / "reward", max_length=120, overlong="drop")
    shared = {"reward_model_path": reward, "dataset_name": write_jsonl(folder / "pairs.jsonl", hh_pairs(12))}
    models = {"ppo": folder / "policy", "rloo": llama_dir}
    return {name: shared | {"model_name_or_path": model} for name, model in models.items()}


@pytest.fixture(scope="module", params=names)
def finished(request: pytest.FixtureRequest, sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run of two updates, its folder, and the replies of each update as PPO's reward model was given them.

    PPO must read the scores of training to 1e-5.
    """
    name, folder, read = request.param, tmp_path_factory.mktemp("run") / "run", []

    def recorded(model: torch.nn.Module, ids: torch.Tensor, pad: int, width: int) -> tuple[torch.Tensor, ...]:
        result = original(model, ids, pad, width)
        read.append([*zip(ids[:, width:].tolist(), (result[2] - width).tolist(), strict=True)])
        return result

    with pytest.MonkeyPatch.context() as patch:
        if name == "ppo":
            original = ppo_trainer.get_reward
            patch.setattr(ppo_trainer, "get_reward", recorded)
            patch.setattr(ppo, "PARITY", 1e-5)
        start(name, **sources[name], output_dir=folder)
    return name, folder, read[1::2]  # the value model is asked before the reward model


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def differs(before: Path, after: Path) -> bool:
    """Whether two folders hold models of the same weights by name, and others by value."""
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert old.keys() == new.keys()
    return any(not torch.allclose(new[key], old[key], rtol=0, atol=1e-5) for key in old)


def test_a_run_leaves_policy_log_picture_and_samples(finished: Finished, sources: Sources) -> None:
    """TRL's PPO reads the score at the end of a reply, whatever was generated after it, so the reply ends there."""
    name, folder, judged = finished
    log = rows(folder / f"{name}_progress.csv")
    assert [row["step"] for row in log] == ["1", "2"]
    for row in log:
        assert float(row["score"]) and 1 <= float(row["response_length"]) <= 12 and 0 <= float(row["missing_eos"]) <= 1
    assert float(log[0]["kl"]) == pytest.approx(0, abs=1e-4) and float(log[1]["kl"]) != 0
    if name == "ppo":
        lengths = [sum(place + 1 for _, place in update) / len(update) for update in judged]
        assert [float(row["response_length"]) for row in log] == pytest.approx(lengths)
    assert (folder / f"{name}_progress.png").stat().st_size > 10_000
    samples = rows(folder / "samples.csv")
    assert len(samples) == 3 and list(samples[0]) == ["prompt", "before", "score_before", "after", "score_after"]
    policy = sources[name]["model_name_or_path"]
    assert differs(policy, folder)
    processors = [json.loads((path / "tokenizer.json").read_text())["post_processor"] for path in (folder, policy)]
    assert processors[0] == processors[1]  # which ends no prompt in EOS, as a reward model's does
    assert not list(folder.rglob("training_args.bin"))
    with pytest.raises(UserError, match="holds another run"):
        start(name, **sources[name], output_dir=folder)
    with pytest.raises(UserError, match="no such pairs"):  # so that nothing is trained again
        start(name, **sources[name] | {"dataset_name": "no such pairs"}, output_dir=folder, overwrite_output_dir=True)


def test_a_seed_fixes_a_policy_whatever_is_sampled_and_a_picture_that_cannot_be_drawn_costs_none(
    finished: Finished, sources: Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Samples are drawn with one seed, so the log's last row says what `samples.csv` says of the end.

    TRL shuffles mini-batches with numpy, whose state is another one now. The terminal shows rows of the log, and no
    dictionaries.
    """
    name, folder, _ = finished
    write_jsonl(tmp_path / "data" / "train.jsonl", hh_pairs(12))
    write_jsonl(tmp_path / "data" / "test.jsonl", hh_pairs(2, start=100))
    held_out = {"dataset_name": tmp_path / "data", "sample_split": "test", "sample_steps": 1}
    measures = {"letters": lambda prompt, reply: len(reply) + 1000 * ("What is 10" in prompt)}
    (tmp_path / "run" / f".{name}_progress.png.partial").mkdir(parents=True)  # in the way of the picture
    np.random.seed(5)
    with pytest.warns(UserWarning, match=r"_progress\.csv could not be written or drawn, and training goes on"):
        start(name, measures, **sources[name] | held_out, output_dir=tmp_path / "run")
    assert not differs(folder, tmp_path / "run")
    logged = pd.read_csv(tmp_path / "run" / f"{name}_progress.csv")
    samples = pd.read_csv(tmp_path / "run" / "samples.csv", keep_default_na=False)  # a reply may be empty, or "NA"
    assert list(logged["step"]) == [0, 1, 2] and logged["score"].isna().tolist() == [True, False, False]
    assert len(samples) == 2 and samples["prompt"].str.contains("What is 10[01]").all()
    assert (samples["letters_after"] == 1000 + samples["after"].str.len()).all()
    for column in ("score", "letters"):
        means = samples[[f"{column}_before", f"{column}_after"]].mean().tolist()
        assert logged[f"sample_{column}"].tolist()[::2] == pytest.approx(means, abs=1e-6)
    said = capsys.readouterr().out.splitlines()
    heading = next(place for place, line in enumerate(said) if line.split()[:4] == ["update", "score", "of", "samples"])
    shown = [[float(cell) for cell in line.split()[:4]] for line in said[heading + 1 : heading + 3]]
    assert shown == logged[["step", "score", "sample_score", "sample_letters"]].round(3).to_numpy()[1:].tolist()
    assert not set("{}") & set("".join(said))


@pytest.mark.parametrize("normalised", [False, True])
def test_the_picture_names_its_scores_and_counts_whole_updates(
    normalised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(log, "Figure", lambda **options: figures.append(Figure(**options)) or figures[-1])
    columns = {name: [None, 0.1, 0.2] for name in ("score", *log.PANELS)}
    samples = {"sample_true_quality": [1.0, None, 2.0]}
    log.draw_policy_log(pd.DataFrame({"step": [0, 1, 2]} | columns | samples), tmp_path / "log.png", normalised)
    drawn = [axes for axes in figures[0].axes if axes.axison]
    labels = [axes.get_ylabel() for axes in drawn]
    assert labels[:2] == ["mean score, normalised" if normalised else "mean score", "mean true quality of the samples"]
    assert len(labels) == 5 and drawn[1].lines[0].get_xydata().tolist() == [[0, 1], [2, 2]]
    assert all(tick == round(tick) for axes in drawn for tick in axes.get_xticks())


def test_kl_is_that_of_a_reply_with_both_trainers(tmp_path: Path) -> None:
    """TRL's RLOO logs it per token."""
    by_ppo = {"objective/scores": 1.0, "objective/kl": 2.0, "response_length": 4.0}
    for logs in (by_ppo, {"reward": 1.0, "kl": 0.5, "completions/mean_length": 4.0}):
        callback = log.PolicyLogCallback("log.csv", samples=None, sample_steps=0)
        callback.on_log(SimpleNamespace(output_dir=tmp_path), TrainerState(global_step=1), None, logs)
        (row,) = rows(tmp_path / "log.csv")
        assert (float(row["kl"]), float(row["response_length"]), float(row["score"])) == (2, 4, 1)


@both
def test_an_adapter_is_trained_in_place_of_the_policy_and_fixed_by_the_seed(
    name: str, sources: Sources, gpt2_dir: Path, tmp_path: Path
) -> None:
    """TRL's RLOO draws the adapter's weights before it seeds, so the state of torch must not matter."""
    options, found = sources[name] | ONE_UPDATE[name] | {"model_name_or_path": gpt2_dir}, []
    for seed in range(2 if name == "rloo" else 1):
        torch.manual_seed(seed)
        folder = tmp_path / str(seed)
        start(name, **options, output_dir=folder, use_peft=True, lora_r=4, lora_target_modules="c_attn")
        found.append(load_file(folder / "adapter_model.safetensors"))
        assert not (folder / "README.md").exists()
    assert any(tensor.any() for key, tensor in found[0].items() if "lora_B" in key)  # they start from zero
    assert all(torch.allclose(found[0][key], found[-1][key], atol=1e-5) for key in found[0])
    start(name, **options, output_dir=folder, overwrite_output_dir=True)  # an adapter left there would be read instead
    loaded, saved = GPT2LMHeadModel.from_pretrained(folder).state_dict(), load_file(folder / "model.safetensors")
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)


def test_samples_are_drawn_as_in_training_whatever_the_policy_prefers(
    gpt2_dir: Path, reward_dir: Path, tmp_path: Path
) -> None:
    """A trained policy is in training mode, and a chat policy's own configuration may cut the tail of its tokens."""
    policy = GPT2LMHeadModel.from_pretrained(gpt2_dir, resid_pdrop=0.5)
    tokenizer, texts = load_policy_tokenizer(ModelConfig(str(gpt2_dir))), ["Why?", "How do I bake bread?"]
    asked = {"prompt": texts, "input_ids": tokenizer(texts)["input_ids"]}
    samples = Samples(asked, tokenizer, RewardFunction(str(reward_dir)), rloo.RLOORecipeConfig(seed=3, bf16=False), 8)
    samples.take(policy, "before")
    policy.train()
    policy.generation_config.top_p, policy.generation_config.repetition_penalty = 0.01, 1.5
    samples.take(policy, "after")
    samples.write(tmp_path)
    written = rows(tmp_path / "samples.csv")
    assert [row["prompt"] for row in written] == texts
    assert all(row["before"] == row["after"] and row["score_before"] == row["score_after"] for row in written)


def one_of_two(rank: int, place: dict[str, Any], options: dict[str, Any]) -> None:
    """A forked process, which forgets that its parent was alone."""
    place |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in place.items()})
    PartialState._reset_state()
    start("ppo", **options)
    assert PartialState().num_processes == 2


@needs_ppo
@pytest.mark.filterwarnings("ignore")  # Python 3.12 warns of threads, which wait here
@pytest.mark.reliability
def test_two_processes_train_one_policy(sources: Sources, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = dict(zip(("MASTER_ADDR", "MASTER_PORT"), free.getsockname(), strict=True))
    options = sources["ppo"] | ONE_UPDATE["ppo"] | {"output_dir": tmp_path, "per_device_train_batch_size": 2}
    forked = {"join": False, "daemon": True, "start_method": "fork"}
    two = torch.multiprocessing.start_processes(one_of_two, (place, options), 2, **forked)
    assert any(two.join(timeout=120) for _ in range(2))  # a time limit for each process, in case they hang
    assert [row["step"] for row in rows(tmp_path / "ppo_progress.csv")] == ["1"]
    assert differs(sources["ppo"]["model_name_or_path"], tmp_path)


@of_ppo
def test_normalised_rewards_take_the_spread_of_the_test_or_else_of_the_evaluation(
    finished: Finished, sources: Sources, tmp_path: Path
) -> None:
    """In training only; the first replies of a seed are the same, and a penalty of 1 a reply is in the score."""
    judge = shutil.copytree(sources["ppo"]["reward_model_path"], tmp_path / "judge")
    (judge / "evaluation.json").write_text(json.dumps({"mean_reward": 1.5, "std_reward": 3.0}))
    assert ppo.score_spread(str(judge)) == (1.5, 3.0)
    (judge / "test_metrics.json").write_text(json.dumps({"test_mean_reward": 0.5, "test_std_reward": 2.0}))
    options = sources["ppo"] | ONE_UPDATE["ppo"] | {"reward_model_path": judge, "normalise_rewards": True}
    start("ppo", **options, output_dir=tmp_path / "run")
    found = []
    for folder in (finished[1], tmp_path / "run"):
        update, sample = rows(folder / "ppo_progress.csv")[0], rows(folder / "samples.csv")[0]
        found.append((float(update["score"]) + float(update["missing_eos"]), sample["score_before"]))
    assert found[1] == (pytest.approx((found[0][0] - 0.5) / 2, abs=1e-5), found[0][1])


@of_ppo
def test_ppo_reads_each_reply_at_its_first_eos(finished: Finished) -> None:
    """What a policy would have said after that is not read."""
    ends = [(reply.index(0), place) for update in finished[2] for reply, place in update if 0 in reply]
    assert min(ends)[0] < 11 and all(first == place for first, place in ends)


@needs_ppo
def test_ppo_refuses_a_model_or_template_that_it_would_read_otherwise(chat_dir: Path, tmp_path: Path) -> None:
    scorer, turn = load_scorer(str(save_reward_model(chat_dir, tmp_path))), [{"role": "user", "content": "Why?"}]
    opened = scorer.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    prompts = {"prompt": [turn, "How?"], "input_ids": [opened, [8, 9]]}
    ppo.check_parity(scorer, prompts)
    scorer.tokenizer.chat_template = CHATML.replace("message['role'] + '\\n'", "message['role'] + '\\n<think>'")
    with pytest.raises(UserError, match="PPO to read the scores of training"):
        ppo.check_parity(scorer, prompts)
    scorer.tokenizer.chat_template, head = CHATML, scorer.model.score.forward
    # A model whose head adds the position in the batch's row stands for one that heeds padding.
    scorer.model.score.forward = lambda hidden: head(hidden) + torch.arange(hidden.shape[1])[None, :, None]
    with pytest.raises(UserError, match="PPO to read the scores of training"):
        ppo.check_parity(scorer, prompts)


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("rloo", {"reward_model_path": ""}, "reward_model_path: expected"),
        ("rloo", {"model_name_or_path": "/nowhere"}, "nowhere"),
        ("rloo", {"model_name_or_path": "reward_dir"}, "expected a language model as policy"),
        ("rloo", {"sample_prompts": 0}, "sample_prompts: expected 1 or more"),
        ("rloo", {"sample_steps": 4, "logging_steps": 10}, "sample_steps: expected a multiple of logging_steps .10."),
        ("rloo", {"sample_split": "tset"}, "sample_split"),
        ("rloo", {"model_init_kwargs": '{"trust_remote_code": true}'}, "no trust_remote_code"),
        ("rloo", {"max_completion_length": 110}, r"within the policy's positions \(128 tokens\), .* max_prompt_length"),
        ("ppo", {"model_name_or_path": "llama_dir"}, r"the reward model's tokenizer.*reward_recipes\.rloo"),
        ("ppo", {"per_device_train_batch_size": 13}, "prompts for a batch of 13, found 12"),
        ("ppo", {"normalise_rewards": True}, r"normalise_rewards: expected test_metrics\.json"),
        ("ppo", {"response_length": 104}, r"within the reward model's max_length \(120 tokens\)"),
    ],
)
def test_mistakes_are_named(
    name: str, options: dict[str, Any], complaint: str, sources: Sources, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if name == "ppo" and ppo is None:
        pytest.skip("TRL 1.12 is the last release with PPO")
    folders = {key: request.getfixturevalue(value) for key, value in options.items() if str(value).endswith("_dir")}
    with pytest.raises(UserError, match=complaint):
        start(name, **sources[name] | {"output_dir": tmp_path / "run"} | options | folders)
    assert not list(tmp_path.glob("run/*"))


def test_a_tokenizer_that_ends_prompts_in_eos_is_no_policy_s(gpt2_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(gpt2_dir, tmp_path / "policy")
    save_tokenizer(load_tokenizer(str(folder)), folder, 128)
    with pytest.raises(UserError, match="ends each prompt in EOS"):
        load_policy_tokenizer(ModelConfig(str(folder)))


@both
def test_a_broken_policy_is_one_line(name: str, sources: Sources, gpt2_dir: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(gpt2_dir, tmp_path / "broken")
    for file, expected in (("model.safetensors", (OSError, SafetensorError)), ("tokenizer.json", UserError)):
        (broken / file).write_text("{}")
        with pytest.raises(expected):  # of which `run_cli` makes a line each
            start(name, **sources[name] | {"model_name_or_path": broken}, output_dir=tmp_path / "run")


@needs_ppo
def test_a_newer_trl_is_told_what_ppo_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl.experimental.ppo", None)
    with pytest.raises(ImportError, match=r"TRL 1\.12.*reward-recipes\[ppo\]"):
        importlib.reload(ppo)
    monkeypatch.undo()
    importlib.reload(ppo)
