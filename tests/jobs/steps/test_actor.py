"""The actor of ``steps`` without Ray: what fails, what is rejected for it, and units that are already there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from smpo_common.errors import UserError
from smpo_pipeline.generation.generator import Wanted
from smpo_pipeline.jobs.generate.parts import Prompts
from smpo_pipeline.jobs.invert.models import describe_model, load_models
from smpo_pipeline.jobs.record.run_record import Run, UnitRecord
from smpo_pipeline.jobs.record.work_log import WorkLog
from smpo_pipeline.jobs.steps.actor import StepsActor, StepWork
from smpo_pipeline.jobs.steps.options import StepDrawOptions, StepJobOptions, StepModelOptions, StepsOptions
from smpo_pipeline.step_pairs.pairs import step_pair_id
from smpo_pipeline.step_pairs.sampler import StepSampler
from smpo_schemas.manifest import MANIFEST_FILE, StepSettings
from tests.tiny.stable_diffusion import IMAGE_SIDE, make_tiny_model

PROMPTS = ["a cat", None, "a dog"]
UNIT = pa.table({"unit": [0]})
BRIGHTNESS = "tests.evaluation.stubs:Brightness"

Make = Callable[..., StepsActor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("actor") / "model")


@pytest.fixture
def make(model: Path, tmp_path: Path) -> Make:
    def actor(log: WorkLog | None = None, reward: str = "stub", batch_size: int | None = 4) -> StepsActor:
        options = StepsOptions(
            models=StepModelOptions(model=str(model)),
            prompts=tmp_path,
            reward=BRIGHTNESS,
            out=tmp_path / "out",
            trajectory=StepDrawOptions(steps=3, trajectories=2, guidance_scale=1),
            running=StepJobOptions(device="cpu", batch_size=batch_size),
        )
        family, sampling = load_models(options)
        table = pa.table({"row": range(3), "prompt": PROMPTS, "reason": [None, "no prompt: the row is blank", None]})
        steps = StepSettings(grid=[1, 334, 667], trained=[3, 2], candidates=2, continue_from="winner", gap=0)
        work = StepWork(
            options=options,
            model=describe_model(options, family, sampling),
            reward=reward,
            steps=steps,
            side=IMAGE_SIDE,
            prompts=Prompts("prompts.txt", 3, (table, pa.table({}))),
            run=Run(options.out, MANIFEST_FILE, {}),
            work_log=log or WorkLog(),
            text=None,
        )
        work.run.open(overwrite=False, patterns=())
        return StepsActor(work)

    return actor


def record(row: pa.Table) -> UnitRecord:
    return UnitRecord.model_validate_json(row["record"][0].as_py())


def reasons(made: UnitRecord) -> list[tuple[str | None, str, str]]:
    return [(reject.pair_id, reject.source, reject.reason) for reject in made.rejects]


def test_every_pair_is_written_or_rejected(make: Make) -> None:
    actor = make()
    made = record(actor(UNIT))
    assert (made.pairs_in, made.pairs) == (12, 8)
    assert reasons(made) == [(None, "prompts.txt:1", "no prompt: the row is blank")] * 4
    assert record(actor(UNIT)) == made.model_copy(update={"committed": record(actor(UNIT)).committed})


def test_a_trajectory_that_fails_alone_is_rejected(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = StepSampler.sample

    def sample(self: StepSampler, wanted: Sequence[Wanted], **more: Any) -> object:
        if ("a dog", 1) in wanted:
            raise RuntimeError("broken")
        return inner(self, wanted, **more)

    monkeypatch.setattr(StepSampler, "sample", sample)
    made = record(make(batch_size=None)(UNIT))
    broken = "fails alone: RuntimeError: broken"
    assert (made.pairs_in, made.pairs) == (12, 6)
    assert reasons(made)[4:] == [(step_pair_id("a dog", 1, step), "prompts.txt:2", broken) for step in (3, 2)]


def test_a_trajectory_that_crashes_workers_is_rejected(make: Make) -> None:
    log = WorkLog()
    for _ in range(2):  # of the unit, then of its first trajectory alone
        log.begin(0)
    for _ in range(3):
        log.begin((0, 0))
    made = record(make(log)(UNIT))
    ours = [why.partition(":")[0] for pair_id, _, why in reasons(made) if pair_id]
    assert (made.pairs, ours) == (6, ["crashes its worker"] * 2)


def test_another_reward_than_the_drivers_is_one_line(make: Make) -> None:
    with pytest.raises(UserError, match="--reward .*Brightness: its files on .* differ from those where"):
        make(reward="another")(UNIT)
