"""Read preference pairs, the pipeline's input, and normalise them row by row."""

from smpo_schemas.pairs.columns import PICK_A_PIC, PairColumns, resolve_columns
from smpo_schemas.pairs.layout import FURTHER, Layout, ReadingChoices
from smpo_schemas.pairs.listing import (
    PAIR_SUFFIXES,
    PairFile,
    expanded,
    holds_pairs,
    layouts_of,
    list_pair_files,
    slice_files,
)
from smpo_schemas.pairs.normalising import MAX_TEXT, Pair, PairRejectedError, image_id, normalise
from smpo_schemas.pairs.raw_rows import RowRange
from smpo_schemas.pairs.reading import column_names, read_prompts, read_rows

__all__ = [
    "FURTHER",
    "MAX_TEXT",
    "PAIR_SUFFIXES",
    "PICK_A_PIC",
    "Layout",
    "Pair",
    "PairColumns",
    "PairFile",
    "PairRejectedError",
    "ReadingChoices",
    "RowRange",
    "column_names",
    "expanded",
    "holds_pairs",
    "image_id",
    "layouts_of",
    "list_pair_files",
    "normalise",
    "read_prompts",
    "read_rows",
    "resolve_columns",
    "slice_files",
]
