"""Resolve the columns of a pair file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from smpo_common.errors import UserError
from smpo_common.store_path import AnyPath


@dataclass(frozen=True)
class PairColumns:
    """Names of a file's columns; all but the prompt and the images are optional (None: the file has none).

    Image columns hold bytes, a struct with ``bytes`` or ``path`` (as the datasets library writes), or a path relative
    to the file's folder.

    If ``chosen`` and ``rejected`` name the preferred image and the other one, they replace ``image_0`` and ``image_1``,
    and ``label``, if there is one, is P(chosen preferred); see :func:`smpo_schemas.pairs.normalising.normalise`.
    """

    prompt: str = "prompt"
    image_0: str | None = "image_0"
    image_1: str | None = "image_1"
    label: str | None = None
    pair_id: str | None = None
    annotator: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    votes: str | None = None


PICK_A_PIC = PairColumns("caption", "jpg_0", "jpg_1", "label_0", "ranking_id", "user_id")
"""Pick-a-Pic v2's column names."""

_OPTIONAL = ("label", "votes", "pair_id", "annotator")
_KNOWN_OPTIONAL = PairColumns(**{name: name for name in _OPTIONAL})


def resolve_columns(names: Sequence[str], given: Mapping[str, str | None], path: AnyPath) -> PairColumns:
    """Resolve a file's columns: those named by flags, else the default names, or Pick-a-Pic's if it has those.

    Args:
        names: the file's column names.
        given: names from flags, by field of :class:`PairColumns`; None or missing: no flag was given.
        path: the file, for errors.

    Raises:
        UserError: the file lacks a column that is required or named by a flag, or has it several times.
    """
    own, of_pick_a_pic = ({each.image_0, each.image_1} <= set(names) for each in (_KNOWN_OPTIONAL, PICK_A_PIC))
    preset = PICK_A_PIC if of_pick_a_pic and not own else _KNOWN_OPTIONAL
    if given.get("chosen") or given.get("rejected"):
        preset = replace(preset, image_0=None, image_1=None, label=None)
    chosen: dict[str, str | None] = {}
    for field in fields(PairColumns):
        flagged = given.get(field.name)
        name = flagged or getattr(preset, field.name)
        if name is not None and not has_column(names, name):
            if flagged or field.name not in _OPTIONAL:
                raise _missing(path, names, field.name, name)
            name = None
        refuse_repeated(names, name, path)
        chosen[field.name] = name
    return PairColumns(**chosen)  # type: ignore[arg-type]


def refuse_repeated(names: Sequence[str], name: str | None, path: AnyPath) -> None:
    """Refuse a file with several columns of one name."""
    if list(names).count(str(name)) > 1:
        raise UserError(f"{path} has several columns {name!r}; rename all but one of them")


def has_column(names: Collection[str], name: str) -> bool:
    """Whether there is a column of that name or, for ``a.b``, a column ``a``, which may be a struct."""
    return name in names or ("." in name and name.partition(".")[0] in names)


def _missing(path: AnyPath, names: Sequence[str], field: str, name: str) -> UserError:
    """Make the error about a missing column."""
    hint = f"name it with --{field.replace('_', '-')}-column"
    if field.startswith("image_"):
        hint += ", or the preferred image with --chosen-column and the other with --rejected-column"
    return UserError(f"{path} has no column {name!r} (it has: {', '.join(names)}); {hint}")
