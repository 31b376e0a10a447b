"""What the Hub gets of a run, by the real client against a server on this machine: all of the staged set, once."""

import base64
import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import RepoCard, constants
from huggingface_hub.utils import close_session
from transformers import AutoModelForSequenceClassification
from whole_runs import arguments, run

from reward_recipes.pairs import load_pairs, load_tokenizer
from reward_recipes.push import __main__ as command
from reward_recipes.push.scrub import Scrubber
from reward_recipes.push.upload import push_run, stage_run
from reward_recipes.run import UserError, output, run_cli
from reward_recipes.score.model import load_classifier

pytestmark = pytest.mark.usefixtures("sketched")
TOKEN = "hf_" + "Abc123" * 6
REPO = "alice/reward-model"
PUBLISHED = {
    *("README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "recipe.yaml"),
    *("data_audit.json", "reward_model_log.csv", "training_progress.png", "test_metrics.json", "test_scores.csv"),
    *("run_summary.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
    *(f"adapter/{name}" for name in ("config.json", "tokenizer.json", "tokenizer_config.json")),
}


class Hub(ThreadingHTTPServer):
    """The part of the Hub's HTTP interface that an upload needs; `status` makes it refuse what comes to a path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.forget()

    def forget(self) -> None:
        """Be as at the start."""
        self.files: dict[str, bytes] = {}
        self.commits = 0
        self.created: list[dict[str, Any]] = []
        self.sent: list[bytes] = []
        self.status: Callable[[str], int] = lambda path: 200

    def answer(self, path: str, body: bytes) -> Any:
        """What the Hub says to a request, as JSON."""
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return {"url": f"{self.url}/{REPO}"}
        if path.endswith("/tree/main"):
            return [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in [".gitattributes", *self.files]]
        if path.endswith("/preupload/main"):
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            return {"files": [{"path": file["path"], **mode} for file in json.loads(body)["files"]]}
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del self.files[line["value"]["path"]]
            self.commits += 1
            return {"commitUrl": f"{self.url}/{REPO}/commit/{'0' * 40}", "commitOid": "0" * 40}
        return {"errors": [], "warnings": []}  # of the card's metadata


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        """Answer as the Hub does, if it has no other status for the path and knows the token."""
        path = self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.sent.append(body)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        status = self.server.status(path) if known else 401
        _, is_file, name = path.partition("/resolve/main/")
        if is_file and status == 200:
            content = self.server.files[name]
        else:
            content = json.dumps(self.server.answer(path, body) if status == 200 else {"error": "no"}).encode()
        self.send_response(status)
        self.send_header("ETag", f'"{len(content)}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    """A server to which this process's client is logged in, without the pauses between its attempts."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", server.url)
        files = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda _: None, time=time.time))
        patch.setenv("HF_TOKEN", TOKEN)
        close_session()
        yield server
        close_session()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def hub(server: Hub) -> Hub:
    """The server before anything came to it."""
    server.forget()
    return server


