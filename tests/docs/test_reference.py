"""The generated reference pages are what the code says."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.forking import forking_python

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


@pytest.mark.parametrize(("name", "said", "otherwise"), [
    ("cli", "--max-steps", "--steps"),
    ("formats", "rewards/margins", "rewards/margin"),
])  # fmt: skip
def test_the_page_is_up_to_date(name: str, said: str, otherwise: str, tmp_path: Path) -> None:
    folder = shutil.copytree(REFERENCE, tmp_path / "reference")
    page = folder / f"{name}.md"

    def check() -> subprocess.CompletedProcess[str]:
        command = [forking_python(), folder / f"generate_{name}.py", "--check"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert check().returncode == 0, "run `make docs`"
    page.write_text(page.read_text().replace(said, otherwise))
    failed = check()
    assert failed.returncode == 1
    assert str(page) in failed.stderr
