"""Refuse to continue an existing output with other settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from smpo_common.errors import UserError

_MAX_CHARACTERS = 100
"""If both values together are longer, only the setting's name is shown."""


def require_same_settings(out: object, state: str, stored: Any, current: Mapping[str, Any]) -> None:  # noqa: ANN401  (JSON)
    """Raise an error that names each difference between an output's settings and this run's.

    Args:
        out: names the output.
        state: its state, for example ``a finished run``.
        stored: the output's settings, as read from a file.
        current: this run's settings, JSON values.

    Raises:
        UserError: they differ.
    """
    changed = "; ".join(_differences(stored, current))
    if changed:
        raise UserError(
            f"{out} holds {state} with other settings ({changed}); choose another --out, or replace it with --overwrite"
        )


def _differences(stored: Any, current: Mapping[str, Any], prefix: str = "") -> Iterator[str]:  # noqa: ANN401  (JSON)
    if not isinstance(stored, Mapping):
        yield f"{prefix or 'its record '}is malformed"
        return
    for name in dict.fromkeys((*current, *stored)):
        old, new = stored.get(name), current.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            shown = f": {old} there, {new} here" if len(f"{old}{new}") <= _MAX_CHARACTERS else ""
            yield f"{prefix}{name}{shown}"
