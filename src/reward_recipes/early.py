"""A data set or model that cannot be there is named at once: importing torch takes seconds."""

import re
import sys
from argparse import ArgumentError, ArgumentParser
from os.path import exists, expanduser
from pathlib import Path

import yaml

HUB_ID = re.compile(r"(hf://|buckets/).+|(\w[\w.-]*/)?\w[\w.-]*(?<!\.jsonl)(?<!\.csv)(?<!\.parquet)(?<!\.gz)")


def refuse_missing_sources(words: list[str]) -> None:
    """End with status 2 if command line or recipe name a source that is not there and can be no hub id.

    Whatever else is wrong is left to those who read all options later.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("config", "dataset_name", "model_name_or_path"):
        parser.add_argument(f"--{name}")
    try:
        given = vars(parser.parse_known_args(words)[0])
        recipe = yaml.safe_load(Path(config).read_text("utf-8-sig")) if (config := given.pop("config")) else {}
        named = {name: str(value or recipe.get(name) or "/") for name, value in given.items()}
    except (ArgumentError, AttributeError, OSError, ValueError, yaml.YAMLError):
        return
    for name, value in named.items():
        if not exists(expanduser(value)) and not HUB_ID.fullmatch(value):
            found = f"expected a hub id or a path that is there, found nothing at {value!r:.300}"
            print(f"error: {name}: {found}; paths begin at the current folder", file=sys.stderr)
            sys.exit(2)
