"""Options of single objectives, and a new objective in the list."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from smpo_common.errors import UserError
from smpo_trainer.objectives import find_objective


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("smpo", {"label_smoothing": 0.1}, "--objective smpo has no such option; it has none"),
        ("dpo", {"beta": 5}, "--objective dpo has no such option; it has: label_smoothing .*; ties"),
        ("dpo", {"label_smoothing": 0.7}, "--objective-option label_smoothing=0.7: Input should be less than 0.5"),
        ("dmpo", {"label_smoothing": 0}, "--objective-option label_smoothing=0: Input should be greater than 0"),
        ("dpo", {"ties": "win"}, "--objective-option ties=win: Input should be 'drop' or 'keep'"),
        ("mapo", {"scale": "inf"}, "--objective-option scale=inf: Input should be a finite number"),
        ("mapo", {"scale": "wide"}, "--objective-option scale=wide: Input should be a valid number"),
    ],
)
def test_wrong_options_are_one_line(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        find_objective(name).Options.parse(name, {k: str(v) for k, v in options.items()}, beta=1)
    assert "\n" not in str(raised.value)


_ANOTHER = """
from typing import ClassVar

from pydantic import Field

from smpo_trainer.objectives.base import LabelObjective, ObjectiveOptions


class HingeOptions(ObjectiveOptions):
    slack: float = Field(1.0, gt=0, description="the margin that is enough; default 1")


class Hinge(LabelObjective):
    name: ClassVar[str] = "hinge"
    summary: ClassVar[str] = "a hinge"
    Options: ClassVar[type[ObjectiveOptions]] = HingeOptions

    def loss(self, batch):
        return (self.options.slack - self.preferred(batch).sign() * self.margin(batch)).clamp(min=0)
"""


@pytest.mark.slow
def test_another_objective_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "hinge.py").write_text(_ANOTHER)
    code = (
        f"import smpo_trainer.objectives as found; found.__path__.append({str(tmp_path)!r}); "
        "from smpo_trainer.cli import main; main()"
    )
    listed = subprocess.run(
        [sys.executable, "-c", code, "--list-objectives"], capture_output=True, text=True, check=True
    )
    assert "hinge  a hinge\n       slack: the margin that is enough; default 1" in listed.stdout
