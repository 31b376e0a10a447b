"""What the Hub gets of a run, by the real client against a server on this machine: all of the staged set, once."""

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
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
from conftest import hh_pairs, write_jsonl
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from transformers import AutoModelForSequenceClassification

from reward_recipes.config import parse_recipe
from reward_recipes.push.scrub import Scrubber
from reward_recipes.push.upload import push_run, stage_run
from reward_recipes.run.errors import UserError
from reward_recipes.train import train

# How the client itself sends a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

TOKEN = "hf_" + "Abc123" * 6
REPO = "alice/reward-model"
DROP = "drop"
OPTIONS = {
    "max_length": 128,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "logging_steps": 2,
    "eval_steps": 2,
    "validation_fraction": 0.2,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "disable_tqdm": True,
}
PUBLISHED = {
    *("README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "recipe.yaml"),
    *("data_audit.json", "reward_model_log.csv", "training_progress.png", "test_metrics.json", "test_scores.csv"),
    "run_summary.json",
    *("adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
}
Fault = Callable[[str, str], int | str | None]


class Hub(ThreadingHTTPServer):
    """The part of the Hub's HTTP interface that an upload needs; `fault` makes it answer a request badly."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.requests: list[tuple[str, str, bytes]] = []
        self.fault: Fault = lambda method, path: None


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def handle_request(self) -> None:
        path = self.path.partition("?")[0]
        fault = self.server.fault(self.command, path)
        if fault == DROP:
            self.rfile.read1(100)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body = self._body()
        self.server.requests.append((self.command, path, body))
        if isinstance(fault, int):
            return self._answer({"error": "no"}, fault)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/upload/"):
            return self._answer({"error": "Invalid user token."}, 401)
        return self._route(path, body)

    do_GET = do_POST = do_PUT = handle_request

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _route(self, path: str, body: bytes) -> None:
        hub, repo = self.server, "/".join(path.removeprefix("/api/models").split("/")[1:3]).removesuffix(".git")
        if path.startswith("/upload/"):
            hub.objects[path.removeprefix("/upload/")] = body
            return self._answer({})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            hub.created.append(wanted)
            status = 409 if name in hub.repos else 200
            hub.repos.setdefault(name, {})
            return self._answer({"url": f"{hub.url}/{name}"}, status)
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if path.endswith("/tree/main"):
            files = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in hub.repos[repo]]
            return self._answer(files) if files else self._answer({"error": "no commit yet"}, 404)
        if path.endswith("/preupload/main"):
            return self._answer({"files": [_mode(file["path"]) for file in json.loads(body)["files"]]})
        if path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            return self._answer({"transfer": "basic", "objects": [self._action(**item) for item in wanted]})
        if not path.endswith("/commit/main"):
            return self._answer({"error": "no such thing"}, 404)
        return self._answer(self._commit(repo, [json.loads(line) for line in body.splitlines()]))

    def _action(self, oid: str, size: int) -> dict[str, Any]:
        item: dict[str, Any] = {"oid": oid, "size": size}
        return (
            item
            if oid in self.server.objects
            else item | {"actions": {"upload": {"href": f"{self.server.url}/upload/{oid}"}}}
        )

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> dict[str, str]:
        files = dict(self.server.repos[repo])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
                assert hashlib.sha256(files[value["path"]]).hexdigest() == value["oid"]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.server.repos[repo] = files
        self.server.commits.append(repo)
        return {"commitUrl": f"{self.server.url}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40}


def _mode(path: str) -> dict[str, Any]:
    mode = "lfs" if path.endswith((".safetensors", ".png", "tokenizer.json")) else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server to which this process's client is logged in, without the pauses between its attempts."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda _: None, time=time.time))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    close_session()
    yield server
    close_session()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_jsonl(folder / "train.jsonl", hh_pairs(40))
    write_jsonl(folder / "test.jsonl", hh_pairs(7, start=100))
    return folder


def run(model: Path, pairs: Path, folder: Path, **options: object) -> None:
    """Train in this process, through the parser."""
    named = OPTIONS | {"model_name_or_path": model, "dataset_name": pairs, "output_dir": folder} | options
    train(*parse_recipe([text for name, value in named.items() for text in (f"--{name}", str(value))]))


@pytest.fixture(scope="module")
def trained(gpt2_dir: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "lora"
    run(gpt2_dir, pairs, folder, use_peft=True, lora_target_modules="c_attn", save_state_dict=True)
    return folder


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    """A finished LoRA run, with a pickle, checkpoints and other people's files beside it."""
    folder = shutil.copytree(trained, tmp_path / "run")
    (folder / "notes.txt").write_text("mine")
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "model-old.safetensors").write_bytes(b"other weights")
    (folder / "adapter" / "optimizer.pt").write_bytes(b"pickle")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def staged(run_dir: Path, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    stage_run(run_dir, folder, REPO)
    return content(folder)


def edit(path: Path, **values: object) -> None:
    """Set values in a JSON or YAML file."""
    json_file = path.suffix == ".json"
    held = json.loads(path.read_text()) if json_file else yaml.safe_load(path.read_text())
    path.write_text(json.dumps(held | values) if json_file else yaml.safe_dump(held | values))


def test_what_arrives_is_the_staged_set_in_one_commit(hub: Hub, run_dir: Path, tmp_path: Path) -> None:
    before = content(run_dir)
    address = push_run(run_dir, REPO)
    assert address == f"{hub.url}/{REPO}/commit/{'0' * 40}"
    assert hub.repos[REPO] == staged(run_dir, tmp_path / "staged")
    assert PUBLISHED <= set(hub.repos[REPO])
    more = set(hub.repos[REPO]) - PUBLISHED
    assert all(Path(name).name in ("config.json", "tokenizer.json", "tokenizer_config.json") for name in more), more
    assert hub.repos[REPO]["model.safetensors"] == before["model.safetensors"]
    assert hub.commits == [REPO] and content(run_dir) == before


def test_nothing_uploaded_names_this_machine(
    hub: Hub, run_dir: Path, tmp_path: Path, gpt2_dir: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/carol")
    template = "/home/carol/templates/chat.jinja"
    edit(run_dir / "recipe.yaml", run_name="box17-night", logging_dir="/var/logs/box17", output_dir="runs/box17_carol")
    edit(run_dir / "recipe.yaml", chat_template_path=template, deepspeed="~/deepspeed.json", hub_model_id="carol/x")
    edit(run_dir / "config.json", _name_or_path=str(gpt2_dir))
    edit(run_dir / "tokenizer_config.json", name_or_path=f"{gpt2_dir}/")
    report = {"model": str(run_dir), "dataset": str(pairs), "accuracy": 0.5, "pairs": 7}
    (run_dir / "evaluation.json").write_text(json.dumps(report))
    (run_dir / "evaluation.md").write_text(f"# Evaluation of `{run_dir}` on {pairs}, split test\n")
    push_run(run_dir, REPO)
    sent = b"\n".join(body for _, _, body in hub.requests) + b"\n".join(hub.repos[REPO].values())
    for secret in (str(tmp_path), str(gpt2_dir), str(pairs), str(tmp_path.parent), "box17", "carol", TOKEN):
        assert secret.encode() not in sent, secret
    recipe = yaml.safe_load(hub.repos[REPO]["recipe.yaml"])
    assert recipe["model_name_or_path"] == gpt2_dir.name and recipe["dataset_name"] == pairs.name
    assert (recipe["chat_template_path"], recipe["deepspeed"]) == ("chat.jinja", "deepspeed.json")
    assert not {"run_name", "logging_dir", "hub_model_id", "output_dir"} & set(recipe)
    assert json.loads(hub.repos[REPO]["config.json"])["_name_or_path"] == gpt2_dir.name
    adapter = json.loads(hub.repos[REPO]["adapter/adapter_config.json"])
    assert adapter["base_model_name_or_path"] == gpt2_dir.name
    assert hub.repos[REPO]["evaluation.md"] == f"# Evaluation of `run` on {pairs.name}, split test\n".encode()


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
        r"C:\models\tiny": "tiny",
        "file:///mnt/x/pairs.jsonl": "pairs.jsonl",
        "gone/outputs/model": "model",
        "pairs.jsonl": "pairs.jsonl",
        ".": "local",
    }
    for name, left in local.items():
        assert scrubber.hub_id(name) is None and scrubber.values({"model": name}) == {"model": left}, name
    kept = {"a": "https://host/x/y", "eos_token": "</s>", "n": 1.5, "flag": None, "many": ["a/b", 2], "url": "s3://b/c"}
    assert scrubber.values(kept) == kept
    assert scrubber.values({"many": ["/mnt/a/b"], "deep": {"x": "data/model"}}) == {
        "many": ["b"],
        "deep": {"x": "model"},
    }
    text = "Model `data/model` (/mnt/x/run), see https://host/a/b and 3/4 of openai-community/gpt2; in ~/x/y."
    assert scrubber.text(text) == "Model `model` (run), see https://host/a/b and 3/4 of openai-community/gpt2; in y."


@pytest.mark.parametrize("name", ["data_audit.json", "evaluation.md", "chat_template.jinja", "reward_model_log.csv"])
def test_a_token_in_any_text_is_refused_before_anything_is_sent(name: str, hub: Hub, run_dir: Path) -> None:
    text = json.dumps({"train": {"note": TOKEN}}) if name.endswith(".json") else f"a {TOKEN}\n"
    (run_dir / name).write_text(text)
    with pytest.raises(UserError, match=rf"{re.escape(name)}: .*found what looks like a token") as told:
        push_run(run_dir, REPO)
    assert TOKEN not in str(told.value) and not hub.requests


def test_a_token_of_any_form_and_a_path_that_is_left_are_refused(hub: Hub, run_dir: Path) -> None:
    (run_dir / "evaluation.md").write_text("key: secret-of-another-form")
    with pytest.raises(UserError, match=r"evaluation.md: .*a token"):
        push_run(run_dir, REPO, token="secret-of-another-form")
    (run_dir / "evaluation.md").unlink()
    (run_dir / "chat_template.jinja").write_text("{# from " + str(run_dir / "x") + " #}")
    with pytest.raises(UserError, match=r"chat_template.jinja: expected no local path"):
        push_run(run_dir, REPO)
    assert not hub.requests


def test_links_are_not_followed(hub: Hub, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "outside.csv").write_text("outside")
    (run_dir / "reward_model_log.csv").unlink()
    (run_dir / "reward_model_log.csv").symlink_to(tmp_path / "outside.csv")
    shutil.move(run_dir / "adapter", tmp_path / "elsewhere")
    (run_dir / "adapter").symlink_to(tmp_path / "elsewhere")
    push_run(run_dir, REPO)
    gone = {name for name in PUBLISHED if name.startswith("adapter/")} | {"reward_model_log.csv"}
    assert not gone & set(hub.repos[REPO]) and PUBLISHED - gone <= set(hub.repos[REPO])
    assert "left out" in capsys.readouterr().err
    (run_dir / "model.safetensors").rename(tmp_path / "weights")
    (run_dir / "model.safetensors").symlink_to(tmp_path / "weights")
    with pytest.raises(UserError, match=r"found no model.safetensors, or one that is a link"):
        push_run(run_dir, REPO)


@pytest.mark.parametrize("name", ["recipe.yaml", "config.json", "model.safetensors"])
def test_a_folder_that_is_no_run_is_refused(name: str, hub: Hub, run_dir: Path, tmp_path: Path) -> None:
    (run_dir / name).unlink()
    with pytest.raises(UserError, match=f"expected the output folder of a run, found no {name}"):
        push_run(run_dir, REPO)
    with pytest.raises(UserError, match="nowhere: expected the output folder of a run"):
        push_run(tmp_path / "nowhere", REPO)
    assert not hub.requests


@pytest.mark.parametrize("broken", ["not: [json", "[1, 2]"])
def test_a_broken_file_is_named(broken: str, hub: Hub, run_dir: Path) -> None:
    (run_dir / "data_audit.json").write_text(broken)
    with pytest.raises(UserError, match=r"data_audit.json: .*; mend it"):
        push_run(run_dir, REPO)


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "a/-b", "", "../b"])
def test_an_id_that_the_hub_would_refuse_is_refused(repo_id: str, hub: Hub, run_dir: Path) -> None:
    with pytest.raises(UserError, match="repo_id: expected user/name, found"):
        push_run(run_dir, repo_id)
    assert not hub.requests


