"""How a YAML or JSON file is read: one mapping, and nothing in YAML that its reader takes in silence."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from reward_recipes.run.errors import UserError


def read_yaml(path: Path | str) -> dict[str, Any]:
    """What a file holds.

    Raises:
        UserError: no mapping, a key given twice or an alias.
        OSError, ValueError, RecursionError, yaml.YAMLError: a file that cannot be read as YAML.
    """
    with open(path, encoding="utf-8") as file:
        loader = yaml.SafeLoader(file)
        root = loader.get_single_node()
        _refuse_traps(root)
        content = loader.construct_document(root) if root else None
    if not isinstance(content, dict):
        raise UserError(f"{path} must contain a YAML mapping, found {type(content).__name__}")
    return content


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file, or one whose name ends in .json, holds. Raises `UserError` where it holds none."""
    try:
        content = json.loads(path.read_text("utf-8-sig")) if path.suffix == ".json" else read_yaml(path)
    except OSError as error:
        raise UserError(f"expected a file at {path}, found: {error.strerror}; give one that can be read") from error
    except (UserError, ValueError, RecursionError, yaml.YAMLError) as error:
        found = " ".join(str(error).split())
        raise UserError(f"{path}: expected a mapping, found: {found}; mend it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping, found {type(content).__name__}; mend it")
    return content


def _refuse_traps(root: yaml.Node | None) -> None:
    """Refuse what YAML takes in silence: a key given twice; a list used again, which can make a short file endless."""
    nodes, seen = [root], set()
    while nodes:
        node = nodes.pop()
        if not isinstance(node, yaml.CollectionNode):
            continue
        where = f"recipe, line {node.start_mark.line + 1}"
        if id(node) in seen:
            raise UserError(f"{where}: expected each list and mapping once, found an alias (*) of it; write it out")
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            if twice := [key for key, count in keys.items() if count > 1]:
                raise UserError(f"{where}: expected each key once, found {twice[0]!r} twice; remove one")
            nodes += [part for pair in node.value for part in pair]
        else:
            nodes += node.value
