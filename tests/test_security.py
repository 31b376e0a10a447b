"""What comes from elsewhere runs no code, writes nowhere else, and secrets stay with their owner."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import POSITIONS, hh_pairs, write_jsonl
from toys import config, random_pairs, tiny_model, tiny_trainer
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging
from trl import ModelConfig
from whole_runs import arguments, run

from reward_recipes.config import parse_recipe
from reward_recipes.pairs import encode_texts, load_pairs, load_recipe_tokenizer, load_tokenizer
from reward_recipes.run import UserError, run_cli
from reward_recipes.run.checkpoints import write_manifest
from reward_recipes.score import load_reward_model, load_scorer
from reward_recipes.score.model import load_classifier

pytestmark = pytest.mark.usefixtures("sketched")
SECRETS = ("hf_" + "S3cret" * 6, "hf_" + "Hidden" * 6, "hf_" + "Envir0" * 6)


class Makes:
    """A pickle of this makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    """Where code of others would leave its mark."""
    return tmp_path / "code-ran"


@pytest.fixture
def evil(proof: Path) -> bytes:
    """A pickle that runs code; that it does is tried first."""
    content = pickle.dumps(Makes(proof), protocol=2)  # torch's own
    pickle.loads(content)
    proof.rmdir()
    return content


def copy_without_weights(source: Path, folder: Path) -> Path:
    """A model's folder but for its weights."""
    return shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))