def test_sharded_weights_arrive_whole_and_replace_a_single_file(hub: Hub, run_dir: Path, tmp_path: Path) -> None:
    push_run(run_dir, REPO)
    hub.repos[REPO]["notes.md"] = b"written on the Hub"
    model = AutoModelForSequenceClassification.from_pretrained(run_dir)
    (run_dir / "model.safetensors").unlink()
    (run_dir / "test_metrics.json").unlink()
    model.save_pretrained(run_dir, max_shard_size="60KB")
    shards = {path.name for path in run_dir.glob("model-0*.safetensors")}
    assert len(shards) > 1
    push_run(run_dir, REPO)
    arrived = hub.repos[REPO]
    assert arrived.pop("notes.md") == b"written on the Hub"
    assert arrived == staged(run_dir, tmp_path / "staged")
    assert shards | {"model.safetensors.index.json"} <= set(arrived)
    assert not {"model.safetensors", "model-old.safetensors", "test_metrics.json"} & set(arrived)
    (run_dir / min(shards)).unlink()
    with pytest.raises(UserError, match=f"found no {min(shards)}"):
        push_run(run_dir, REPO)
    index = {"weight_map": {"score.weight": "../../secret.safetensors"}}
    (run_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"expected the names of model-\*.safetensors, found"):
        push_run(run_dir, REPO)


