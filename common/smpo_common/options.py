"""Command-line flags from a pydantic model: a flag is declared once, as a field.

The model gives the Typer command with its help, the keys of a ``--config`` file, the resolved ``config.yaml`` and the
reference page in docs/. The command's function takes the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

import typer
import yaml
from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError
from pydantic.fields import FieldInfo

from smpo_common.commandline import CONFIG_FILE, read_config
from smpo_common.errors import UserError
from smpo_common.files import write_bytes
from smpo_common.store_path import AnyPath

AnyOptions = TypeVar("AnyOptions", bound="Options")


class Options(BaseModel):
    """The settings of a command; each field is a flag of the same name.

    The docstring below a field, or its description, is the flag's help. Bounds are checked. :class:`Flag` in the
    annotation sets further properties. A trailing underscore avoids a name that pydantic or Python uses: ``json_`` is
    the flag ``--json``. A field whose type is an :class:`Options` is a group of flags, with the group's ``title`` as
    heading in ``--help``.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    _on_command_line: frozenset[str] = PrivateAttr(default=frozenset())

    @classmethod
    def parse(cls, typed: Mapping[str, Any], on_command_line: frozenset[str] = frozenset()) -> Self:
        """Make the settings from the values of all flags.

        Args:
            typed: values by flag name, not nested in groups.
            on_command_line: names of the flags given on the command line, not in a config file.

        Raises:
            UserError: a value has the wrong type, is out of bounds or refused by a validator.
        """
        values: dict[str, Any] = {}
        for name, field in cls.model_fields.items():
            group = group_of(field)
            value = group.parse(typed, on_command_line) if group else typed[name.rstrip("_")]
            if value is not None:
                values[name] = value
        try:
            return cls.model_validate(values, context=on_command_line)
        except ValidationError as error:
            problem = error.errors()[0]
            # An error of a validator of the whole model names no field.
            flag = f"{flag_name(str(problem['loc'][0]))} {problem['input']}: " if problem["loc"] else ""
            raise UserError(f"{flag}{problem['msg']}") from error

    def model_post_init(self, context: frozenset[str] | None, /) -> None:
        """Store which flags were given on the command line; runs before model validators, which use it."""
        self._on_command_line = context or frozenset()

    def was_typed(self, name: str) -> bool:
        """Whether the flag was given on the command line, not in a config file."""
        return name in self._on_command_line

    def replace(self, **values: Any) -> Self:  # noqa: ANN401  (each flag's type is its field's)
        """Copy the settings with these values, by name of a field in any group; values are not validated.

        Raises:
            TypeError: no field has that name.
        """
        settings = self._replace_own(values)
        if values:
            raise TypeError(f"{type(self).__name__} has no field {', '.join(values)}")
        return settings

    def _replace_own(self, values: dict[str, Any]) -> Self:
        """Copy the settings with those of ``values`` that are its fields, and remove them from ``values``."""
        update: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            # A group and one of its fields may share a name (``optimizer``): ``values`` then names the field.
            if group_of(field):
                update[name] = getattr(self, name)._replace_own(values)  # noqa: SLF001  (the same class)
            elif name in values:
                update[name] = values.pop(name)
        return self.model_copy(update=update)

    def write(self, directory: AnyPath, result: AnyPath | None = None) -> None:
        """Write every flag, defaults included, as a config file that repeats this run from any working directory.

        Args:
            directory: the run's folder.
            result: the run's last file; an existing config that is not older is kept, since this run changed nothing.
        """
        target = directory / CONFIG_FILE
        if result and target.is_file() and target.stat().st_mtime_ns >= result.stat().st_mtime_ns:
            return
        write_bytes(target, self.as_config().encode())

    def as_config(self) -> str:
        """Return the text of a config file with every flag, defaults included; local paths become absolute."""
        values = self.flat_values()
        recorded = {
            name: _portable(values[name], place=flag.place)
            for name, _, _, flag in fields_of(type(self))
            if flag.recorded and values[name] is not None
        }
        return yaml.safe_dump(recorded, sort_keys=True, allow_unicode=True)

    def flat_values(self) -> dict[str, Any]:
        """Return the values by flag name, not nested in groups, as a user would type them."""
        dumped = self.model_dump()
        values: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            values |= getattr(self, name).flat_values() if group_of(field) else {name.rstrip("_"): dumped[name]}
        return values


@dataclass(frozen=True)
class Flag:
    """A flag's properties besides its field's type, default, bounds and description.

    Attributes:
        metavar: stands for the value in the help.
        typed: the type on the command line, for example ``list[str]``, if a validator converts it to the field's type;
            a :class:`pydantic.PlainSerializer` of the field converts it back for the resolved config.
        place: the value is a path, a URL or a hub id; paths become absolute in the resolved config. ``named``: the
            value is ``NAME=PATH``.
        recorded: whether the resolved config has it.
        identity: what a resumed run must share with the run in the output folder: the flag's ``value``, or what it is
            ``resolved`` to (the content of a file, a product of flags); None: the flag may change.
        positional: an argument without a name.
        hidden: accepted, but not shown in the help.
        off: the flag that turns a boolean off, for example ``--no-hflip``.
        eager: called with the context and the value before other flags are parsed.
        parser: converts the text on the command line, or the value in a config file.
    """

    metavar: str | None = None
    typed: Any = None
    place: bool | Literal["named"] = False
    recorded: bool = True
    identity: Literal["value", "resolved"] | None = None
    positional: bool = False
    hidden: bool = False
    off: str | None = None
    eager: Callable[[typer.Context, Any], Any] | None = None
    parser: Callable[[Any], Any] | None = None


