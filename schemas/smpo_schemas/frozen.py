"""The base class of records that are written to JSON files and read back."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from smpo_common.files import Count, FileName


class FrozenModel(BaseModel):
    """Immutable; unknown fields, NaN and infinity are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class StoredFile(FrozenModel):
    """A file beside the record that lists it.

    Attributes:
        name: file name.
        bytes: size of the file.
        sha256: hash of the file.
    """

    name: FileName
    bytes: Count
    sha256: str
