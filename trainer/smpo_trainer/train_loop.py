"""The loop over the optimizer steps of a run: logging, evaluation, images and checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator

from smpo_common.errors import UserError
from smpo_schemas.trained_model import METRICS_FILE
from smpo_trainer.data.loader import Feed
from smpo_trainer.experiment import Experiment
from smpo_trainer.model.policy import Policy
from smpo_trainer.monitoring.console import RunConsole
from smpo_trainer.monitoring.health import Health
from smpo_trainer.monitoring.metrics import MetricsLog, Record, json_record
from smpo_trainer.monitoring.trackers import start_wandb
from smpo_trainer.output.checkpoints import Checkpoint, load_checkpoint
from smpo_trainer.output.run_folder import OutputFolder
from smpo_trainer.output.training_record import BestStep
from smpo_trainer.runtime.distributed import on_all, on_main
from smpo_trainer.runtime.interrupts import StopRequest
from smpo_trainer.safeguards.spikes import LR_FACTOR, MAX_ROLLBACKS, USUAL_STEPS, Spike
from smpo_trainer.trainer import Trainer
from smpo_trainer.validation.held_out import HeldOut
from smpo_trainer.validation.images import ValidationImages
from smpo_trainer.validation.rewards import mean_reward


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
        self._uses_reference = experiment.objective.uses_reference
        self._health = self._new_health()

    def _new_health(self) -> Health:
        return Health(
            warmup_steps=self._settings.optimizer.warmup_steps,
            states_per_step=self._feed.batching.states_per_step,
            num_held_out=self._held_out.num_states if self._held_out else 0,
            num_train_timesteps=self._policy.family.noise_schedule.num_train_timesteps,
            uses_reference=self._uses_reference,
        )

    @property
    def warnings(self) -> list[str]:
        """The health warnings of the run, then its spikes."""
        return [*self._health.warnings, *(spike.describe() for spike in self._trainer.spikes.spikes)]

    @property
    def best(self) -> BestStep | None:
        """The best checkpoint by ``--validation-reward``."""
        best = self._trainer.best
        return None if best.step is None or best.reward is None else {"step": best.step, "reward": best.reward}

    def train(self, noise: Record, checkpoint: Path | None) -> Record:
        """Train until the last step or a signal, and return the last step's record.

        Args:
            noise: metrics measured before the first step, logged with it.
            checkpoint: checkpoint to resume from; None starts a run.

        Raises:
            UserError: a spike ends the run.
        """
        # The count of finished steps is all that positions the data order.
        first = self._resume(checkpoint) if checkpoint else 0
        if checkpoint is None and self._settings.safeguards.on_spike == "rollback":
            self._save(0, None)  # what an early spike goes back to
        with StopRequest() as stop:
            while True:
                record, spike = self._train_from(first, noise, stop)
                if spike is None:
                    return record
                first = self._roll_back(spike)

    def _train_from(self, first: int, noise: Record, stop: StopRequest) -> tuple[Record, Spike | None]:
        """Train from step ``first`` on; return the last record, and the spike to roll back from, if one ended it."""
        last = first if self._trainer.best.has_fallen else self._settings.steps.max_steps
        batches = self._feed.batches(first, last)
        is_main = self._accelerator.is_main_process
        log = on_all(self._accelerator, lambda: self._open_log(first) if is_main else None)
        # Health is a function of the logged records, so a resumed run warns exactly like an uninterrupted one.
        self._health = self._new_health()
        for earlier in log.earlier if log else []:
            self._health.check(earlier)
        record: Record = log.earlier[-1] if log and log.earlier else {}
        if log and len(log.earlier) != first:
            self._console.say(f"WARNING: {METRICS_FILE} holds {len(log.earlier)} of the {first} finished steps")
        before = self._draw(0, log) if first == 0 else {}
        noise |= {f"{name}/start": value for name, value in before.items()}
        self._console.start(first, last)
        try:
            for step in range(first, last):
                record = json_record(
                    self._trainer.train_step(step, batches)
                    | (noise if step == 0 else {})
                    | self._evaluate_held_out(step + 1)
                    | self._draw(step + 1, log)
                )
                if log:
                    log.write(record)
                self._console.step(record)
                for warning in self._health.check(record):
                    self._console.say(f"WARNING: {warning}")
                spike = self._check_spike(record)
                if spike:
                    return record, spike
                if self._save_or_stop(record, log, stop):
                    break
        finally:
            batches.close()
            self._console.stop()
            if log:
                log.close()
        return record, None

    def _save_or_stop(self, record: Record, log: MetricsLog | None, stop: StopRequest) -> bool:
        """Save a checkpoint if one is due after a step; return whether the run ends before its last step."""
        step, last, best = int(record["step"] or 0), self._settings.steps.max_steps, self._trainer.best
        reward = record.get("validation_reward")
        is_best = reward is not None and best.update(step, reward)
        # Collective: a signal may reach one process only. After the last step the run just ends.
        self.stopped_by = self._agree(stop.requested) if step < last else 0
        ends = best.has_fallen and step < last and not self.stopped_by
        if self.stopped_by or ends or is_best or step % self._settings.output.save_every == 0 or step == last:
            self._save(step, log)
        if is_best:
            self._keep_best(step)
        if ends:
            self._say_ended(step)
            return True
        if self.stopped_by:
            same = "the same command" + (" without --overwrite" if self._settings.overwrite else "")
            self._console.say(f"stopped after step {step} of {last}; run {same} again to resume")
        return bool(self.stopped_by)

    def _say_ended(self, step: int) -> None:
        self._console.say(
            f"ended after step {step} of {self._settings.steps.max_steps}: --validation-reward was highest after step "
            f"{self._trainer.best.step}, whose model is the result"
        )

    def _check_spike(self, record: Record) -> Spike | None:
        """Look for a spike at a step; return it if the run must roll back.

        All processes see the same metrics, and so decide alike.

        Raises:
            UserError: there is a spike, and ``--on-spike stop`` is given.
        """
        spikes, on_spike = self._trainer.spikes, self._settings.safeguards.on_spike
        spike = spikes.check(record)
        if spike is None or on_spike == "rollback":
            return spike
        spikes.add(spike)
        on_main(self._accelerator, spikes.write)
        if on_spike == "stop":
            self._end(spike, "lower --lr, raise --warmup-steps or --beta, or give --on-spike rollback")
        self._console.say(f"WARNING: {spike.describe()}; look at samples, or see --on-spike")
        return None

    def _roll_back(self, spike: Spike) -> int:
        """Return to a checkpoint before a spike, with a lower learning rate; return its number of steps.

        Raises:
            UserError: there is none, or there were too many spikes.
        """
        spikes, checkpoints = self._trainer.spikes, self._output.checkpoints
        earlier, path = spikes.spikes, on_main(self._accelerator, lambda: checkpoints.before(spike.step - USUAL_STEPS))
        if path is None:
            self._end(spike, "there is no checkpoint to go back to; start over with --overwrite")
        if spikes.rollbacks >= MAX_ROLLBACKS:
            self._end(spike, f"after {MAX_ROLLBACKS} rollbacks; lower --lr, or look at the pairs")
        best = self._trainer.best.state_dict()  # the best model is kept, even if its step is after the checkpoint
        step = self._load(path).step
        self._trainer.best.load_state_dict(best)
        factor = LR_FACTOR ** (1 + sum(each.rolled_back_to is not None for each in earlier))
        self._trainer.scale_lr(factor)
        spikes.spikes = [*earlier, replace(spike, rolled_back_to=step, lr_factor=factor)]
        # In this order: after a kill in between, the run meets the same spike, and goes back in the same way.
        on_main(self._accelerator, lambda: checkpoints.drop_after(step))
        self._save(step, None)
        on_main(self._accelerator, spikes.write)
        self._console.say(
            f"WARNING: {spike.describe()}; rolled back to step {step}, from where the learning rate is multiplied by "
            f"{factor:g}"
        )
        return step

    def _end(self, spike: Spike, remedy: str) -> NoReturn:
        def end() -> NoReturn:
            raise UserError(f"{spike.describe()}; {remedy}")

        on_main(self._accelerator, end)
        raise AssertionError

    def _evaluate_held_out(self, step: int) -> Record:
        """Evaluate the held-out pairs if they are due after ``step`` steps; return their metrics."""
        if self._held_out is None or (
            step % self._settings.held_out.val_every and step != self._settings.steps.max_steps
        ):
            return {}
        record = self._trainer.validate(self._held_out)
        self._console.say(
            f"step {step}: held-out loss {_number(record['val/loss'])}, "
            f"accuracy {_number(record['val/rewards/accuracies'])}"
        )
        return record

    def _draw(self, step: int, log: MetricsLog | None) -> Record:
        """Draw the validation images if they are due after ``step`` steps; return their reward, if one is asked for."""
        images = self._images
        if images is None or not images.due(step):
            return {}
        with self._trainer.as_saved():
            # Collective with FSDP: a forward of a sharded denoiser gathers its parameters from all processes.
            draw = on_all if self._accelerator.is_fsdp2 else on_main
            drawn, image_HW3 = draw(self._accelerator, lambda: images.draw(step))
        if log:
            log.draw(step, image_HW3)
        spec = self._settings.safeguards.validation_reward
        if spec is None:
            return {}
        device = self._accelerator.device.type
        reward = on_main(self._accelerator, lambda: mean_reward(spec, drawn, images.prompts, device))
        self._console.say(f"step {step}: --validation-reward {spec}: {reward:.5g}")
        return {"validation_reward": reward}

    def _open_log(self, finished_steps: int) -> MetricsLog:
        project, out = self._settings.output.wandb_project, self._output.path
        return MetricsLog(out, finished_steps, start_wandb(project, out, self._identity) if project else None)

    def _load(self, path: Path) -> Checkpoint:
        checkpoint = on_all(self._accelerator, lambda: load_checkpoint(path, self._policy))
        self._trainer.restore(checkpoint)
        return checkpoint

    def _resume(self, path: Path) -> int:
        """Restore a checkpoint and return its number of finished steps."""
        checkpoint = self._load(path)
        if not self._trainer.best.is_kept:  # a kill came between the checkpoint and this copy
            self._keep_best(checkpoint.step)
        if self._trainer.best.has_fallen:
            self._say_ended(checkpoint.step)
            return checkpoint.step
        settings, before = self._settings, checkpoint.identity["max_steps"]
        self._console.say(f"resuming after step {checkpoint.step} of {settings.steps.max_steps}")
        if before != settings.steps.max_steps and settings.optimizer.lr_schedule != "constant":
            self._console.say(
                f"--lr-schedule {settings.optimizer.lr_schedule}: follows a run of {settings.steps.max_steps} steps "
                f"from here on; the finished steps followed one of {before}"
            )
        return checkpoint.step

    def _keep_best(self, step: int) -> None:
        on_main(self._accelerator, lambda: self._output.keep_best(step))
        self._trainer.best.is_kept = True

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
