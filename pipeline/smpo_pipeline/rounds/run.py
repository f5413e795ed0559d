"""Run the stages of all rounds that are not done yet."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smpo_common.commandline import CONFIG_FILE
from smpo_common.errors import UserError
from smpo_common.files import link_or_copy, remove_tree, sha256_file
from smpo_common.same_settings import require_same_settings
from smpo_pipeline.evaluation.evaluation import IMAGES_FOLDER
from smpo_pipeline.evaluation.model_sources import whole_identity
from smpo_pipeline.rounds.check import write_flags
from smpo_pipeline.rounds.record import (
    ROUNDS_FILE,
    RoundRecord,
    RoundsRecord,
    StageRecord,
    identify,
    is_done,
    read_record,
    with_stage,
    write_record,
)
from smpo_pipeline.rounds.report import REPORT_FILE, read_versus, write_report
from smpo_pipeline.rounds.stages import FLAGS_FOLDER, Plan, Stage, round_name

Runner = Callable[[Sequence[str]], int]
"""Runs a command and returns its exit status."""

_INTERRUPTED = (130, 143)


@dataclass(frozen=True)
class Rounds:
    """Rounds in an output folder.

    Attributes:
        plan: their commands.
        run: runs a command.
        say: prints a line.
    """

    plan: Plan
    run: Runner
    say: Callable[[str], None]

    @property
    def out(self) -> Path:
        """The output folder."""
        return self.plan.options.out

    def go_on(self) -> RoundsRecord:
        """Run what is not done.

        Raises:
            UserError: the folder holds rounds of other settings, or a stage failed.
        """
        options = self.plan.options
        if options.overwrite:
            clear(self.out)
        record = self._checked(read_record(self.out))
        options.write(self.out)
        write_flags(options, self.plan.flags)
        for number in range(options.rounds):
            record = self._round(record, number)
            if why := self._worse(number):
                record = record.model_copy(update={"stopped": why})
                self.say(why)
                break
        write_record(self.out, record)
        evaluated = sum(stage.stage == "evaluate" for each in record.rounds for stage in each.stages)
        if evaluated:
            write_report(self.plan, evaluated - 1)  # a kill may have come between record and report
        return record

    def _checked(self, record: RoundsRecord) -> RoundsRecord:
        """Refuse other settings than those of the rounds that have begun; return the record with all rounds to run."""
        base = whole_identity(self.plan.options.base)
        settings = [round_settings(self.plan, number, base) for number in range(self.plan.options.rounds)]
        for number, (begun, now) in enumerate(zip(record.rounds, settings, strict=False)):
            require_same_settings(self.plan.folder(number), "a run", begun.settings, now)
        begun_rounds = len(record.rounds)
        new = [RoundRecord(settings=each, stages=[]) for each in settings[begun_rounds:]]
        return record.model_copy(update={"rounds": [*record.rounds, *new], "stopped": None})

    def _round(self, record: RoundsRecord, number: int) -> RoundsRecord:
        stages = self.plan.stages(number)
        for place, stage in enumerate(stages, start=1):
            if is_done(record, number, stage):
                continue
            write_record(self.out, record)
            where = f"round {number} ({number + 1} of {self.plan.options.rounds})"
            self.say(f"{where}, {stage.name} ({place} of {len(stages)}): {stage.typed}")
            if stage.name == "evaluate" and number:
                _reuse_images(self.plan.folder(number - 1) / "evaluation", stage.output)
            record = with_stage(record, number, self._done(stage, number))
            write_record(self.out, record)
            if stage.name == "evaluate":
                write_report(self.plan, number)
        return record

    def _done(self, stage: Stage, number: int) -> StageRecord:
        inputs, began = identify(stage), time.monotonic()
        status = self.run(stage.command)
        if status in _INTERRUPTED:
            raise SystemExit(status)
        if status:
            how = f"with status {status}" if status > 0 else f"by signal {-status}"
            raise UserError(
                f"{round_name(number)}: {stage.name} ended {how}; its own error is above. To look at it: {stage.typed}"
            )
        if not stage.marker.is_file():
            raise UserError(f"{round_name(number)}: {stage.name} wrote no {stage.marker}")
        seconds = round(time.monotonic() - began, 1)
        return StageRecord(
            stage=stage.name, command=stage.typed, inputs=inputs, output=sha256_file(stage.marker), seconds=seconds
        )

    def _worse(self, number: int) -> str | None:
        """Say why no further round is begun, if the round's model loses to the one before."""
        reward = self.plan.options.stop_if_worse
        if reward is None:
            return None
        found = read_versus(self.plan, number)
        if reward not in found:
            raise UserError(f"--stop-if-worse {reward}: {round_name(number)} was evaluated by {', '.join(found)} only")
        versus = found[reward].previous
        if versus.verdict != "worse":
            return None
        high = 100 * (versus.win_rate.high or 0)
        return (
            f"stopped after round {number}: its model wins at most {high:.1f} % against the one before by {reward} "
            "(95 % interval), which is the better one"
        )


def round_settings(plan: Plan, number: int, base: str) -> dict[str, Any]:
    """Return what decides a round's result, as JSON values by the config's keys.

    Args:
        plan: of all rounds.
        number: of the round.
        base: identity of the base's files.
    """
    options = plan.options
    settings: dict[str, Any] = {
        "base": base,
        "prompts": sha256_file(plan.prompts(number)),
        "seed": options.seed,
        "start": options.start,
        "reference": options.held_to,
        "inverting": options.inverting,
        **options.stages.given(),
    }
    if (beta := plan.beta(number)) is not None:
        settings["train"]["beta"] = beta
    return settings


def clear(out: Path) -> None:
    """Remove rounds, the record of them first."""
    for name in (ROUNDS_FILE, REPORT_FILE, CONFIG_FILE):
        (out / name).unlink(missing_ok=True)
    for folder in (*out.glob("round-[0-9][0-9][0-9]"), out / FLAGS_FOLDER):
        remove_tree(folder)


def _reuse_images(before: Path, now: Path) -> None:
    """Give an evaluation the images of the models that the last one compared: they are not sampled again."""
    for folder in _folders(before / IMAGES_FOLDER):
        target = now / IMAGES_FOLDER / folder.name
        if not target.exists():
            # Complete or absent: evaluate refuses images without the record of what made them.
            staging = target.with_name(f".{target.name}.tmp")
            remove_tree(staging)
            shutil.copytree(folder, staging, copy_function=link_or_copy)
            staging.replace(target)


def _folders(parent: Path) -> Iterator[Path]:
    with suppress(FileNotFoundError):
        yield from (path for path in sorted(parent.iterdir()) if path.is_dir())
