"""Which column of a file holds what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from smpo_common.errors import UserError
from smpo_common.store_path import AnyPath


@dataclass(frozen=True)
class PairColumns:
    """Which input column holds what; ``pair_id``, ``label`` and ``annotator`` are optional (None: not there).

    A row whose ``pair_id`` is null, NaN or blank has none.

    Image columns hold bytes, a struct with ``bytes``/``path`` (as the datasets library writes), or a path that is
    relative to the folder of the file it stands in.

    Where ``chosen`` and ``rejected`` name the preferred image and the other one, they take the place of ``image_0``,
    ``image_1`` and ``label``; see :func:`smpo_schemas.pairs.normalising.normalise`.
    """

    prompt: str = "prompt"
    image_0: str | None = "image_0"
    image_1: str | None = "image_1"
    label: str | None = None
    pair_id: str | None = None
    annotator: str | None = None
    chosen: str | None = None
    rejected: str | None = None


PICK_A_PIC = PairColumns("caption", "jpg_0", "jpg_1", "label_0", "ranking_id", "user_id")
"""Pick-a-Pic v2's own column names."""

_KNOWN_OPTIONAL = PairColumns(label="label", pair_id="pair_id", annotator="annotator")


def resolve_columns(names: Sequence[str], given: Mapping[str, str | None], path: AnyPath) -> PairColumns:
    """Decide which columns of a file are used: Pick-a-Pic's where they are there, else the normalised names.

    Args:
        names: the file's column names.
        given: names chosen by flags, by field of :class:`PairColumns`; None or missing means not chosen.
        path: the file, for the error.

    Raises:
        UserError: a column that is needed, or that a flag names, is not in the file.
    """
    preset = PICK_A_PIC if {PICK_A_PIC.image_0, PICK_A_PIC.image_1} <= set(names) else _KNOWN_OPTIONAL
    if given.get("chosen") or given.get("rejected"):
        preset = replace(preset, image_0=None, image_1=None, label=None)
    chosen: dict[str, str | None] = {}
    for field in fields(PairColumns):
        flagged = given.get(field.name)
        name = flagged or getattr(preset, field.name)
        if name is not None and name not in names:
            if flagged or field.name not in ("label", "pair_id", "annotator"):
                raise _missing(path, names, field.name, name)
            name = None
        if list(names).count(str(name)) > 1:
            raise UserError(f"{path} has several columns {name!r}: which one is meant?")
        chosen[field.name] = name
    return PairColumns(**chosen)  # type: ignore[arg-type]


def _missing(path: AnyPath, names: Sequence[str], field: str, name: str) -> UserError:
    """The error of a column that is not in the file."""
    hint = f"name it with --{field.replace('_', '-')}-column"
    if field.startswith("image_"):
        hint += ", or the preferred image with --chosen-column and the other with --rejected-column"
    return UserError(f"{path} has no column {name!r} (it has: {', '.join(names)}); {hint}")