FAULTS = [
    ("POST", "/api/repos/create", 401, r"the Hub answered 401 \(no\): it does not accept the token"),
    ("POST", "/api/repos/create", 403, r"the Hub answered 403 \(no\): the token may not write there"),
    ("POST", "/api/repos/create", 500, r"the Hub answered 500 \(no\)"),
    ("POST", "/preupload/main", 404, r"the Hub answered 404"),
    ("PUT", "/upload/", 500, r"the Hub answered 500 \(no\)"),
    ("PUT", "/upload/", DROP, r"\w+Error: "),
    ("POST", "/commit/main", 503, r"the Hub answered 503"),
]


@pytest.mark.parametrize(("method", "path", "fault", "told"), FAULTS)
def test_a_failed_push_says_how_to_retry_and_loses_nothing(
    method: str, path: str, fault: int | str, told: str, hub: Hub, run_dir: Path, tmp_path: Path
) -> None:
    before = content(run_dir)
    command = re.escape(f"python -m reward_recipes.push {run_dir} --repo_id {REPO} --private true")
    hub.fault = lambda verb, where: fault if verb == method and path in where else None
    if fault == 401:
        hub.fault = lambda verb, where: 401
    with pytest.raises(UserError, match=rf"(?s)^could not push .* to {REPO}: {told}.*; .*retry with: {command}$"):
        push_run(run_dir, REPO, private=True)
    assert content(run_dir) == before and not hub.repos.get(REPO)
    hub.fault = lambda verb, where: None
    push_run(run_dir, REPO, private=True)
    assert hub.repos[REPO] == staged(run_dir, tmp_path / "staged") and len(hub.commits) == 1


