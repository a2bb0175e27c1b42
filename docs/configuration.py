"""Write docs/configuration.md: every option with its type, default and meaning, and what the presets change.

    python -m docs.configuration

The options are the fields of `agent.runs.config.Config` and of the dataclasses in it. The meaning of a field is the
string below it in the source.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from unittest import mock

from agent.runs.config import Config
from agent.runs.presets import PRESETS, preset
from agent.settings import option, to_dict, value_of

PAGE = Path(__file__).resolve().parent / "configuration.md"

INTRODUCTION = """\
# Configuration

This page is generated from the source by `python -m docs.configuration`; do not edit it.

Every option of `python train_agent.py`. The value of an option is looked up in this order: the command line, the file
of `--config FILE` or the run of `--resume RUN`, the preset, the default. `config.yaml` in a run's folder holds all of
them under the same names, with `_` instead of `-` and one level of indentation for each dot.

- Whole numbers may be written `100000`, `100_000`, `1e5` or `100k`.
- Switches are written `--name` and `--no-name`, and the `no-` goes before the last part: `--no-video`.
- A misspelt option is refused, with a suggestion. `python train_agent.py --help` prints the same list.
"""

# ---------------------------------------------------------------------- the dataclasses


def meanings(kind: type[Any]) -> dict[str, str]:
    """{field: the string below it in the source of the dataclass}, on one line each."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            texts[field.target.id] = " ".join(str(below.value.value).split())
    return texts


def groups(kind: type[Any], prefix: str = "") -> Iterator[tuple[type[Any], str]]:
    """A dataclass and all those inside of it, each with the dotted prefix of its fields."""
    yield kind, prefix
    hints = get_type_hints(kind)
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            yield from groups(hints[field.name], f"{prefix}{field.name}.")


# ---------------------------------------------------------------------- text


def type_text(kind: Any) -> str:
    """A type as people read it: the values of a literal, and an optional number as a number."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(part) for part in inside if part is not type(None))
    if origin is tuple:
        return f"several {type_text(inside[0])}"
    return {bool: "switch", str: "text"}.get(kind, kind.__name__)


def value_text(value: Any) -> str:
    """A value as it is typed on the command line."""
    if value is None or value == ():
        return "not set"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple | list):
        return "`" + " ".join(map(str, value)) + "`"
    if isinstance(value, int) and value >= 10_000:
        return f"`{value:_}`"
    return f"`{value}`"


def spelling(kind: type[Any], name: str, prefix: str) -> str:
    """How a field is written on the command line, with its short form if it has one."""
    annotated = get_type_hints(kind, include_extras=True)[name]
    extras = getattr(annotated, "__metadata__", ())
    if name == "task" and not prefix:
        return "`TASK`, the first word"
    short = [alias for extra in extras for alias in getattr(extra, "aliases", None) or ()]
    return ", ".join(f"`{word}`" for word in [*short, option(prefix + name)])


def table(kind: type[Any], prefix: str) -> Iterator[str]:
    """The rows of one dataclass; fields that are dataclasses themselves have tables of their own."""
    hints, texts, defaults = get_type_hints(kind), meanings(kind), kind()
    yield "| option | type | default | meaning |"
    yield "|---|---|---|---|"
    for field in fields(kind):
        if not is_dataclass(hints[field.name]):
            cells = spelling(kind, field.name, prefix), type_text(hints[field.name])
            cells += value_text(getattr(defaults, field.name)), texts.get(field.name, "").replace("|", "\\|")
            yield "| " + " | ".join(cells) + " |"


def preset_table() -> Iterator[str]:
    """The options whose value differs between presets. A value that follows the number of cores is given as a range."""
    trees = {}
    for count in (1, 1024):
        with mock.patch("agent.runs.presets.cores", lambda count=count: count):
            trees[count] = {name: to_dict(preset(name)) for name in PRESETS}
    yield "| option | " + " | ".join(f"`{name}`" for name in PRESETS) + " |"
    yield "|---" * (len(PRESETS) + 1) + "|"
    for kind, prefix in groups(Config):
        hints = get_type_hints(kind)
        for name in (prefix + field.name for field in fields(kind) if not is_dataclass(hints[field.name])):
            few, many = ([value_text(value_of(trees[count][each], name)) for each in PRESETS] for count in trees)
            if name != "preset" and len(set(few + many)) > 1:
                pairs = zip(few, many, strict=True)
                ranges = [low if low == high else f"{low} to {high}, one per core" for low, high in pairs]
                yield f"| `{option(name)}` | " + " | ".join(ranges) + " |"


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "## What the presets change\n", "\n".join(preset_table()) + "\n"]
    for kind, prefix in groups(Config):
        title = f"`--{prefix.replace('_', '-')}*`" if prefix else "Run"
        about = (inspect.getdoc(kind) or "").partition("\n")[0]
        parts += [f"## {title}\n", f"{about}\n" if prefix else "", "\n".join(table(kind, prefix)) + "\n"]
    return "\n".join(part for part in parts if part)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.name}: {len(list(groups(Config)))} tables")
