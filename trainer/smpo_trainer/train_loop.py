"""The loop over the optimizer steps of a run: logging, evaluation, images and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from smpo_schemas.trained_model import METRICS_FILE
from smpo_trainer.data.loader import Feed
from smpo_trainer.experiment import Experiment
from smpo_trainer.model.policy import Policy
from smpo_trainer.monitoring.console import RunConsole
from smpo_trainer.monitoring.health import Health
from smpo_trainer.monitoring.metrics import MetricsLog, Record, json_record
from smpo_trainer.monitoring.trackers import start_wandb
from smpo_trainer.output.checkpoints import load_checkpoint
from smpo_trainer.output.run_folder import OutputFolder
from smpo_trainer.runtime.distributed import on_all, on_main
from smpo_trainer.runtime.interrupts import StopRequest
from smpo_trainer.trainer import Trainer
from smpo_trainer.validation.held_out import HeldOut
from smpo_trainer.validation.images import ValidationImages


class TrainLoop:
    """Run the optimizer steps, with logs, health checks, held-out pairs, images and checkpoints between them.

    Attributes:
        stopped_by: number of the signal that ended ``train`` early, or 0.
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
        console: RunConsole,
        identity: dict[str, Any],
    ) -> None:
        """Prepare the first step.

        Args:
            experiment: the resolved settings.
            policy: the model in training.
            feed: this process's batches.
            held_out: pairs to evaluate, if any.
            images: images to draw, if any.
            accelerator: this process's accelerator.
            output: the run's folder.
            console: prints lines for the user.
            identity: the settings that decide the results, stored in checkpoints.
        """
        self._settings = experiment.settings
        self._trainer = Trainer(experiment, policy, feed.batching, accelerator)
        self._policy, self._feed, self._held_out, self._images = policy, feed, held_out, images
        self._accelerator, self._output = accelerator, output
        self._console, self._identity = console, identity
        self.health = Health(
            warmup_steps=self._settings.optimizer.warmup_steps,
            states_per_step=feed.batching.states_per_step,
            num_held_out=held_out.num_states if held_out else 0,
            num_train_timesteps=policy.family.noise_schedule.num_train_timesteps,
            uses_reference=experiment.objective.uses_reference,
        )

    def train(self, noise: Record, checkpoint: Path | None) -> Record:
        """Train until the last step or a signal, and return the last step's record.

        Args:
            noise: metrics measured before the first step, logged with it.
            checkpoint: checkpoint to resume from; None starts a run.
        """
        # The count of finished steps is all that positions the data order.
        first, last = self._resume(checkpoint) if checkpoint else 0, self._settings.steps.max_steps
        batches = self._feed.batches(first, last)
        is_main = self._accelerator.is_main_process
        log = on_all(self._accelerator, lambda: self._open_log(first) if is_main else None)
        # Health is a function of the logged records, so a resumed run warns exactly like an uninterrupted one.
        for earlier in log.earlier if log else []:
            self.health.check(earlier)
        record: Record = log.earlier[-1] if log and log.earlier else {}
        if log and len(log.earlier) != first:
            self._console.say(f"WARNING: {METRICS_FILE} holds {len(log.earlier)} of the {first} finished steps")
        if first == 0:
            self._draw(0, log)
        self._console.start(first, last)
        try:
            with StopRequest() as stop:
                for step in range(first, last):
                    record = json_record(
                        self._trainer.train_step(step, batches)
                        | (noise if step == 0 else {})
                        | self._evaluate_held_out(step + 1)
                    )
                    if log:
                        log.write(record)
                    self._console.step(record)
                    for warning in self.health.check(record):
                        self._console.say(f"WARNING: {warning}")
                    self._draw(step + 1, log)
                    # Collective: a signal may reach one process only. After the last step the run just ends.
                    self.stopped_by = self._agree(stop.requested) if step + 1 < last else 0
                    if self.stopped_by or (step + 1) % self._settings.output.save_every == 0 or step + 1 == last:
                        self._save(step + 1, log)
                    if self.stopped_by:
                        same = "the same command" + (" without --overwrite" if self._settings.overwrite else "")
                        self._console.say(f"stopped after step {step + 1} of {last}; run {same} again to resume")
                        return record
        finally:
            self._console.stop()
            if log:
                log.close()
        return record

    def _evaluate_held_out(self, step: int) -> Record:
        """Evaluate the held-out pairs if they are due after ``step`` steps; return their metrics."""
        if self._held_out is None or (
            step % self._settings.held_out.val_every and step != self._settings.steps.max_steps
        ):
            return {}
        record = self._trainer.validate(step, self._held_out)
        self._console.say(
            f"step {step}: held-out loss {_number(record['val/loss'])}, "
            f"accuracy {_number(record['val/rewards/accuracies'])}"
        )
        return record

    def _draw(self, step: int, log: MetricsLog | None) -> None:
        """Draw the validation images if they are due after ``step`` steps."""
        images = self._images
        if images is None or not images.due(step):
            return
        with self._trainer.as_saved():
            # Collective with FSDP: a forward of a sharded denoiser gathers its parameters from all processes.
            draw = on_all if self._accelerator.is_fsdp2 else on_main
            image_HW3 = draw(self._accelerator, lambda: images.draw(step))
        if log:
            log.draw(step, image_HW3)

    def _open_log(self, finished_steps: int) -> MetricsLog:
        project, out = self._settings.output.wandb_project, self._output.path
        return MetricsLog(out, finished_steps, start_wandb(project, out, self._identity) if project else None)

    def _resume(self, path: Path) -> int:
        """Restore a checkpoint and return its number of finished steps."""
        checkpoint = on_all(self._accelerator, lambda: load_checkpoint(path, self._policy))
        self._trainer.restore(checkpoint)
        settings, before = self._settings, checkpoint.identity["max_steps"]
        self._console.say(f"resuming after step {checkpoint.step} of {settings.steps.max_steps}")
        if before != settings.steps.max_steps and settings.optimizer.lr_schedule != "constant":
            self._console.say(
                f"--lr-schedule {settings.optimizer.lr_schedule}: follows a run of {settings.steps.max_steps} steps "
                f"from here on; the finished steps followed one of {before}"
            )
        return checkpoint.step

    def _save(self, step: int, log: MetricsLog | None) -> None:
        # Collective with FSDP: every process takes part in gathering the weights, the main process writes them.
        checkpoint = self._trainer.checkpoint(step, self._identity)

        def write() -> None:
            # First the metrics: after a power cut, no checkpoint may be ahead of them.
            if log:
                log.sync()
            self._output.checkpoints.save(checkpoint, self._policy)

        on_main(self._accelerator, write)

    def _agree(self, requested: int) -> int:
        """Return the largest signal number of all processes, so that all stop after the same step."""
        number_1 = torch.tensor([requested], device=self._accelerator.device)
        return int(self._accelerator.gather(number_1).max())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