def test_no_server_at_all(hub: Hub, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(UserError, match=r"ConnectError: .*refused; .*retry with: python -m reward_recipes.push"):
        push_run(run_dir, REPO)


def test_training_pushes_once_when_the_run_is_finished(
    hub: Hub, gpt2_dir: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pushed"
    summary_stood: list[bool] = []
    hub.fault = lambda method, path: summary_stood.append((folder / "run_summary.json").is_file())
    run(gpt2_dir, pairs, folder, push_to_hub=True, hub_model_id=REPO, hub_private_repo=True)
    assert all(summary_stood) and hub.commits == [REPO] and len(hub.created) == 1
    assert hub.created[0]["visibility"] == "private"
    assert hub.repos[REPO] == staged(folder, tmp_path / "staged")
    assert f"pushed to {hub.url}/{REPO}/commit/" in capsys.readouterr().out
    assert len(list(folder.glob("checkpoint-*"))) == 2  # saves there were, at which Trainer would have pushed
    kept = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert kept["push_to_hub"] is True and kept["hub_model_id"] == REPO


def test_a_push_that_fails_after_training_leaves_a_finished_run(
    hub: Hub, gpt2_dir: Path, pairs: Path, tmp_path: Path
) -> None:
    hub.fault = lambda method, path: 500
    with pytest.raises(UserError, match=r"could not push .*nothing is lost, retry with: python -m reward_recipes.push"):
        run(gpt2_dir, pairs, tmp_path / "kept", push_to_hub=True, hub_model_id=REPO)
    assert {"run_summary.json", "model.safetensors", "test_metrics.json"} <= set(content(tmp_path / "kept"))
    hub.fault = lambda method, path: None
    push_run(tmp_path / "kept", REPO)
    assert hub.repos[REPO] == staged(tmp_path / "kept", tmp_path / "staged")


def test_a_push_that_cannot_work_is_told_before_training(
    hub: Hub, gpt2_dir: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="expected a token, found none; run `hf auth login`, or set HF_TOKEN"):
        run(gpt2_dir, pairs, tmp_path / "out", push_to_hub=True, hub_model_id=REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="found HF_HUB_OFFLINE set; unset it"):
        run(gpt2_dir, pairs, tmp_path / "out", push_to_hub=True, hub_model_id=REPO, hub_token=TOKEN)
    assert not (tmp_path / "out").exists() and not hub.requests


def test_the_command_honours_the_client_s_own_settings(hub: Hub, run_dir: Path, tmp_path: Path) -> None:
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    command = [sys.executable, "-m", "reward_recipes.push", str(run_dir), "--repo_id", REPO, "--private", "true"]

    def push(**more: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | settings | more
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env)

    done = push()
    assert (done.returncode, hub.created[0]["visibility"]) == (0, "private"), done.stderr
    assert done.stdout == f"pushed to {hub.url}/{REPO}/commit/{'0' * 40}\n"
    assert hub.repos[REPO] == staged(run_dir, tmp_path / "staged")
    refused = push(HF_TOKEN="hf_wrong")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr and "hf_wrong" not in refused.stderr
    last = refused.stderr.splitlines()[-1]
    assert last.startswith("error: could not push") and last.endswith(f"--repo_id {REPO} --private true")
