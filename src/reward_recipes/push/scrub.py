"""Which values of a run's files name this machine or its user, and what is published in their place."""

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from reward_recipes.run import output, read_mapping

# A recipe's fields that say where and as whom this run was done, not what was done.
PRIVATE_FIELDS = ("push_to_hub", "hub_", "trackio_", "run_name", "project", "logging_dir", "output_dir")
LIBRARY_FILES = ("config.json", "tokenizer_config.json", "adapter_config.json")
# Ends of keys that hold a hub id or a path. In the libraries' files no other is touched: `/a` may be a token there.
LIBRARY_SOURCES = ("name_or_path",)
SOURCES = (*LIBRARY_SOURCES, "dataset_name", "model", "dataset", "baseline")
_WORD = re.compile(r"[^\s\"'`()<>\[\]{}|,;=]*[^\s\"'`()<>\[\]{}|,;=.:]")


class Scrubber:
    """Knows a run's folder, hence what a path in its files may have meant."""

    def __init__(self, run_dir: Path) -> None:
        # A run names files from where it was started, which may be any folder above its own.
        self._bases = (Path.cwd(), run_dir.resolve(), *run_dir.resolve().parents)

    def fit(self, path: Path) -> str | None:
        """The text of one of a run's files without this machine's paths; None for a file that cannot hold one.

        The evaluation's page loses the pairs that it quotes: the data may be private.

        Raises:
            UserError: a file that cannot be read.
        """
        if path.name == output.RECIPE:
            kept = {name: value for name, value in read_mapping(path).items() if not name.startswith(PRIVATE_FIELDS)}
            return yaml.safe_dump(self.values(kept))
        if path.name in LIBRARY_FILES:
            scrubbed = self.values(read_mapping(path), sources=LIBRARY_SOURCES, others=False)
            return json.dumps(scrubbed, indent=2, ensure_ascii=False) + "\n"
        if path.name in output.PUBLISHED and path.suffix == ".json":
            return json.dumps(self.values(read_mapping(path)), indent=2) + "\n"
        return self.text(path.read_text("utf-8").partition(output.WRONG_PAIRS)[0]) if path.suffix == ".md" else None

    def hub_id(self, name: str) -> str | None:
        """The name if it can be a repository's on the Hub, None if it is a file or folder, or cannot be one."""
        try:
            validate_repo_id(name)
        except HFValidationError:
            return None
        return None if self._is_local(name) or self._exists(name) else name

    def values(self, value: Any, name: str = "", sources: tuple[str, ...] = SOURCES, others: bool = True) -> Any:
        """The same mapping, list or text without local paths.

        Args:
            value: what stands under the key `name`.
            name: that key.
            sources: ends of keys that hold a hub id, which stays, or a path, of which the last part stays.
            others: whether a path under another key is cut as well.
        """
        if isinstance(value, dict):
            return {key: self.values(item, str(key), sources, others) for key, item in value.items()}
        if isinstance(value, list):
            return [self.values(item, name, sources, others) for item in value]
        if not isinstance(value, str):
            return value
        local = self.hub_id(value) is None if name.endswith(sources) else others and self._is_local(value)
        return (Path(value).name or "local") if local else value

    def text(self, text: str) -> str:
        """Running text whose local paths are cut to their last part."""
        return _WORD.sub(lambda word: Path(word[0]).name if self._is_local(word[0]) else word[0], text)

    def _is_local(self, name: str) -> bool:
        if "://" in name or not Path(name).name:
            return False
        return name.startswith(("/", "~/", "./", "../")) or ("/" in name and self._exists(name))

    def _exists(self, name: str) -> bool:
        return any(os.path.exists(os.path.join(base, name)) for base in self._bases)
