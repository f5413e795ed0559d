"""The fields of a class, with their types and the descriptions in its docstring, as a reference shows them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel

_ATTRIBUTES = re.compile(r"^Attributes:\n(.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL)
_ENTRY = re.compile(r"^    (\w+(?:, \w+)*): ", re.MULTILINE)
_WORDS = {str: "text", int: "integer", float: "number", bool: "true or false", NoneType: "null", Any: "any"}


@dataclass(frozen=True)
class Field:
    """One field: its name, its type as text, its meaning, and the model that describes its content, if there is one."""

    name: str
    type: str
    meaning: str
    model: type | None


def descriptions(kind: type) -> dict[str, str]:
    """The descriptions in the section "Attributes:" of the docstrings of a class and its bases, by attribute."""
    found: dict[str, str] = {}
    for each in (each for each in reversed(kind.__mro__) if each is not BaseModel):
        section = _ATTRIBUTES.search(inspect.cleandoc(each.__doc__ or ""))
        names_and_texts = _ENTRY.split(section.group(1))[1:] if section else []
        for names, text in zip(names_and_texts[::2], names_and_texts[1::2], strict=True):
            found |= dict.fromkeys(names.split(", "), _markdown(text))
    return found


def described_fields(kind: type) -> Iterator[Field]:
    """All fields of a pydantic model or a TypedDict, in order.

    Raises:
        SystemExit: a field has no description.
    """
    described = descriptions(kind)
    if issubclass(kind, BaseModel):
        annotations = {name: info.annotation for name, info in kind.model_fields.items()}
        described |= {name: info.description for name, info in kind.model_fields.items() if info.description}
    else:
        annotations = get_type_hints(kind)
    for name, annotation in annotations.items():
        if name not in described:
            raise SystemExit(f"{kind.__module__}.{kind.__qualname__} does not describe {name} under 'Attributes:'")
        yield Field(name, type_text(annotation), described[name], _model_of(annotation))


def type_text(annotation: Any) -> str:  # noqa: ANN401
    """A type as a reader of JSON sees it."""
    form = _FORMS.get(get_origin(annotation))
    if form:
        return form(get_args(annotation))
    return _WORDS.get(annotation) or f"[{annotation.__name__}](#{annotation.__name__.lower()})"


def _any_of(kinds: tuple[Any, ...]) -> str:
    return " or ".join(map(type_text, kinds))


def _tuple(kinds: tuple[Any, ...]) -> str:
    return f"list of {type_text(kinds[0])}" if ... in kinds else f"[{', '.join(map(type_text, kinds))}]"


_FORMS: dict[Any, Callable[[tuple[Any, ...]], str]] = {
    Annotated: lambda kinds: type_text(kinds[0]),
    Literal: lambda values: ", ".join(f"`{value}`" for value in values),
    Union: _any_of,
    UnionType: _any_of,
    list: lambda kinds: f"list of {type_text(kinds[0])}",
    tuple: _tuple,
    dict: lambda kinds: f"object: name to {type_text(kinds[1])}",
}
"""How a type with arguments is written, by its origin."""


def _model_of(annotation: Any) -> type | None:  # noqa: ANN401
    """The model in an annotation, however deep it is in lists and objects."""
    if inspect.isclass(annotation) and (issubclass(annotation, BaseModel) or hasattr(annotation, "__total__")):
        return annotation
    return next((found for each in get_args(annotation) if (found := _model_of(each))), None)


def _markdown(text: str) -> str:
    """A docstring's text as Markdown in one line, without its full stop, and with JSON's word for None."""
    text = re.sub(r"(?:; see)?\s+:\w+:`[^`]*`|\s+\(:\w+:`[^`]*`\)", "", text)
    text = re.sub(r"\bNone\b", "null", text.replace("``", "`"))
    return " ".join(text.split()).removesuffix(".")
