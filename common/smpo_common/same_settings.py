"""Whether a run belongs into an output that is already there: their settings must be the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from smpo_common.errors import UserError

_LONGEST = 100
"""Characters of both values that are shown; of longer ones only the name is."""


def require_same_settings(out: object, state: str, there: Any, here: Mapping[str, Any]) -> None:  # noqa: ANN401  (JSON)
    """Refuse to continue an output that was made with other settings.

    Args:
        out: names the output.
        state: what it holds, for example ``a finished run``.
        there: its settings, as they were read from a file.
        here: the settings of this run, JSON values.

    Raises:
        UserError: they differ; the error names each difference.
    """
    changed = "; ".join(_differences(there, here))
    if changed:
        raise UserError(
            f"{out} holds {state} with other settings ({changed}); choose another --out, or --overwrite to replace it"
        )


def _differences(there: Any, here: Mapping[str, Any], prefix: str = "") -> Iterator[str]:  # noqa: ANN401  (JSON)
    if not isinstance(there, Mapping):
        yield f"{prefix or 'its record '}is malformed"
        return
    for name in dict.fromkeys((*here, *there)):
        old, new = there.get(name), here.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            shown = f": {old} there, {new} here" if len(f"{old}{new}") <= _LONGEST else ""
            yield f"{prefix}{name}{shown}"
