"""How a YAML or JSON file is read: one mapping, and nothing that YAML takes in silence."""

import json
from pathlib import Path
from typing import Any

import yaml

from reward_recipes.run.errors import UserError


class _PlainLoader(yaml.SafeLoader):
    """Refuses what YAML takes in silence: a key given twice, and an alias, which can make a short file endless."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            line = self.peek_event().start_mark.line + 1
            raise UserError(f"recipe, line {line}: expected no alias (*) of a list or mapping, found one; write it out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                line = key.start_mark.line + 1
                raise UserError(f"recipe, line {line}: expected each key once, found {key.value!r} twice; remove one")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path | str) -> dict[str, Any]:
    """What a file holds.

    Raises:
        UserError: no mapping, a key given twice or an alias.
        OSError, ValueError, RecursionError, yaml.YAMLError: a file that cannot be read as YAML.
    """
    with open(path, encoding="utf-8") as file:
        content = yaml.load(file, _PlainLoader)
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