Overwrite = Annotated[bool, Flag(recorded=False)]
"""Not recorded in the resolved config: repeating a run from it must not delete the run."""


def add_command(
    app: typer.Typer,
    function: Callable[[Any], None],
    *,
    heading: str | None = None,
    actions: Mapping[str, Any] | None = None,
) -> None:
    """Add a command to ``app``.

    Args:
        app: the program.
        function: takes one :class:`Options`; its docstring is the help. The section ``Examples:`` has one command per
            line and is printed below the flags.
        heading: the heading under which the program's help lists the command.
        actions: further flags by name, as Typer annotations whose callbacks do the work.
    """
    model = next(iter(get_type_hints(function).values()))

    def command(context: typer.Context, **typed: Any) -> None:  # noqa: ANN401  (each flag's type is in the signature)
        sources = {name: context.get_parameter_source(name) for name in typed}
        given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
        function(model.parse(typed, frozenset(given)))

    # Typer reads parameters from a function's signature and has no other public way to declare them.
    parameters = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    parameters += [_parameter(*declaration) for declaration in fields_of(model)]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=None)
        for name, kind in {**(actions or {}), "config": _CONFIG}.items()
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__, _, examples = inspect.cleandoc(function.__doc__ or "").partition("\n\nExamples:\n")
    # Typer joins the lines of a paragraph.
    epilog = "\n\n".join(["Examples:", *map(str.strip, examples.splitlines())]) if examples else None
    app.command(function.__name__, epilog=epilog, rich_help_panel=heading)(command)


def parse_arguments(model: type[AnyOptions], arguments: Sequence[str]) -> AnyOptions:
    """Parse arguments as the command of a model does, without running a command.

    Args:
        model: the command's settings.
        arguments: command-line arguments; a flag with several values is repeated.

    Raises:
        UserError: an argument is invalid.
    """
    app, seen = typer.Typer(add_completion=False), []

    def command(options: Any) -> None:  # noqa: ANN401  (the model below)
        seen.append(options)

    command.__annotations__["options"] = model
    add_command(app, command)
    try:
        app(list(arguments), standalone_mode=False)
    except typer.TyperException as error:
        raise UserError(error.format_message()) from error
    (options,) = seen
    return options


def fields_of(model: type[Options], group: str | None = None) -> Iterator[tuple[str, FieldInfo, str | None, Flag]]:
    """Yield name, field, group title and :class:`Flag` of each flag of a model and its groups."""
    for name, field in model.model_fields.items():
        nested = group_of(field)
        if nested:
            yield from fields_of(nested, nested.model_config.get("title"))
        else:
            flag = next((item for item in field.metadata if isinstance(item, Flag)), Flag())
            yield name.rstrip("_"), field, group, flag


def group_of(field: FieldInfo) -> type[Options] | None:
    """Return the model of a field that is a group of flags, else None."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Options) else None


def flag_name(field: str) -> str:
    """Convert ``max_steps`` to ``--max-steps``."""
    return "--" + field.rstrip("_").replace("_", "-")


_CONFIG = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file with a key for each flag (dashes as underscores); flags given here override it.",
        callback=read_config,
        is_eager=True,
        expose_value=False,
    ),
]


def _parameter(name: str, field: FieldInfo, group: str | None, flag: Flag) -> inspect.Parameter:
    """Convert a field to a parameter that Typer understands."""
    bounds: dict[str, Any] = {
        "min": next((item.ge for item in field.metadata if isinstance(item, Ge)), None),
        "max": next((item.le for item in field.metadata if isinstance(item, Le)), None),
    }
    shown: dict[str, Any] = {
        "help": " ".join((field.description or "").split()),
        "metavar": flag.metavar,
        "hidden": flag.hidden,
        "rich_help_panel": group,
    }
    kind = flag.typed or _typed_as(field.annotation)
    if kind is bool:
        shown["metavar"] = ""  # a switch takes no value; Typer would show <bool>
    if flag.positional:
        option: Any = typer.Argument(**shown)
    else:
        names = "/".join(filter(None, (flag_name(name), flag.off)))
        shown |= bounds | {"parser": flag.parser}
        option = typer.Option(names, callback=flag.eager, is_eager=flag.eager is not None, **shown)
    required = field.is_required()
    default = inspect.Parameter.empty if required else field.get_default(call_default_factory=True)
    if isinstance(default, (Sequence, Mapping)) and not isinstance(default, str):
        default = list(default) or None
    if default is None:
        kind = kind | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, option], default=default)


def _typed_as(kind: Any) -> Any:  # noqa: ANN401  (a type or a typing construct)
    """Return the type that Typer parses, from whose values pydantic makes ``kind``."""
    if get_origin(kind) in (Union, UnionType):
        kind = next(member for member in get_args(kind) if member is not NoneType)
    if get_origin(kind) in (list, tuple):
        return list[_typed_as(get_args(kind)[0])]  # type: ignore[misc]
    return kind if kind in (bool, int, float, str, Path) or get_origin(kind) is Literal else str


def _portable(value: Any, *, place: bool | str) -> Any:  # noqa: ANN401  (a command line value of any type)
    """Convert a value for YAML, with local paths made absolute."""
    if isinstance(value, (list, tuple)):
        return [_portable(item, place=place) for item in value]
    if isinstance(value, Path):
        return str(value if value.parts[:1] == ("~",) else value.absolute())
    if place and isinstance(value, str):
        name, equals, path = value.partition("=") if place == "named" else ("", "", value)
        if path and Path(path).exists():
            return f"{name}{equals}{Path(path).absolute()}"
    return value
