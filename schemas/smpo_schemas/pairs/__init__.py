"""Read preference pairs, the pipeline's input, and normalise them row by row."""

from smpo_schemas.pairs.columns import PICK_A_PIC, PairColumns, resolve_columns
from smpo_schemas.pairs.listing import (
    PAIR_SUFFIXES,
    PairFile,
    columns_of,
    find_pair_files,
    list_pair_files,
    slice_files,
)
from smpo_schemas.pairs.normalising import MAX_TEXT, Pair, PairRejectedError, image_id, normalise
from smpo_schemas.pairs.reading import RowRange, column_names, read_prompts, read_rows

__all__ = [
    "MAX_TEXT",
    "PAIR_SUFFIXES",
    "PICK_A_PIC",
    "Pair",
    "PairColumns",
    "PairFile",
    "PairRejectedError",
    "RowRange",
    "column_names",
    "columns_of",
    "find_pair_files",
    "image_id",
    "list_pair_files",
    "normalise",
    "read_prompts",
    "read_rows",
    "resolve_columns",
    "slice_files",
]
