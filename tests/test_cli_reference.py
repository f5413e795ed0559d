"""The reference of all flags is what the commands say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"


def test_the_page_is_up_to_date(tmp_path: Path) -> None:
    generator = tmp_path / "generate_cli.py"
    generator.write_text((REFERENCE / "generate_cli.py").read_text())
    page = tmp_path / "cli.md"

    def check() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, generator, "--check"], capture_output=True, text=True, check=False)

    page.write_text((REFERENCE / "cli.md").read_text())
    assert check().returncode == 0, "run `make docs`"
    page.write_text(page.read_text().replace("--max-steps", "--steps"))
    failed = check()
    assert failed.returncode == 1
    assert str(page) in failed.stderr