def test_a_pickle_is_refused_with_a_way_out(gpt2_dir: Path, tmp_path: Path, evil: bytes, proof: Path) -> None:
    folder = copy_without_weights(gpt2_dir, tmp_path / "model")
    weights = AutoModelForCausalLM.from_pretrained(gpt2_dir)
    torch.save(weights.state_dict(), folder / "pytorch_model.bin")
    AutoModelForCausalLM.from_pretrained(folder, use_safetensors=False).save_pretrained(tmp_path / "new")
    way_out = load_classifier(str(tmp_path / "new"), may_lack=("score",))
    assert torch.equal(way_out.transformer.wte.weight, weights.transformer.wte.weight)
    (folder / "pytorch_model.bin").write_bytes(evil)
    for load in (load_classifier, load_scorer):
        with pytest.raises(UserError, match=r"expected weights in model\.safetensors, found none.*convert"):
            load(str(folder))
    index = {"metadata": {}, "weight_map": {"transformer.wte.weight": "pytorch_model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError):
        load_classifier(str(folder))
    assert not proof.exists()


def test_an_adapter_s_pickle_runs_no_code(reward_dir: Path, tmp_path: Path, evil: bytes, proof: Path) -> None:
    folder = copy_without_weights(reward_dir, tmp_path / "adapter")
    adapter = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": str(reward_dir), "r": 1}
    (folder / "adapter_config.json").write_text(json.dumps(adapter | {"target_modules": ["c_attn"]}))
    (folder / "adapter_model.bin").write_bytes(evil)
    with pytest.raises(Exception):  # noqa: B017 (what matters is below)
        load_scorer(str(folder))
    assert not proof.exists()


def test_broken_weights_are_told_in_one_line(gpt2_dir: Path, tmp_path: Path) -> None:
    folder = copy_without_weights(gpt2_dir, tmp_path / "model")
    whole = (gpt2_dir / "model.safetensors").read_bytes()
    for content in (b"", b"\0" * 100, whole[:100], whole[:-10], b"\xff" * 8 + whole[8:], b"version https://git-lfs"):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=str(folder)) as told:
            load_classifier(str(folder), may_lack=("score",))
        assert len(str(told.value).splitlines()) == 1


CODE = """
import os
from transformers import GPT2Config, GPT2ForSequenceClassification
os.mkdir({proof!r})
class Theirs(GPT2ForSequenceClassification):
    config_class = GPT2Config
"""


@pytest.fixture
def with_code(gpt2_dir: Path, tmp_path: Path, proof: Path) -> Path:
    """A GPT-2 whose folder brings a class of its own."""
    folder = shutil.copytree(gpt2_dir, tmp_path / "with_code")
    (folder / "theirs.py").write_text(CODE.format(proof=str(proof)))
    change_config(folder, auto_map={"AutoModelForSequenceClassification": "theirs.Theirs"})
    return folder


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_code_of_others_runs_only_if_asked_for_and_is_announced(
    with_code: Path, tmp_path: Path, proof: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, quiet = ModelConfig(str(with_code)), config(tmp_path, max_length=POSITIONS)
    tokenizer = load_recipe_tokenizer(quiet, model)
    assert type(load_reward_model(model, quiet, tokenizer)).__name__ == "GPT2ForSequenceClassification"
    assert not proof.exists() and "trust_remote_code" not in capsys.readouterr().out
    trusting = config(tmp_path, max_length=POSITIONS, trust_remote_code=True)
    load_recipe_tokenizer(trusting, model)
    assert f"trust_remote_code: code that comes with {with_code} runs on this machine" in capsys.readouterr().out
    assert type(load_reward_model(model, trusting, tokenizer)).__name__ == "Theirs"
    assert proof.exists()


def test_unknown_architecture_is_refused_without_a_question(
    with_code: Path, proof: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Standard input may be the texts to score; a line of it is no answer."""
    theirs = {"AutoConfig": "theirs.TheirConfig", "AutoModelForSequenceClassification": "theirs.Theirs"}
    change_config(with_code, model_type="theirs", auto_map=theirs)
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail("asked"))
    for load in (load_classifier, load_scorer):
        with pytest.raises(UserError):
            load(str(with_code))
    load_tokenizer(str(with_code))
    assert not proof.exists()


def test_a_mapping_hides_nothing_that_misleads_runs_code_or_sets_variables(tmp_path: Path) -> None:
    needed = ["--dataset_name", "pairs", "--model_name_or_path", "model", "--bf16", "false"]
    for name in ("trust_remote_code", "use_safetensors", "weights_only", "num_labels"):
        with pytest.raises(UserError, match=f"model_init_kwargs: expected no {name}"):
            parse_recipe([*needed, "--model_init_kwargs", json.dumps({name: False})])
    (tmp_path / "given.yaml").write_text("env: {HF_ENDPOINT: http://elsewhere}")
    with pytest.raises(UserError, match="env: expected options of the run"):
        parse_recipe([*needed, "--config", str(tmp_path / "given.yaml")])
    assert "HF_ENDPOINT" not in os.environ


def test_a_chat_template_cannot_leave_its_sandbox(chat_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(chat_dir))
    for template in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% for m in messages %}",
    ):
        tokenizer.chat_template = template
        with pytest.raises(UserError, match="the chat template rejects"):
            encode_texts(tokenizer, [[{"role": "user", "content": "Why?"}]])
    (tmp_path / "template.jinja").write_bytes(b"\xff\xfe")
    options = config(tmp_path, chat_template_path=str(tmp_path / "template.jinja"))
    with pytest.raises(UserError, match="chat_template_path: expected a Jinja file in UTF-8"):
        load_recipe_tokenizer(options, ModelConfig(str(chat_dir)))


def test_a_checkpoint_from_elsewhere_runs_no_code(tmp_path: Path, evil: bytes, proof: Path) -> None:
    """Its manifest is in order, since whoever put the pickle there could write that too."""

    def trainer(folder: str, steps: int) -> Any:
        args = config(tmp_path / folder, max_steps=steps, save_steps=2, per_device_train_batch_size=2)
        return tiny_trainer(tiny_model("gpt2"), args, random_pairs(8))

    trainer("theirs", 2).train()
    checkpoint = tmp_path / "theirs" / "checkpoint-2"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(evil)
        write_manifest(checkpoint)
        with pytest.raises(UserError, match="expected tensors, found a pickle"):
            trainer("ours", 4).train(resume_from_checkpoint=str(checkpoint))
        assert not proof.exists(), name
        (checkpoint / name).write_bytes(whole)


def test_secrets_stay_out_of_everything_that_a_run_leaves(
    gpt2_dir: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token in each of the three places where one may stand: an option, a mapping, the environment."""
    monkeypatch.setenv("HF_TOKEN", SECRETS[2])
    options = {"hub_token": SECRETS[0], "model_init_kwargs": json.dumps({"token": SECRETS[1]}), "log_level": "debug"}
    verbosity = transformers_logging.get_verbosity()
    run(*arguments(gpt2_dir, data, tmp_path, max_steps=4, save_state_dict=True, **options))
    transformers_logging.set_verbosity(verbosity)
    said = "".join(capfd.readouterr())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"recipe.yaml", "trainer_state.json", "optimizer.pt", "model.safetensors", "run_summary.json"} <= names
    assert "training_args.bin" not in names
    for secret in SECRETS:
        assert secret not in said and not [str(path) for path in files if secret.encode() in path.read_bytes()]


def test_a_token_in_a_mistake_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_cli(lambda: parse_recipe(["--hub_tokne", SECRETS[0]]))
    line = capsys.readouterr().err
    assert "unknown option: --hub_tokne (a token)" in line and SECRETS[0] not in line


def test_data_folders_stay_inside_the_dataset_and_count_once(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "other" / "train.jsonl", hh_pairs(1))
    write_jsonl(tmp_path / "data" / "a" / "train.jsonl", hh_pairs(2))
    for name in ("../other", "a/../../other", str(tmp_path / "other"), "", "."):
        with pytest.raises(UserError):
            load_pairs(str(tmp_path / "data"), data_dirs=[name])
    assert load_pairs(str(tmp_path / "data"), data_dirs=["a", "a/", "./a"])["train"].rows["subset"][:] == ["a", "a"]


@pytest.mark.parametrize("asked", [None, "0"])
def test_nothing_is_reported_to_hugging_face_unless_asked_for(asked: str | None) -> None:
    """TRL's trainers send a report of each start; this switch, which huggingface_hub reads once, forbids it."""
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)} | ({"HF_HUB_DISABLE_TELEMETRY": asked} if asked else {})
    code = "import reward_recipes; from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(asked is None)]
