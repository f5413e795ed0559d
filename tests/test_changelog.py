"""CHANGELOG.md and CITATION.cff name the version of the distribution; CHANGELOG.md those of the file formats."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

from smpo_pipeline.evaluation.results import RESULTS_VERSION
from smpo_pipeline.rounds.record import ROUNDS_VERSION
from smpo_schemas.generation.candidates import CANDIDATES_VERSION
from smpo_schemas.generation.selection import SELECTION_VERSION
from smpo_schemas.manifest import MANIFEST_VERSION
from smpo_schemas.scoring.calibration import CALIBRATION_VERSION
from smpo_schemas.scoring.refresh import REFRESH_VERSION
from smpo_schemas.scoring.scores import SCORES_VERSION
from smpo_schemas.scoring.weights import WEIGHTS_VERSION
from smpo_trainer.output.run_folder import TRAINING_VERSION

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_newest_entry_is_the_projects_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert re.findall(r"^## (\S+)", TEXT, re.MULTILINE)[0] == project["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])


def test_the_formats_are_those_that_are_written() -> None:
    table = {name: int(number) for name, number in re.findall(r"^\| (.+?) \| (\d+) \|$", TEXT, re.MULTILINE)}
    assert table == {
        "`manifest.json` of shards": MANIFEST_VERSION,
        "`scores.json`": SCORES_VERSION,
        "`candidates.json`": CANDIDATES_VERSION,
        "`selection.json`": SELECTION_VERSION,
        "`training.json`": TRAINING_VERSION,
        "`results.json`": RESULTS_VERSION,
        "`rounds.json`": ROUNDS_VERSION,
        "calibration": CALIBRATION_VERSION,
        "weights": WEIGHTS_VERSION,
        "`refresh.json`": REFRESH_VERSION,
    }
