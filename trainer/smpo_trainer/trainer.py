"""A run's optimizer steps: forward, backward, update, and what a checkpoint holds of them.

Shape suffixes: B a micro-batch of states, 2 images.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.optim import Optimizer

from smpo_common.errors import UserError
from smpo_trainer.data.loader import StateBatch
from smpo_trainer.data.order import Batching
from smpo_trainer.distributed import on_main, together
from smpo_trainer.experiment import Experiment
from smpo_trainer.model.denoising_error import condition, pair_errors
from smpo_trainer.model.ema import WeightAverage
from smpo_trainer.model.fsdp import gather, like, reshard, whole
from smpo_trainer.model.optimizers import make_optimizer, make_schedule
from smpo_trainer.model.policy import Policy
from smpo_trainer.monitoring.bands import by_band
from smpo_trainer.monitoring.metrics import Record, StepMeter
from smpo_trainer.monitoring.utilization import Utilization, peak_memory_gib
from smpo_trainer.objectives.base import Metrics, PairBatch, of_preferred
from smpo_trainer.output.checkpoints import Checkpoint
from smpo_trainer.output.skipped_steps import SkippedStep, SkippedSteps
from smpo_trainer.validation.held_out import HeldOut

Losses = list[tuple[str, float]]
"""Pair id and loss of every state that a process has taken in a step."""


def _metered(loss_B: torch.Tensor, metrics: Metrics) -> Metrics:
    """What is averaged: a mean leaves NaN out, but a loss that is not a number is not one that is missing."""
    return {"loss": loss_B.where(loss_B.isfinite(), math.inf), **metrics}


def _prepare(accelerator: Accelerator, policy: Policy, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    try:
        return accelerator.prepare(policy.denoiser, optimizer)
    except ValueError as error:  # --fsdp_transformer_layer_cls_to_wrap names a class that the denoiser has not
        raise UserError(f"accelerate cannot prepare the denoiser: {error}") from error


class Trainer:
    """Denoiser, optimizer and schedule of a run; ``train_step`` is one optimizer step."""

    def __init__(self, experiment: Experiment, policy: Policy, plan: Batching, accelerator: Accelerator) -> None:
        """Prepare the first step."""
        settings = experiment.settings
        self._settings, self._pair_loss = settings, experiment.pair_loss(policy.family.process)
        self._policy, self._plan, self._accelerator = policy, plan, accelerator
        if settings.compute.gradient_checkpointing:
            policy.denoiser.enable_gradient_checkpointing()
        optimizer = make_optimizer(
            settings.optimizer, list(policy.trained().values()), settings.peak_lr(plan.states_per_step)
        )
        # Not prepared by accelerate, which would step it once a process.
        self._schedule = make_schedule(settings.optimizer, optimizer, settings.steps.max_steps)
        self._skipped = SkippedSteps(settings.out, min(settings.steps.max_skipped, settings.steps.max_steps))
        self._utilization = Utilization.of(policy, accelerator)
        self._denoiser, self._optimizer = together(accelerator, lambda: _prepare(accelerator, policy, optimizer))
        self._parameters = list(policy.trained().values())  # others than before, where the denoiser is cut up
        self._average = (
            WeightAverage(self._parameters, settings.optimizer.ema_decay) if settings.optimizer.ema_decay else None
        )

    def train_step(self, step: int, batches: Iterator[StateBatch]) -> Record:
        """Make optimizer step ``step`` (from 0) and return what is logged of it.

        The gradient is that of the mean loss over all states of the step, however they are cut into micro-batches and
        processes. If it or a loss is not finite, the weights and the learning rate's course stay as they were.

        Raises:
            UserError: too many steps in a row were skipped so.
        """
        started, waited = time.perf_counter(), 0.0
        meter = StepMeter()
        losses: Losses = []
        for accumulation in range(self._plan.grad_accum):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            batch = batch.to(self._accelerator.device)
            is_last = accumulation == self._plan.grad_accum - 1
            # Not where the denoiser is cut up: each process would keep whole gradients.
            syncs = is_last or self._accelerator.is_fsdp2
            with nullcontext() if syncs else self._accelerator.no_sync(self._denoiser):
                loss_B, metrics = self._forward(batch)
                # Processes' gradients are averaged: each gives its share of the sum times their number.
                share = self._accelerator.num_processes / self._plan.states_per_step
                self._accelerator.backward(loss_B.sum() * share)
            loss_B = loss_B.detach()
            meter.add(_metered(loss_B, metrics))
            # Only what the end of the step needs: the latents and the graph of a micro-batch are freed here.
            losses += zip(batch.pair_ids, loss_B.tolist(), strict=True)
        lr = self._schedule.get_last_lr()[0]
        grad_norm = self._update(step, losses)
        record: Record = {"step": step + 1, **meter.means(self._accelerator), "grad_norm": grad_norm, "lr": lr}
        record["skipped_steps"] = self._skipped.total
        elapsed = time.perf_counter() - started
        record["pairs_per_second"] = self._plan.states_per_step / elapsed
        record["data_wait_percent"] = 100 * waited / elapsed
        record["memory_gib"] = peak_memory_gib(self._accelerator.device)
        if self._utilization:
            record["mfu_percent"] = 100 * self._utilization.share(elapsed)
        return record

    @torch.no_grad()
    def validate(self, held_out: HeldOut) -> Record:
        """Loss and metrics on held-out pairs of the weights that would be the result, by names ``val/...``."""
        meter = StepMeter()
        with self.as_saved():
            for number in range(held_out.forwards):
                # A process that has fewer batches repeats one, since wrappers may need all processes for a forward.
                batch = held_out.batches[min(number, len(held_out.batches) - 1)].to(self._accelerator.device)
                loss_B, metrics = self._forward(batch)
                if number < len(held_out.batches):
                    meter.add(_metered(loss_B, metrics))
        return {f"val/{name}": value for name, value in meter.means(self._accelerator).items()}

    def _forward(self, batch: StateBatch) -> tuple[torch.Tensor, Metrics]:
        """Loss of each pair of a micro-batch, [B], and metrics."""
        family = self._policy.family
        conditioning = condition(self._policy, batch)
        if self._utilization and torch.is_grad_enabled():
            self._utilization.add(batch, conditioning)
        ref_error_B2 = batch.ref_error_B2
        if self._policy.reference is not None:
            with self._policy.as_reference(), torch.no_grad(), self._accelerator.autocast():
                ref_error_B2 = pair_errors(family, self._policy.reference, batch, conditioning)
        with self._accelerator.autocast():
            error_B2 = pair_errors(family, self._denoiser, batch, conditioning)
        pairs = PairBatch(error_B2, ref_error_B2, batch.preference_B, batch.label_B, batch.timestep_B)
        loss_B, metrics = self._pair_loss(pairs, batch.weight_B)
        moved_B2 = error_B2.detach() - ref_error_B2
        for image in (0, 1):
            metrics[f"error/image_{image}"] = error_B2.detach()[:, image]
            metrics[f"error_minus_reference/image_{image}"] = moved_B2[:, image]
        metrics["drift"] = moved_B2.abs().mean(dim=1)
        preferred_B = self._pair_loss.objective.preferred(pairs)
        metrics["error_minus_reference/chosen"] = of_preferred(moved_B2, preferred_B)
        metrics["error_minus_reference/rejected"] = of_preferred(moved_B2, -preferred_B)
        return loss_B, metrics | by_band(metrics, batch.timestep_B, family.process.num_train_timesteps)

    def _update(self, step: int, losses: Losses) -> float:
        """Clip, and make the step if all is finite; returns the gradient's norm before clipping."""
        limit = self._settings.optimizer.max_grad_norm or float("inf")
        grad_norm = float(whole(self._accelerator.clip_grad_norm_(self._parameters, limit)))
        bad = [pair_id for pair_id, value in losses if not math.isfinite(value)]
        count = torch.tensor(float(len(bad)), device=self._accelerator.device)
        any_bad = bool(self._accelerator.reduce(count, "sum").item())
        if math.isfinite(grad_norm) and not any_bad:
            self._optimizer.step()
            self._schedule.step()
            if self._average:
                self._average.step()
            self._skipped.took()
        else:
            self._skip(step, [pair_id for pair_id, _ in losses], bad, overflowed=not math.isfinite(grad_norm))
        self._optimizer.zero_grad()
        return grad_norm

    def _skip(self, step: int, pairs: list[str], bad: list[str], *, overflowed: bool) -> None:
        """Leave a step out.

        Args:
            step: from 0.
            pairs: this process's.
            bad: those of them whose loss is not finite.
            overflowed: whether the gradient is not finite.
        """
        bad_everywhere = gather_object(bad)
        scaler = self._accelerator.scaler
        if scaler is not None:
            scaler.update()
            if overflowed and not bad_everywhere and scaler.get_scale() >= 1:
                self._skipped.overflowed()
                return
        self._skipped.skip(SkippedStep(step + 1, bad_everywhere, gather_object(pairs)))
        on_main(self._accelerator, self._skipped.write)
        on_main(self._accelerator, self._skipped.require_few)

    @contextmanager
    def as_saved(self) -> Iterator[None]:
        """While entered, the model has the weights that would be the result."""
        with self._average.applied() if self._average else nullcontext():
            yield
        reshard(self._denoiser)

    def checkpoint(self, step: int, identity: dict[str, object]) -> Checkpoint:
        """Everything that is needed to go on after ``step`` finished steps; for all processes at once.

        What is cut up is whole in the main process's alone.
        """
        scaler = self._accelerator.scaler
        states = {
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "average": self._average.state_dict() if self._average else None,
            "skipped": self._skipped.state_dict(),
        }
        keep = self._accelerator.is_main_process
        trained = self._policy.trained()
        average = dict(zip(trained, self._average.tensors, strict=True)) if self._average else None
        return Checkpoint(
            step,
            identity,
            weights=gather(dict(trained), keep=keep),
            average=gather(average, keep=keep),
            optimizer=gather(states, keep=keep),
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint.

        Raises:
            UserError: its weights are not those of this model.
        """
        self._policy.load_trained(checkpoint.weights)
        optimizer = checkpoint.optimizer["optimizer"]
        if self._accelerator.device.type == "cpu":
            # Where it would stay as it is, mapped from a file that a later checkpoint removes.
            optimizer = copy.deepcopy(optimizer)
        self._optimizer.load_state_dict(self._cut_up(optimizer) if self._accelerator.is_fsdp2 else optimizer)
        self._schedule.load_state_dict(checkpoint.optimizer["schedule"])
        # The rate at this step of this run's course: that of the checkpoint's run may have been of another length.
        self._schedule.last_epoch -= 1
        self._schedule.step()
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(checkpoint.optimizer["scaler"])
        if self._average:
            averaged = checkpoint.average or {}
            tensors = [averaged[name] for name in self._policy.trained()]
            self._average.load_state_dict(checkpoint.optimizer["average"], tensors)
        self._skipped.load_state_dict(checkpoint.optimizer["skipped"])
        on_main(self._accelerator, self._skipped.write)

    def _cut_up(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        """AdamW's whole state, whose moments are cut up as the parameters are that they belong to."""
        state = {
            number: {
                # Steps are counted in tensors, too.
                name: like(value, self._parameters[number]) if value.ndim else value
                for name, value in moments.items()
            }
            for number, moments in optimizer["state"].items()
        }
        return {**optimizer, "state": state}