@pytest.fixture(scope="module")
def trained(server: Hub, gpt2_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run that was to be pushed at its end; the Hub failed, and was asked only once all was written."""
    folder, stood = tmp_path_factory.mktemp("runs") / "lora", []
    server.status = lambda path: stood.append((folder / "run_summary.json").is_file()) or 500
    lora = {"use_peft": True, "lora_target_modules": "c_attn", "save_state_dict": True, "max_steps": 8}
    push = {"push_to_hub": True, "hub_model_id": REPO, "hub_private_repo": True}
    with pytest.raises(UserError, match=r"could not push .*nothing is lost, retry with: python -m reward_recipes.push"):
        run(*arguments(gpt2_dir, data, folder, **lora, **push))
    assert stood and all(stood)
    return folder


@pytest.fixture
def run_dir(trained: Path, hub: Hub, tmp_path: Path) -> Path:
    """That run, with a pickle, checkpoints and other people's files beside it."""
    folder = shutil.copytree(trained, tmp_path / "run")
    for name in ("notes.txt", "training_args.bin", "model-old.safetensors", "adapter/optimizer.pt"):
        (folder / name).write_text("mine")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def staged(run_dir: Path) -> dict[str, bytes]:
    folder = run_dir.with_name("staged")
    folder.mkdir()
    stage_run(run_dir, folder, REPO)
    return content(folder)


def edit(path: Path, **values: object) -> None:
    """Set values in a JSON or YAML file."""
    path.write_text(json.dumps(yaml.safe_load(path.read_text()) | values))


def test_the_command_pushes_the_staged_set_in_one_commit_or_ends_with_one_line(
    hub: Hub, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under its own names and, the second time, a recipe's."""
    before, words = content(run_dir), ["--private", "true", "--license", "mit", "--language", "en"]
    assert len(list(run_dir.glob("checkpoint-*"))) == 2  # saves there were, at which Trainer would have pushed
    assert yaml.safe_load(before["recipe.yaml"])["push_to_hub"] is True
    monkeypatch.setattr(sys, "argv", ["push", str(run_dir), "--repo_id", REPO, *words])
    run_cli(command.main)
    assert capsys.readouterr().out == f"pushed to {hub.url}/{REPO}/commit/{'0' * 40}\n"
    assert hub.commits == 1 and hub.created[0]["visibility"] == "private" and content(run_dir) == before
    assert set(hub.files) == PUBLISHED and hub.files["model.safetensors"] == before["model.safetensors"]
    card, expected = RepoCard(hub.files.pop("README.md").decode()).data, staged(run_dir)
    assert (card.license, card.language) == ("mit", ["en"])
    assert expected.pop("README.md") and hub.files == expected
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    monkeypatch.setattr(sys, "argv", ["push", "--output_dir", str(run_dir), "--hub_model_id", REPO, *words])
    with pytest.raises(SystemExit) as stopped:
        run_cli(command.main)
    last = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and last.startswith("error: could not push") and "hf_wrong" not in last
    assert "the token is not accepted" in last and last.endswith(" ".join(words))


def test_a_later_push_replaces_what_the_run_no_longer_has_and_nothing_else(hub: Hub, run_dir: Path) -> None:
    push_run(run_dir, REPO)
    hub.files["notes.md"] = b"written on the Hub"
    model = AutoModelForSequenceClassification.from_pretrained(run_dir)
    for name in ("model.safetensors", "test_metrics.json"):
        (run_dir / name).unlink()
    model.save_pretrained(run_dir, max_shard_size="60KB")
    push_run(run_dir, REPO)
    assert hub.files.pop("notes.md") == b"written on the Hub" and hub.files == staged(run_dir)
    shards = {path.name for path in run_dir.glob("model-0*.safetensors")}
    assert len(shards) > 1 and shards | {"model.safetensors.index.json"} < set(hub.files)
    assert not {"model.safetensors", "model-old.safetensors", "test_metrics.json"} & set(hub.files)


def test_what_people_wrote_in_the_card_stays(hub: Hub, run_dir: Path) -> None:
    """A card of their own, with another field and tag; then text around ours, and licence and languages by option."""
    data = {"license": "mit", "tags": ["rlhf", "bread"], "library_name": "other", "extra": {"a": [1]}}
    hub.files["README.md"] = f"---\n{yaml.safe_dump(data)}---\n# Mine\n\nWritten by hand.\n".encode()
    push_run(run_dir, REPO)
    first = RepoCard(hub.files["README.md"].decode())
    ours = RepoCard(staged(run_dir)["README.md"].decode())
    assert first.text == f"# Mine\n\nWritten by hand.\n\n{ours.text.lstrip()}"
    tags = [*ours.data.tags, "bread"]
    assert first.data.to_dict() == ours.data.to_dict() | {"license": "mit", "extra": {"a": [1]}, "tags": tags}
    hub.files["README.md"] += b"\nBelow, too.\n"
    (run_dir / "test_metrics.json").unlink()  # so that our part is another one
    push_run(run_dir, REPO, license="apache-2.0", language=["en", "de"])
    second = RepoCard(hub.files["README.md"].decode())
    assert second.text.startswith("# Mine\n\nWritten by hand.\n") and second.text.endswith("\nBelow, too.\n")
    assert second.text.count("A reward model:") == 1 and "not measured" in second.text
    assert (second.data.license, second.data.language, second.data.extra) == ("apache-2.0", ["en", "de"], {"a": [1]})
    push_run(run_dir, REPO)
    assert hub.files["README.md"].decode() == str(second)


def test_nothing_uploaded_names_this_machine(
    hub: Hub, run_dir: Path, tmp_path: Path, gpt2_dir: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/carol")
    template = "/home/carol/templates/chat.jinja"
    edit(run_dir / "recipe.yaml", run_name="box17-night", logging_dir="/var/logs/box17", output_dir="runs/box17_carol")
    edit(run_dir / "recipe.yaml", chat_template_path=template, deepspeed="~/deepspeed.json", hub_model_id="carol/x")
    edit(run_dir / "config.json", _name_or_path=str(gpt2_dir))
    edit(run_dir / "tokenizer_config.json", name_or_path=f"{gpt2_dir}/", start="/a")
    report = {"model": str(run_dir), "dataset": str(data), "split": "test", "accuracy": 0.5, "pairs": 7}
    (run_dir / "evaluation.json").write_text(json.dumps(report))
    quoted = f"{output.WRONG_PAIRS}\n\n    better  told by carol\n"  # secret as the data may be
    (run_dir / "evaluation.md").write_text(f"# Evaluation of `{run_dir}` on {data}, split test\n{quoted}")
    push_run(run_dir, REPO)
    everything = b"\n".join((*hub.sent, *hub.files.values()))
    for secret in (str(tmp_path), str(gpt2_dir), str(data), str(tmp_path.parent), "box17", "carol", TOKEN):
        assert secret.encode() not in everything, secret
    recipe = yaml.safe_load(hub.files["recipe.yaml"])
    assert recipe["model_name_or_path"] == gpt2_dir.name and recipe["dataset_name"] == data.name
    assert (recipe["chat_template_path"], recipe["deepspeed"]) == ("chat.jinja", "deepspeed.json")
    assert not {"run_name", "logging_dir", "hub_model_id", "output_dir"} & set(recipe)
    assert json.loads(hub.files["config.json"])["_name_or_path"] == gpt2_dir.name
    assert json.loads(hub.files["tokenizer_config.json"])["start"] == "/a"  # a token, not a path
    told = hub.files["README.md"].decode()
    assert f"`{gpt2_dir.name}` (a local folder or file)" in told and "base_model" not in told
    adapter = json.loads(hub.files["adapter/adapter_config.json"])
    assert adapter["base_model_name_or_path"] == gpt2_dir.name
    assert hub.files["evaluation.md"] == f"# Evaluation of `run` on {data.name}, split test\n".encode()


def test_hub_ids_stay_and_paths_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "data")
    scrubber = Scrubber(tmp_path / "runs" / "one")
    for name in ("openai-community/gpt2", "gpt2", "Qwen/Qwen3-0.6B", "Anthropic/hh-rlhf"):
        assert scrubber.values({"model": name}) == {"model": name} and scrubber.hub_id(name) == name
    local = {
        "data/model": "model",  # from a folder above the run's
        "model": "model",
        "/mnt/x/my model": "my model",
        "~/models/tiny": "tiny",
        "../shared/pairs": "pairs",
        "gone/outputs/model": "model",
        ".": "local",
    }
    for name, left in local.items():
        assert scrubber.hub_id(name) is None and scrubber.values({"model": name}) == {"model": left}, name
    kept = {"a": "https://host/x/y", "eos_token": "</s>", "n": 1.5, "flag": None, "many": ["a/b", 2], "url": "s3://b/c"}
    assert scrubber.values(kept) == kept
    paths = ["/mnt/a/b", "data/model", "./gone", "../gone/pairs"]
    assert scrubber.values({"deep": {"x": paths}}) == {"deep": {"x": ["b", "model", "gone", "pairs"]}}
    text = "Model `data/model` (/mnt/x/run), see https://host/a/b and 3/4 of openai-community/gpt2; in ~/x/y."
    assert scrubber.text(text) == "Model `model` (run), see https://host/a/b and 3/4 of openai-community/gpt2; in y."


def test_a_token_in_any_text_is_refused_before_anything_is_sent(hub: Hub, run_dir: Path) -> None:
    texts = {"data_audit.json": json.dumps({"train": {"note": TOKEN}}), "evaluation.md": "key: of-another-form"}
    texts |= dict.fromkeys(("chat_template.jinja", "reward_model_log.csv"), f"a {TOKEN}\n")
    for name, text in texts.items():
        before = (run_dir / name).read_bytes() if (run_dir / name).exists() else b""
        (run_dir / name).write_text(text)
        with pytest.raises(UserError, match=rf"{re.escape(name)}: .*found what looks like a token") as told:
            push_run(run_dir, REPO, token="of-another-form")
        assert TOKEN not in str(told.value) and not hub.sent
        (run_dir / name).write_bytes(before)


def test_what_is_no_run_or_no_repository_is_named_before_anything_is_sent(hub: Hub, run_dir: Path) -> None:
    for repo_id in ("name", "a/b/c", "a/-b", "", "../b"):
        with pytest.raises(UserError, match="repo_id: expected user/name, found"):
            push_run(run_dir, repo_id)
    (run_dir / "data_audit.json").write_text("not: [json")
    with pytest.raises(UserError, match=r"data_audit.json: .*; mend it"):
        push_run(run_dir, REPO)
    for name in ("run_summary.json", "model.safetensors", "config.json", "recipe.yaml"):
        (run_dir / name).unlink()
        with pytest.raises(UserError, match="expected the output folder of a finished run, found no "):
            push_run(run_dir, REPO)
    assert not hub.sent


def test_a_failed_push_says_how_to_retry_and_loses_nothing(
    hub: Hub, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(run_dir)
    words = re.escape(f"python -m reward_recipes.push {run_dir} --repo_id {REPO} --private true")
    for url, path, status, told in (
        (hub.url, "/api", 403, "403 .*take one with write access"),
        (hub.url, "/commit/main", 503, "503 "),
        ("http://127.0.0.1:1", "", 200, "refused"),  # where nothing listens
    ):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        hub.status = lambda where, path=path, status=status: status if path in where else 200
        with pytest.raises(UserError, match=rf"^could not push .* to {REPO}: .*{told}.*; .*retry with: {words}$"):
            push_run(run_dir, REPO, private=True)
        assert content(run_dir) == before and not hub.files
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    push_run(run_dir, REPO, private=True)
    assert hub.files == staged(run_dir) and hub.commits == 1


def test_a_push_that_cannot_work_is_told_before_training(
    hub: Hub, gpt2_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = arguments(gpt2_dir, data, tmp_path / "out", push_to_hub=True, hub_model_id=REPO)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="expected a token, found none; run `hf auth login`, or set HF_TOKEN"):
        run(*words)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="found HF_HUB_OFFLINE set; unset it"):
        run(*words, "--hub_token", TOKEN)
    assert not (tmp_path / "out").exists() and not hub.sent


def test_a_token_that_the_hub_refuses_is_named_where_a_source_is_loaded(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also under 403, as for a gated model; a server that knows no such file speaks of no token."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)
    for status, told in ((401, r"\(401\).*the token"), (403, r"\(403\).*the token"), (404, "local folder")):
        hub.status = lambda path, status=status: status
        for load in (load_tokenizer, load_classifier, load_pairs):
            with pytest.raises(UserError, match=rf"(?s){REPO}.*{told}") as found:
                load(REPO)
            assert TOKEN not in str(found.value)
