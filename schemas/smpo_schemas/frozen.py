"""The base of models that are written to JSON files and read back."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class FrozenModel(BaseModel):
    """Values that do not change; a field that the model does not have is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
