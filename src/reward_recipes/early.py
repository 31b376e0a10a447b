"""A data set or model that cannot be there is named at once: importing torch takes seconds."""

import re
import sys
from argparse import ArgumentError, ArgumentParser
from os import PathLike
from os.path import exists, expanduser
from pathlib import Path

import yaml

HUB_ID = re.compile(r"(hf://|buckets/).+|(\w[\w.-]*/)?\w[\w.-]*(?<!\.jsonl)(?<!\.csv)(?<!\.parquet)(?<!\.gz)", re.ASCII)


def find_missing(name: str, source: str | PathLike[str]) -> str | None:
    """Why the source that is called `name` is neither there nor can be a hub id; None where it may be one."""
    if exists(expanduser(source)) or HUB_ID.fullmatch(str(source)):
        return None
    found = f"found nothing at {str(source)!r:.300}; paths begin at the current folder"
    return f"{name}: expected a hub id or a path that is there, {found}"


def refuse_missing_sources(words: list[str]) -> None:
    """End with status 2 if command line or recipe name a missing source; other mistakes are left to the parser."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("config", "dataset_name", "model_name_or_path"):
        parser.add_argument(f"--{name}")
    try:
        given = vars(parser.parse_known_args(words)[0])
        recipe = yaml.safe_load(Path(config).read_text("utf-8-sig")) if (config := given.pop("config")) else {}
        named = {name: str(value or recipe.get(name) or "/") for name, value in given.items()}
    except (ArgumentError, AttributeError, OSError, ValueError, yaml.YAMLError):
        return
    for name, source in named.items():
        if missing := find_missing(name, source):
            print(f"error: {missing}", file=sys.stderr)
            sys.exit(2)
