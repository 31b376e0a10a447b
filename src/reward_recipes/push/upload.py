"""How a run gets to the Hub: which of its files are published, how they are made fit for it, and the one upload."""

import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError

from reward_recipes.push.card import CARD, write_card
from reward_recipes.push.scrub import Scrubber
from reward_recipes.run import TOKEN, UserError, check_repo_id, expect, first_line, output, read_mapping

WEIGHTS, INDEX, SHARD = "model.safetensors", "model.safetensors.index.json", re.compile(r"model-[\w.-]+\.safetensors")
SETTINGS = tuple(name for name in output.MODEL_FILES if not name.startswith("model"))
ADAPTER_FILES = tuple(
    f"{output.ADAPTER}/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", *SETTINGS)
)
VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")  # where `/root` may be a token
BINARY = (".safetensors", ".png")
HINTS = {
    401: ": it does not accept the token; run `hf auth login`, or set HF_TOKEN",
    403: ": the token may not write there; take one with write access",
}


def check_push(token: str | None) -> None:
    """What can be known before a training whether the push that it asks for can work, without the network.

    Raises:
        UserError: no token at hand, or the Hub is switched off.
    """
    if is_offline_mode():
        raise UserError("push_to_hub: expected a Hub that may be reached, found HF_HUB_OFFLINE set; unset it")
    if not (token or get_token()):
        raise UserError("push_to_hub: expected a token, found none; run `hf auth login`, or set HF_TOKEN")


def push_run(run_dir: Path, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Upload a run as one commit; `run_dir` itself is not changed.

    Args:
        run_dir: the output folder of a run.
        repo_id: `user/name`; the repository is made if there is none.
        private: whether a new repository is private; None leaves that to the Hub.
        token: with the right to write; None takes the one of `hf auth login` or `HF_TOKEN`.

    Returns:
        The commit's address.

    Raises:
        UserError: no run there, something in it that must not be published, or an upload that failed.
    """
    check_repo_id("repo_id", repo_id)
    with tempfile.TemporaryDirectory(prefix="reward-recipes-push-") as folder:
        staged = Path(folder)
        stage_run(run_dir, staged, repo_id, token)
        try:
            return _upload(HfApi(token=token), staged, repo_id, private)
        except Exception as error:  # the client passes on what its transports raise, each its own kind
            command = ["python", "-m", "reward_recipes.push", str(run_dir), "--repo_id", repo_id]
            command += [] if private is None else ["--private", str(private).lower()]
            raise UserError(
                f"could not push {run_dir} to {repo_id}: {_reason(error)}; the folder is whole and nothing is lost, "
                f"retry with: {shlex.join(command)}"
            ) from error


def stage_run(run_dir: Path, staged: Path, repo_id: str, token: str | None = None) -> None:
    """Fill the empty folder `staged` with what is published of a run; the large files are links into it.

    Raises:
        UserError: no run there, a file that cannot be read, or one that holds a token or names a local folder.
    """
    scrubber, token = Scrubber(run_dir), token or get_token()
    for path in list(_published(run_dir)):
        target = staged / path.relative_to(run_dir)
        target.parent.mkdir(exist_ok=True)
        fit = scrubber.fit(path)
        target.symlink_to(path.resolve()) if fit is None else target.write_text(fit, "utf-8")
        _refuse_secrets(target, scrubber, token)
    recipe = read_mapping(run_dir / output.RECIPE)
    for name in ("model_name_or_path", "dataset_name"):
        if not isinstance(recipe.get(name), str):
            raise UserError(f"{run_dir / output.RECIPE}: expected {name}, found none; push a run of this tool")
    write_card(staged, repo_id, scrubber.hub_id(recipe["model_name_or_path"]), scrubber.hub_id(recipe["dataset_name"]))
    _refuse_secrets(staged / CARD, scrubber, token)


def _published(run_dir: Path) -> Iterator[Path]:
    """A run's files by name, and nothing else that lies in its folder; links are not followed.

    Raises:
        UserError: the folder is no run's, or its weights are not all there.
    """
    weights = [WEIGHTS]
    if _is_plain(run_dir / INDEX):
        shards = sorted(set(read_mapping(run_dir / INDEX).get("weight_map", {}).values()))
        strange = [name for name in shards if not SHARD.fullmatch(name)]
        expect(bool(shards) and not strange, str(run_dir / INDEX), "the names of model-*.safetensors", strange[:1])
        weights = [INDEX, *shards]
    for name in (output.RECIPE, "config.json", *weights):
        if not _is_plain(run_dir / name):
            raise UserError(f"{run_dir}: expected the output folder of a run, found no {name}, or one that is a link")
    adapter = () if (run_dir / output.ADAPTER).is_symlink() else ADAPTER_FILES
    for path in (run_dir / name for name in (*weights, *SETTINGS, *output.PUBLISHED, *adapter)):
        if _is_plain(path):
            yield path
        elif path.exists():
            print(f"left out: {path} is not a plain file", file=sys.stderr)


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _refuse_secrets(path: Path, scrubber: Scrubber, token: str | None) -> None:
    if path.suffix in BINARY:
        return
    text = path.read_text("utf-8", errors="replace")
    if TOKEN.search(text) or (token and token in text):
        raise UserError(f"{path.name}: expected nothing secret, found what looks like a token; remove it, then push")
    if path.name not in VOCABULARY and (named := next(scrubber.leaks(text), None)):
        raise UserError(f"{path.name}: expected no local path, found {named}; remove it, then push")


def _upload(api: HfApi, staged: Path, repo_id: str, private: bool | None) -> str:
    """One commit, so that the repository never holds half a run, nor leftovers of the one that it held before."""
    api.create_repo(repo_id, private=private, repo_type="model", exist_ok=True)
    files = {path.relative_to(staged).as_posix(): path for path in sorted(staged.rglob("*")) if path.is_file()}
    left = [name for name in _held(api, repo_id) if name not in files and _is_ours(name)]
    operations = [CommitOperationAdd(name, path) for name, path in files.items()]
    operations += [CommitOperationDelete(name) for name in left]
    return api.create_commit(repo_id, operations, commit_message="Upload a run of reward-recipes").commit_url


def _held(api: HfApi, repo_id: str) -> list[str]:
    """The files of the repository, none where it has no commit yet."""
    try:
        return api.list_repo_files(repo_id)
    except HfHubHTTPError as error:
        if error.response.status_code != 404:
            print(f"files of an earlier push may remain in {repo_id}: {_reason(error)}", file=sys.stderr)
        return []


def _is_ours(name: str) -> bool:
    return name in (WEIGHTS, INDEX, *SETTINGS, *output.PUBLISHED, *ADAPTER_FILES) or SHARD.fullmatch(name) is not None


def _reason(error: Exception) -> str:
    """What went wrong, in a few words: the client's own messages run over many lines."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    if not isinstance(cause, HfHubHTTPError):
        return f"{type(cause).__name__}: {first_line(cause)}"
    status = cause.response.status_code
    said = f" ({cause.server_message})" if cause.server_message else ""
    return f"the Hub answered {status}{said}{HINTS.get(status, '')}"
