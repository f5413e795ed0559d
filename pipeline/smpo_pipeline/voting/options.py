"""The flags of ``smpo-pipeline vote``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from smpo_common.options import Flag, Options
from smpo_pipeline.options import FILE, ColumnOptions, OutFile, Pairs


class VoteOptions(Options):
    """The flags of ``vote``."""

    pairs: Pairs
    out: Annotated[OutFile, FILE]
    """Parquet file of the votes, one row per pair and annotator. An existing one is continued."""
    columns: ColumnOptions = ColumnOptions()
    limit: Annotated[int, Field(ge=1)] = 1000
    """Vote on the first N pairs."""
    votes_per_pair: Annotated[int | None, Field(ge=1)] = None
    """Show a pair to no further annotator once it has N votes. Default: every annotator votes on every pair."""
    host: Annotated[str, Flag(metavar="ADDRESS")] = "127.0.0.1"
    """Address to listen on. 0.0.0.0 lets everyone in the network vote; there is no password."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0: a free one."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the side on which an annotator sees an image."""
