"""YAML from others, read as data and nothing else.

Enters: a path. Leaves: plain values, or a `MixtureError` that says where the file is wrong: a key
that appears twice, a merge, a tag, a file too long for a mixture. Knows no domain and no weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regmix.errors import MixtureError
from regmix.files import read_text

_LARGEST_YAML_CHARACTERS = 1_000_000


def read_yaml(path: Path | str) -> Any:
    """Read a YAML file; `MixtureError` where it is malformed, too long, or has a key twice."""
    import yaml

    text = read_text(path)
    if len(text) > _LARGEST_YAML_CHARACTERS:
        raise MixtureError(
            f"{path}: {len(text)} characters is too long for a mixture", cure="Check the path"
        )
    try:
        return yaml.load(text, Loader=strict_loader())
    except (
        # A malformed scalar under an explicit tag (!!bool zz) fails inside PyYAML in these ways.
        *(yaml.YAMLError, RecursionError, ValueError, TypeError),
        *(AttributeError, LookupError, ArithmeticError),
    ) as error:
        line = " ".join(str(error).split())[:300]
        raise MixtureError(f"{path}: not valid YAML ({line})", cure="Correct the file") from error


def strict_loader() -> Any:
    """Return PyYAML's safe loader, made to refuse a key that appears twice, and merge keys.

    Merges (`<<`) of merges grow exponentially, and a mixture needs none.
    """
    import yaml

    class StrictLoader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            # Anything but a mapping under the tag of one is refused by PyYAML itself.
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            for key in (key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode)):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"'{key}' appears twice", node.start_mark
                    )
                seen.add(key)
            return super().construct_mapping(node, deep=deep)

        def flatten_mapping(self, node: Any) -> None:
            if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
                raise yaml.constructor.ConstructorError(
                    None, None, "merge keys (<<) are not read", node.start_mark
                )
            super().flatten_mapping(node)

    return StrictLoader
