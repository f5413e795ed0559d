"""The page of layouts is the code's: every layout, its data sets and what it is recognised by."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from smpo_schemas.layouts import layouts
from smpo_schemas.pairs import FURTHER

PAGE = (Path(__file__).parents[2] / "docs/reference/layouts.md").read_text(encoding="utf-8")
CELLS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| `")]
ROWS = {first.strip("`"): rest for first, *rest in CELLS}


def test_every_layout_has_a_row():
    assert set(ROWS) == set(layouts())


@pytest.mark.parametrize("name", sorted(layouts()))
def test_a_row_says_what_the_code_does(name):
    kind = layouts()[name]
    data_sets, recognised, *rest = ROWS[name]
    assert data_sets == kind.data_sets
    assert re.findall(r"`(\S+?)`", recognised) == list(kind.required)
    for choice, flag in {"axis": "--axis", "min_confidence": "--min-confidence"}.items():
        assert (choice in kind.uses) == (flag in "".join(rest))


def test_further_columns_are_named():
    assert set(re.findall(r"`(\w+)`", PAGE.split("**Further columns.**")[1].split("are columns")[0])) == set(FURTHER)
