"""A user's own objective: named as MODULE:CLASS, or offered by a package."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from smpo_common.errors import UserError
from smpo_trainer.objectives import code_fingerprint, find_objective, objectives
from tests.command import run_here

OWN = """
from smpo_trainer.objectives.base import LabelObjective, Objective


class Plain(LabelObjective):
    name = "plain"
    summary = "the margin itself"

    def loss(self, batch):
        return -self.preferred(batch).sign() * self.margin(batch)


class Taken(Plain):
    name = "smpo"


class Half(Objective):
    name = "half"
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to start commands in, from which modules are imported; both forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    (tmp_path / "own.py").write_text(OWN)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


def test_by_its_place(here: Path) -> None:
    built_in = objectives()
    assert find_objective("own:Plain").name == "plain"
    assert objectives() == built_in  # what is imported from elsewhere is not taken for one of this program


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:Plain", "nowhere cannot be imported: No module named 'nowhere'"),
        ("./own.py:Plain", "'./own.py' is not a module name"),
        ("own:Missing", "own.py has no 'Missing'"),
        ("sys:path", "is not a subclass of smpo_trainer.objectives.Objective"),
        ("own:Taken", "a built-in objective has the name 'smpo'"),
        ("own:Half", "the class does not define summary, uses_rewards, needs, loss, preferred, usable"),
        ("smop", "known: capo, dmpo, dpo, ipo, linear-dpo, mapo, npo, selfnpo, sft, smpo, or your own as MODULE:CLASS"),
    ],
)
def test_what_cannot_be_used_is_one_line(here: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        find_objective(name)
    assert str(raised.value).startswith(f"--objective {name}")
    assert "\n" not in str(raised.value)


def test_offered_by_an_installed_package(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As pip leaves it: metadata with entry points."""
    info = here / "offered-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offered\nVersion: 1.0\n")
    points = "plain = own:Plain\nother = own:Plain\nbroken = own:Nothing\n"
    (info / "entry_points.txt").write_text(f"[smpo.objectives]\n{points}")
    monkeypatch.syspath_prepend(here)
    assert find_objective("plain").summary == "the margin itself"
    with pytest.raises(UserError, match="--objective .*'plain'"):
        find_objective("other")
    listed = run_here(capfd, "smpo-train", "--list-objectives")
    assert listed.returncode == 0, listed.stderr
    assert re.search(r"^plain +the margin itself$", listed.stdout, re.MULTILINE)
    assert re.search(r"^broken +cannot be used: .*has no 'Nothing'$", listed.stdout, re.MULTILINE)
    assert "MODULE:CLASS" in listed.stdout


def test_the_fingerprint_is_that_of_the_source(here: Path) -> None:
    assert code_fingerprint(find_objective("smpo")) is None
    before = code_fingerprint(find_objective("own:Plain"))
    del sys.modules["own"]
    assert code_fingerprint(find_objective("own:Plain")) == before
    (here / "own.py").write_text(OWN.replace("the margin itself", "another"))
    del sys.modules["own"]
    assert code_fingerprint(find_objective("own:Plain")) != before
