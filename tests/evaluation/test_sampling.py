"""An evaluation's images: units, GenEval's folders, prompts that get none. On Ray: tests/jobs/generate."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from smpo_common.errors import UserError
from smpo_pipeline.evaluation.picture_files import PictureFiles
from smpo_pipeline.generation.generator import Generator, Sampled, Wanted
from smpo_pipeline.generation.suites import PromptSource
from smpo_pipeline.jobs.evaluate.sampling import prompts_per_unit, sample_model
from tests.evaluation.stubs import EvaluationMaker
from tests.generation.test_suites import GENEVAL, write_geneval


@pytest.mark.parametrize(
    ("prompts", "images", "batch", "actors", "expected"),
    [
        (64, 8, 64, 1, 32),  # 256 images in memory
        (500, 1, 8, 8, 16),  # 4 units for each of 8 GPUs, of two batches
        (500, 4, 8, 1, 64),
        (10, 3, 4, 1, 8),  # 4 prompts are whole batches
        (3, 1, 8, 8, 8),  # one batch at least
        (3, 1000, 8, 1, 1),
    ],
)
def test_units_are_whole_batches_enough_for_all_actors(
    prompts: int, images: int, batch: int, actors: int, expected: int
) -> None:
    assert prompts_per_unit(prompts, images, batch, actors) == expected


def read_as_genevals_scorer(folder: Path) -> dict[str, tuple[dict[str, Any], list[Path]]]:
    """Read metadata and images by prompt, as github.com/djghosh13/geneval does in evaluation/evaluate_images.py."""
    found = {}
    for inside in folder.iterdir():
        if inside.is_dir() and inside.name.isdigit():
            metadata = json.loads((inside / "metadata.jsonl").read_text())
            images = [path for path in (inside / "samples").iterdir() if re.match(r"\d+\.png", path.name)]
            found[metadata["prompt"]] = metadata, sorted(images)
    return found


def test_genevals_scorer_finds_its_metadata_and_images(plan_of: EvaluationMaker, tmp_path: Path) -> None:
    write_geneval(tmp_path)
    prompts = PromptSource.parse(f"geneval={tmp_path}")
    evaluation = plan_of(prompts=prompts, images_per_prompt=2)
    assert evaluation.settings.categories == ["single_object", "position", "counting"]
    model, folder = evaluation.models[0], evaluation.folder("base")
    sample_model(evaluation, model, "cpu")
    found = read_as_genevals_scorer(folder)
    # As they were: a key that an object lacks must not appear in it.
    assert [found[row["prompt"]][0] for row in GENEVAL] == GENEVAL
    images = [path for row in GENEVAL for path in found[row["prompt"]][1]]
    assert [Image.open(path).size for path in images] == [(32, 32)] * 6
    # Fewer prompts: nothing is left of the others.
    sample_model(plan_of(prompts=prompts, images_per_prompt=2, limit=1), model, "cpu")
    assert list(read_as_genevals_scorer(folder)) == [GENEVAL[0]["prompt"]]
    (tmp_path / "evaluation_metadata.jsonl").write_text('{"prompt": "a cat"}')
    with pytest.raises(UserError, match="'a cat' lacks tag or include"):
        plan_of(prompts=prompts)
    (tmp_path / "geneval.txt").write_text("a cat")
    with pytest.raises(UserError, match="its scorer needs its JSON lines"):
        plan_of(prompts=PromptSource.parse(f"geneval={tmp_path / 'geneval.txt'}"))


@pytest.mark.parametrize("fault", ["fails", "nan"])
def test_a_prompt_without_images_is_named(
    plan_of: EvaluationMaker, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    inner = Generator.sample

    def sample(self: Generator, wanted: Sequence[Wanted], *more: Any) -> list[Sampled]:
        bad = [place for place, item in enumerate(wanted) if item == ("a dog", 1)]
        if bad and fault == "fails":
            raise RuntimeError("broken")
        images = inner(self, wanted, *more)
        for place in bad:
            images[place] = replace(images[place], latents_Chw=torch.full((4, 8, 8), torch.nan))
        return images

    monkeypatch.setattr(Generator, "sample", sample)
    evaluation = plan_of()
    reason = {"fails": "fails alone: RuntimeError: broken", "nan": "not finite: latents of image 1"}[fault]
    with pytest.raises(UserError, match=f"--model base=.*: 1 of 3 prompts get no images; the first: 'a dog': {reason}"):
        sample_model(evaluation, evaluation.models[0], "cpu")
    assert [evaluation.file("base", number, 0).is_file() for number in range(3)] == [True, False, True]


def test_a_worker_that_outlives_its_evaluation_writes_nothing(tmp_path: Path) -> None:
    files = PictureFiles(tmp_path, nested=False)
    files.claim({"origin": "old"}, None)
    files.require({"origin": "old"})
    files.claim({"origin": "new"}, None)
    with pytest.raises(UserError, match="stopped: another evaluation was started"):
        files.require({"origin": "old"})
