"""Links of the pages outside docs/, which the build of the site does not check."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.snippets import ROOT

PAGES = sorted(ROOT.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = [*re.findall(r"\]\(([^)#\s]+)[^)]*\)", text), *re.findall(r'(?:src|href)="([^"#]+)', text)]
    local = [target for target in targets if not re.match(r"\w+:", target)]
    assert local or page.name != "README.md"
    assert not [target for target in local if not (page.parent / target).exists()]
