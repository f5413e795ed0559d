"""Paths that mean the same to every worker: those of a Ray cluster stand in other folders than the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, PlainValidator

from smpo_common.store_path import AnyPath

AbsolutePath = Annotated[Path, AfterValidator(Path.absolute)]


def _absolute(path: AnyPath) -> AnyPath:
    return path.absolute()


AbsolutePathOrUrl = Annotated[AnyPath, PlainValidator(_absolute)]


def absolute_model(model: str) -> str:
    """A hub id as it is, a folder with its absolute path."""
    return str(Path(model).absolute()) if Path(model).exists() else model


HubIdOrFolder = Annotated[str, AfterValidator(absolute_model)]
