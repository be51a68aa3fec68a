"""The reference of all keys, from the types, defaults and descriptions in schema.py and towers.py.

`python -m threetowers.trainer.config.documentation` prints docs/config.md; `make docs/config.md` writes it.
"""

import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import TypeAdapter

from threetowers.trainer.config.checks import ConfigError
from threetowers.trainer.config.schema import TrainConfig

INTRODUCTION = """\
# Config

All keys of a config of `threetowers train`, by section; `threetowers train --help-config SECTION` prints a section.
This page is generated from the dataclasses in `trainer/config` by `make docs/config.md`.

Two further keys concern the file itself:

- `base: OTHER.yaml` names a config, relative to the file, over which the keys of this one are merged: mappings key by
  key, everything else is replaced, and so are a duration and a tower of another kind. A base has no base.
- `variants: {NAME: {...}}` holds named changes, merged in the same way over the config by `--variant NAME`. The
  variants of a base are not inherited.

Changes on the command line come last: `optim.lr=3e-4 terms.image-third=null`. They replace what was there.
"""
JsonSchema = dict[str, Any]


def config_reference(sections: Sequence[str] = ()) -> str:
    """Return the description of all keys, or of those in some top-level sections, as Markdown.

    Raises:
        ConfigError: A section does not exist.
    """
    found = list(_sections())
    known = list(dict.fromkeys(path.partition(".")[0] for path, _ in found if path))
    if unknown := [name for name in sections if name not in known]:
        raise ConfigError(f"--help-config: found {', '.join(unknown)}, expected sections among {', '.join(known)}")
    wanted = [(path, schema) for path, schema in found if not sections or path.partition(".")[0] in sections]
    pages = [] if sections else [INTRODUCTION]
    for path, schema in wanted:
        pages.append("\n".join(_section_lines(path, schema)) + "\n")
    return "\n".join(pages)


def _sections() -> Iterator[tuple[str, JsonSchema]]:
    """Yield the path and the JSON schema of each section, once each, a section before those inside it."""
    root = TypeAdapter(TrainConfig).json_schema()
    pending = [("", root)]
    seen = set()
    while pending:
        path, schema = pending.pop(0)
        yield path, schema
        inside = []
        for key, value in schema["properties"].items():
            if "$ref" in value:  # pydantic leaves out a description that repeats that of the section
                value.setdefault("description", root["$defs"][value["$ref"].rpartition("/")[2]]["description"])
            for below, name in _nested(value, f"{path}.{key}" if path else key):
                if name not in seen:  # a duration is described once
                    seen.add(name)
                    inside.append((below, root["$defs"][name]))
        pending = inside + pending


def _nested(schema: JsonSchema, path: str) -> Iterator[tuple[str, str]]:
    """Yield the path and the class of each section that the value of a key may be or hold."""
    if "$ref" in schema:
        yield path, schema["$ref"].rpartition("/")[2]
    for alternative in [*schema.get("anyOf", []), *schema.get("oneOf", [])]:
        yield from _nested(alternative, path)
    if isinstance(schema.get("additionalProperties"), dict):
        yield from _nested(schema["additionalProperties"], f"{path}.NAME")
    if "items" in schema:
        yield from _nested(schema["items"], path)


def _section_lines(path: str, schema: JsonSchema) -> Iterator[str]:
    heading = f"`{path}`" if path else "Top level"
    if kind := schema["properties"].get("kind", {}).get("const"):
        heading += f" with `kind: {kind}`"
    yield f"## {heading}\n"
    yield f"{_wrap(schema['description'])}\n"
    for key, value in schema["properties"].items():
        if key in schema.get("required", []):
            presence = "required"
        elif "default" in value:
            presence = f"default {json.dumps(value['default'])}".replace('"', "")
        elif "$ref" in value:
            presence = "optional"
        else:
            presence = "default []" if value["type"] == "array" else "default {}"
        yield _wrap(f"- `{key}` ({_type(value)}; {presence}): {value['description']}", indent="  ")


def _wrap(text: str, indent: str = "") -> str:
    paragraphs = text.split("\n\n")
    filled = (
        textwrap.fill(paragraph, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        for paragraph in paragraphs
    )
    return "\n\n".join(filled)


def _type(schema: JsonSchema) -> str:
    """Return a JSON schema's type in words."""
    if "$ref" in schema:
        return "duration" if schema["$ref"].endswith("/Duration") else "section"
    if "anyOf" in schema:
        return " or ".join(_type(alternative) for alternative in schema["anyOf"])
    if "oneOf" in schema:
        return "section"
    if "const" in schema or "enum" in schema:
        return " | ".join(json.dumps(value).strip('"') for value in schema.get("enum", [schema.get("const")]))
    match schema.get("type"):
        case "array" if "prefixItems" in schema:
            return f"[{', '.join(_type(item) for item in schema['prefixItems'])}]"
        case "array":
            return f"list of {_type(schema['items'])}"
        case "object" if isinstance(schema["additionalProperties"], dict):
            return f"NAME: {_type(schema['additionalProperties'])}"
        case "object":
            return "mapping"
        case "boolean":
            return "true | false"
    bounds = []
    for keyword, sign in {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}.items():
        if keyword in schema:
            bounds.append(f"{sign} {schema[keyword]}")
    return f"{schema['type']} {' and '.join(bounds)}".rstrip()


if __name__ == "__main__":
    print(config_reference(), end="")
