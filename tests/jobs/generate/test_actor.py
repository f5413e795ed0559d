"""The actor of ``generate`` without Ray: what fails, and what is rejected for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from diffusers import PNDMScheduler
from PIL import Image

from smpo_common.errors import UserError
from smpo_pipeline.evaluation.evaluation import prepare_evaluation
from smpo_pipeline.evaluation.options import EvaluateJobOptions, EvaluateOptions, EvaluateSamplingOptions
from smpo_pipeline.generation.generator import Generator, Sampled, Wanted
from smpo_pipeline.jobs.cells import byte_views, cell_values
from smpo_pipeline.jobs.evaluate.sampling import sample_model
from smpo_pipeline.jobs.generate import actor as actor_module
from smpo_pipeline.jobs.generate.actor import GenerateActor, SamplingWork
from smpo_pipeline.jobs.generate.models import choose_settings, content_of, load
from smpo_pipeline.jobs.generate.options import CandidateOptions, GenerateJobOptions, GenerateOptions
from smpo_pipeline.jobs.generate.parts import Prompts
from smpo_pipeline.jobs.record.batch_sizes import pop_batch_sizes
from smpo_pipeline.jobs.record.run_record import Run
from smpo_pipeline.jobs.record.work_log import WorkLog
from smpo_schemas.generation.candidates import CANDIDATES_FILE
from tests.tiny.stable_diffusion import make_tiny_model, put_scheduler

PROMPTS = ["a cat", "a dog", "cat and dog"]
UNIT = pa.table({"unit": [0]})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_model(tmp_path_factory.mktemp("actor") / "model")
    return put_scheduler(folder, PNDMScheduler, skip_prk_steps=True)


@pytest.fixture
def make(model: Path, tmp_path: Path) -> Callable[..., GenerateActor]:
    def actor(log: WorkLog | None = None, batch_size: int | None = 4) -> GenerateActor:
        (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
        options = GenerateOptions(
            model=str(model),
            prompts=tmp_path / "prompts.txt",
            out=tmp_path / "out",
            sampling=CandidateOptions(images_per_prompt=2, steps=2),
            running=GenerateJobOptions(device="cpu", batch_size=batch_size),
        )
        _, settings = choose_settings(options)
        table = pa.table({"row": range(3), "prompt": PROMPTS, "reason": pa.nulls(3, pa.string())})
        prompts = Prompts(options.prompts, 3, (table, pa.table({})))
        run = Run(options.out, CANDIDATES_FILE, {})
        work = SamplingWork(options.loading, settings, "cpu", batch_size, prompts, run, log or WorkLog())
        return GenerateActor(work, content_of(load(options.loading, "cpu", "fp32")))

    return actor


def images(row: pa.Table) -> dict[str, list[np.ndarray]]:
    """Pixels by prompt."""
    places = cell_values(row, "places").to_pylist()
    pixels = [np.array(each, int) for each in byte_views(cell_values(row, "pixels"))]
    return {PROMPTS[place]: pixels[2 * number : 2 * number + 2] for number, place in enumerate(places)}


def reasons(row: pa.Table) -> dict[str, str]:
    """Reasons by the last number of the source, the row of the prompt."""
    return {each["source"][-1]: each["reason"] for each in json.loads(row["rejects"][0].as_py())}


def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[Sequence[Wanted]], Exception | None]) -> list[int]:
    """Let batches fail; return the sizes of those that do not."""
    inner, sizes = Generator.sample, []

    def sample(self: Generator, wanted: Sequence[Wanted], *more: Any) -> list[Sampled]:
        if error := fails(wanted):
            raise error
        sizes.append(len(wanted))
        return inner(self, wanted, *more)

    monkeypatch.setattr(Generator, "sample", sample)
    return sizes


def test_an_evaluation_makes_the_same_images(make, model, tmp_path):
    """With the defaults of both commands' sampling."""
    made = images(make()(UNIT))
    options = EvaluateOptions(
        model=(f"m={model}",),
        prompts=tmp_path / "prompts.txt",
        reward=("tests.evaluation.stubs:Brightness",),
        out=tmp_path / "report",
        sampling=EvaluateSamplingOptions(steps=2, images_per_prompt=2),
        running=EvaluateJobOptions(device="cpu"),
    )
    evaluation = prepare_evaluation(options)
    assert evaluation.settings.sampler == "PNDMScheduler"
    sample_model(evaluation, *evaluation.models, "cpu")
    for number, prompt in enumerate(PROMPTS):
        for index, ours in enumerate(made[prompt]):
            theirs = np.asarray(Image.open(evaluation.file("m", number, index)), int).reshape(-1)
            assert np.abs(ours - theirs).max() <= 1


def test_a_prompt_that_fails_alone_is_rejected_and_the_others_are_made(make, monkeypatch):
    whole = images(make()(UNIT))
    failing(monkeypatch, lambda wanted: RuntimeError("broken") if ("a dog", 1) in wanted else None)
    row = make()(UNIT)
    assert reasons(row) == {"1": "fails alone: RuntimeError: broken"}
    made = images(row)
    assert list(made) == ["a cat", "cat and dog"]
    for prompt, pixels in made.items():
        assert max(np.abs(ours - theirs).max() for ours, theirs in zip(pixels, whole[prompt], strict=True)) <= 1


def test_a_prompt_that_crashes_workers_is_rejected(make):
    log = WorkLog()
    for _ in range(2):  # of the unit, then of its third image alone
        log.begin(0)
    for _ in range(3):
        log.begin((0, 2))
    row = make(log)(UNIT)
    assert {number: reason.partition(":")[0] for number, reason in reasons(row).items()} == {"1": "crashes its worker"}
    assert list(images(row)) == ["a cat", "cat and dog"]


def test_where_memory_runs_out_batches_become_smaller(make, monkeypatch, tmp_path):
    monkeypatch.setattr("smpo_pipeline.isolation.PAUSES", ())
    fitting = 2
    sizes = failing(monkeypatch, lambda wanted: MemoryError("out") if len(wanted) > fitting else None)
    assert reasons(make()(UNIT)) == {}
    assert sizes == [2, 2, 2]
    (said,) = pop_batch_sizes(tmp_path / "out", 4, "images")
    assert "--batch-size 4: larger batches failed" in said
    fitting = 0
    with pytest.raises(UserError, match="too little memory for a single image"):
        make()(UNIT)


def test_a_batch_size_is_chosen_by_trials(make, monkeypatch, tmp_path):
    def choose(try_batch: Callable[[int], object], most: int, device: str) -> int:
        assert (most, device) == (6, "cpu")
        try_batch(5)
        return 3

    monkeypatch.setattr("smpo_pipeline.jobs.batches.choose_batch_size", choose)
    sizes = failing(monkeypatch, lambda _wanted: None)
    actor = make(batch_size=None)
    assert len(images(actor(UNIT))) == len(images(actor(UNIT))) == 3
    assert sizes == [5, 3, 3, 3, 3]
    assert pop_batch_sizes(tmp_path / "out", None, "images") == ["--batch-size auto: batches of 3 images"]


def test_other_weights_than_the_drivers_are_refused(make, monkeypatch):
    actor = make()
    assert not actor._model_differs
    monkeypatch.setattr(actor_module, "content_of", lambda _: {})
    with pytest.raises(UserError, match="--model .* differ from those where the command was started"):
        make()(UNIT)
