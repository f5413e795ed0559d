"""Write ``cli.md``, the reference of all flags, from the commands themselves.

Run ``python docs/reference/generate_cli.py`` after a change of a flag; with ``--check`` it fails if the page is old.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer
from generated_page import table, write_or_check
from typer.models import ArgumentInfo, OptionInfo

from smpo_pipeline.cli import app as pipeline
from smpo_trainer.cli import app as trainer

PAGE = Path(__file__).with_name("cli.md")
PROGRAMS = {"smpo-train": trainer, "smpo-pipeline": pipeline}

_HEAD = """# Flags

Every flag of both programs, as `--help` shows them, but for shell completion. In a `--config` file a flag's key is its
name with underscores for dashes. A flag whose value is followed by `...` takes several values.

Made by `python docs/reference/generate_cli.py`. Do not edit by hand.
"""


def main() -> None:
    """Write the page, or compare it with what would be written."""
    write_or_check(PAGE, [_HEAD, *(line for name, app in PROGRAMS.items() for line in _program(name, app))])


def _program(name: str, app: typer.Typer) -> Iterator[str]:
    for command in app.registered_commands:
        function: Any = command.callback
        several = len(app.registered_commands) > 1
        yield f"## {name} {command.name or function.__name__}\n" if several else f"## {name}\n"
        yield f"{inspect.cleandoc(function.__doc__ or '')}\n"
        _, *examples = (command.epilog or "").split("\n\n")
        yield from [*(f"    {example}" for example in examples), ""]
        groups: dict[str, list[list[str]]] = {}
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            kind, *declared = get_args(parameter.annotation) or (parameter.annotation,)
            shown = [each for each in declared if isinstance(each, (OptionInfo, ArgumentInfo)) and not each.hidden]
            for info in shown:
                row = _row(parameter.name, kind, info, parameter.default)
                groups.setdefault(info.rich_help_panel or "", []).append(row)
        # As in the help, flags without a group come first.
        for group in sorted(groups, key=bool):
            yield from [f"### {group}\n"] if group else []
            yield from table(("flag", "value", "default", "meaning"), groups[group])


def _row(name: str, kind: Any, info: OptionInfo | ArgumentInfo, default: Any) -> list[str]:  # noqa: ANN401
    # In an annotation Typer keeps a flag's name, and its opposite's behind a slash, as the default.
    declared = info.default if isinstance(info.default, str) else f"--{name.replace('_', '-')}"
    names = name.upper() if isinstance(info, ArgumentInfo) else declared.replace("/", "`, `")
    return [f"`{names}`", _value(kind, info), _default(default), " ".join((info.help or "").split())]


def _value(kind: Any, info: OptionInfo | ArgumentInfo) -> str:  # noqa: ANN401
    if get_origin(kind) in (Union, UnionType):
        kind = next(each for each in get_args(kind) if each is not NoneType)
    several = get_origin(kind) is list
    if several:
        (kind,) = get_args(kind)
    if kind is bool:
        return ""
    choices = get_args(kind) if get_origin(kind) is Literal else (kind.__name__.lower(),)
    bounds = [("≥", info.min), ("≤", info.max)]
    limits = [f"{sign} {bound:.12g}" for sign, bound in bounds if bound is not None]
    return ", ".join([f"`{info.metavar or '|'.join(choices)}`{' ...' if several else ''}", *limits])


def _default(default: Any) -> str:  # noqa: ANN401
    if default is inspect.Parameter.empty:
        return "required"
    if default is None or default is False:
        return ""
    if default is True:
        return "on"
    return " ".join(f"`{each}`" for each in (default if isinstance(default, (list, tuple)) else [default]))


if __name__ == "__main__":
    main()
