"""The loop over a run's optimizer steps, and what is done between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from smpo_schemas.trained_model import METRICS_FILE
from smpo_trainer.data.loader import Feed
from smpo_trainer.distributed import on_main, together
from smpo_trainer.experiment import Experiment
from smpo_trainer.interrupts import StopRequest
from smpo_trainer.model.policy import Policy
from smpo_trainer.monitoring.console import RunConsole
from smpo_trainer.monitoring.health import Health
from smpo_trainer.monitoring.metrics import MetricsLog, Record, plain
from smpo_trainer.monitoring.trackers import start_wandb
from smpo_trainer.output.checkpoints import load_checkpoint
from smpo_trainer.output.run_folder import OutputFolder
from smpo_trainer.trainer import Trainer
from smpo_trainer.validation.held_out import HeldOut
from smpo_trainer.validation.images import ValidationImages


class TrainLoop:
    """The steps of one run, with what comes between them: logs, health, held-out pairs, images and checkpoints.

    Attributes:
        stopped_by: the number of the signal that ended ``train`` early; 0: none did.
    """

    stopped_by: int = 0

    def __init__(
        self,
        experiment: Experiment,
        policy: Policy,
        feed: Feed,
        held_out: HeldOut | None,
        images: ValidationImages | None,
        accelerator: Accelerator,
        output: OutputFolder,
        report: RunConsole,
        identity: dict[str, Any],
    ) -> None:
        """Prepare the first step.

        Args:
            experiment: resolved.
            policy: the model in training.
            feed: this process's batches.
            held_out: pairs to look at; None: there are none.
            images: to draw; None: there are none.
            accelerator: of this process.
            output: the run's folder.
            report: takes lines for the user.
            identity: the settings that decide the run's numbers.
        """
        self._settings = experiment.settings
        self._trainer = Trainer(experiment, policy, feed.plan, accelerator)
        self._policy, self._feed, self._held_out, self._images = policy, feed, held_out, images
        self._accelerator, self._output = accelerator, output
        self._report, self._identity = report, identity
        self.health = Health(
            warmup_steps=self._settings.optimizer.warmup_steps,
            states_per_step=feed.plan.states_per_step,
            num_held_out=held_out.num_states if held_out else 0,
            num_train_timesteps=policy.family.process.num_train_timesteps,
            uses_reference=experiment.objective.uses_reference,
        )

    def train(self, noise: Record, checkpoint: Path | None) -> Record:
        """Train to the end, or until a signal comes, and return the last step's record.

        Args:
            noise: what was measured before the first step, logged with it.
            checkpoint: what to go on from; None: this is the start.
        """
        first, last = self._resume(checkpoint) if checkpoint else 0, self._settings.steps.max_steps
        batches = self._feed.batches(first, last)
        is_main = self._accelerator.is_main_process
        log = together(self._accelerator, lambda: self._open_log(first) if is_main else None)
        for earlier in log.earlier if log else []:
            self.health.look(earlier)
        record: Record = log.earlier[-1] if log and log.earlier else {}
        if log and len(log.earlier) != first:
            self._report.say(f"WARNING: {METRICS_FILE} holds {len(log.earlier)} of the {first} finished steps")
        if first == 0:
            self._draw(0, log)
        self._report.start(first, last)
        try:
            with StopRequest() as stop:
                for step in range(first, last):
                    record = plain(
                        self._trainer.train_step(step, batches)
                        | (noise if step == 0 else {})
                        | self._look_at_held_out(step + 1)
                    )
                    if log:
                        log.write(record)
                    self._report.step(record)
                    for warning in self.health.look(record):
                        self._report.say(f"WARNING: {warning}")
                    self._draw(step + 1, log)
                    self.stopped_by = self._agree(stop.requested) if step + 1 < last else 0
                    if self.stopped_by or (step + 1) % self._settings.output.save_every == 0 or step + 1 == last:
                        self._save(step + 1, log)
                    if self.stopped_by:
                        same = "the same command" + (" without --overwrite" if self._settings.overwrite else "")
                        self._report.say(f"stopped after step {step + 1} of {last}; {same} continues from here")
                        return record
        finally:
            self._report.stop()
            if log:
                log.close()
        return record

    def _look_at_held_out(self, step: int) -> Record:
        """After ``step`` steps: what is logged of the held-out pairs, where it is time for it."""
        if self._held_out is None or (
            step % self._settings.held_out.val_every and step != self._settings.steps.max_steps
        ):
            return {}
        record = self._trainer.validate(self._held_out)
        self._report.say(
            f"step {step}: held-out loss {_number(record['val/loss'])}, "
            f"accuracy {_number(record['val/rewards/accuracies'])}"
        )
        return record

    def _draw(self, step: int, log: MetricsLog | None) -> None:
        """After ``step`` steps: images, where it is time for them."""
        images = self._images
        if images is None or not images.due(step):
            return
        with self._trainer.as_saved():
            # A forward of a denoiser that is cut up takes all processes.
            draw = together if self._accelerator.is_fsdp2 else on_main
            image_HW3 = draw(self._accelerator, lambda: images.draw(step))
        if log:
            log.draw(step, image_HW3)

    def _open_log(self, finished_steps: int) -> MetricsLog:
        project, out = self._settings.output.wandb_project, self._output.path
        return MetricsLog(out, finished_steps, start_wandb(project, out, self._identity) if project else None)

    def _resume(self, path: Path) -> int:
        """Go back to a checkpoint; returns the number of finished steps."""
        checkpoint = together(self._accelerator, lambda: load_checkpoint(path, self._policy))
        self._trainer.restore(checkpoint)
        settings, before = self._settings, checkpoint.identity["max_steps"]
        self._report.say(f"going on after step {checkpoint.step} of {settings.steps.max_steps}")
        if before != settings.steps.max_steps and settings.optimizer.lr_schedule != "constant":
            self._report.say(
                f"--lr-schedule {settings.optimizer.lr_schedule}: from here on it is that of "
                f"{settings.steps.max_steps} steps, so far it was that of {before}"
            )
        return checkpoint.step

    def _save(self, step: int, log: MetricsLog | None) -> None:
        checkpoint = self._trainer.checkpoint(step, self._identity)

        def write() -> None:
            if log:
                log.sync()
            self._output.checkpoints.save(checkpoint, self._policy)

        on_main(self._accelerator, write)

    def _agree(self, requested: int) -> int:
        """The largest number of a signal that came to any process: all must end after the same step, and alike."""
        number_1 = torch.tensor([requested], device=self._accelerator.device)
        return int(self._accelerator.gather(number_1).max())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
