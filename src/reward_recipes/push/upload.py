"""How a run gets to the Hub: which of its files are published, how they are made fit for it, and the one upload."""

import shlex
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, is_offline_mode

from reward_recipes.push.card import merge_card, write_card
from reward_recipes.push.scrub import Scrubber
from reward_recipes.run import TOKEN, UserError, check_repo_id, first_line, output, read_mapping

NEEDED = (output.RECIPE, "config.json", "model.safetensors*", output.SUMMARY)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", *output.MODEL_FILES)
PUBLISHED = (*output.MODEL_FILES, *output.PUBLISHED, *(f"{output.ADAPTER}/{name}" for name in ADAPTER_FILES))
CARD = "README.md"
BINARY = (".safetensors", ".png")
HINTS = {
    401: "; the token is not accepted: run `hf auth login`, or set HF_TOKEN",
    403: "; the token may not write there: take one with write access",
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


def push_run(
    run_dir: Path,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    **card: Any,
) -> str:
    """Upload a run as one commit; `run_dir` itself is not changed. What people wrote in the repository's card stays.

    Args:
        run_dir: the output folder of a run.
        repo_id: `user/name`; the repository is made if there is none.
        private: whether a new repository is private; None leaves that to the Hub.
        token: with the right to write; None takes the one of `hf auth login` or `HF_TOKEN`.
        **card: `license` of the model, such as `apache-2.0`, and `language`, a list of codes such as `en`; None or an
            empty list leaves what the card has.

    Returns:
        The commit's address.

    Raises:
        UserError: no run there, something in it that must not be published, or an upload that failed.
    """
    check_repo_id("repo_id", repo_id)
    with tempfile.TemporaryDirectory(prefix="reward-recipes-push-") as folder:
        stage_run(run_dir, Path(folder), repo_id, token)
        given = {name: value for name, value in card.items() if value}
        try:
            return _upload(HfApi(token=token), Path(folder), repo_id, private, given)
        except Exception as error:  # the client passes on what its transports raise, each its own kind
            command = ["python", "-m", "reward_recipes.push", str(run_dir), "--repo_id", repo_id]
            command += [] if private is None else ["--private", str(private).lower()]
            for name, value in given.items():
                command += [f"--{name}", *([value] if isinstance(value, str) else value)]
            hint = HINTS.get(getattr(getattr(error, "response", None), "status_code", None), "")
            raise UserError(
                f"could not push {run_dir} to {repo_id}: {first_line(error)}{hint}; nothing is lost, retry with: "
                f"{shlex.join(command)}"
            ) from error


def stage_run(run_dir: Path, staged: Path, repo_id: str, token: str | None = None) -> None:
    """Fill the empty folder `staged` with what is published of a run; large files are linked, not copied.

    Raises:
        UserError: no run there, a file that cannot be read, or one that holds a token.
    """
    for pattern in NEEDED:
        if not any(run_dir.glob(pattern)):
            raise UserError(f"{run_dir}: expected the output folder of a finished run, found no {pattern}")
    scrubber = Scrubber(run_dir)
    for path in (path for pattern in PUBLISHED for path in run_dir.glob(pattern)):
        target, fit = staged / path.relative_to(run_dir), scrubber.fit(path)
        target.parent.mkdir(exist_ok=True)
        target.symlink_to(path.resolve()) if fit is None else target.write_text(fit, "utf-8")
    recipe = read_mapping(run_dir / output.RECIPE)
    write_card(staged, repo_id, scrubber.hub_id(recipe["model_name_or_path"]), scrubber.hub_id(recipe["dataset_name"]))
    token = token or get_token()
    for path in (path for path in staged.rglob("*") if path.is_file() and path.suffix not in BINARY):
        text = path.read_text("utf-8", errors="replace")
        if TOKEN.search(text) or (token and token in text):
            raise UserError(
                f"{path.name}: expected nothing secret, found what looks like a token; remove it, then push"
            )


def _upload(api: HfApi, staged: Path, repo_id: str, private: bool | None, given: Mapping[str, Any]) -> str:
    """One commit, so that the repository never holds half a run, nor leftovers of the one that it held before."""
    api.create_repo(repo_id, private=private, repo_type="model", exist_ok=True)
    files = {path.relative_to(staged).as_posix(): path for path in sorted(staged.rglob("*")) if path.is_file()}
    there, existing = api.list_repo_files(repo_id), None
    if CARD in there:
        with tempfile.TemporaryDirectory() as folder:
            existing = Path(api.hf_hub_download(repo_id, CARD, local_dir=folder)).read_text("utf-8-sig")
    merge_card(staged / CARD, existing, given)
    left = [name for name in there if name not in files]
    operations = [CommitOperationAdd(name, path) for name, path in files.items()]
    operations += [CommitOperationDelete(name) for name in left if any(fnmatch(name, file) for file in PUBLISHED)]
    return api.create_commit(repo_id, operations, commit_message="Upload a run of reward-recipes").commit_url
