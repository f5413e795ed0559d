"""One optimizer step: forward, backward, update; and its state in a checkpoint.

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
from smpo_trainer.experiment import Experiment
from smpo_trainer.model.denoising_error import condition, pair_outputs
from smpo_trainer.model.ema import WeightAverage
from smpo_trainer.model.fsdp import full_tensor, gather_full, reshard, shard_like
from smpo_trainer.model.optimizers import make_optimizer, make_schedule
from smpo_trainer.model.policy import Policy
from smpo_trainer.monitoring.bands import by_band
from smpo_trainer.monitoring.metrics import Record, StepMeter
from smpo_trainer.monitoring.utilization import Utilization, peak_memory_gib
from smpo_trainer.objectives.base import Metrics, PairBatch, select_preferred
from smpo_trainer.objectives.pair_loss import PairLoss
from smpo_trainer.output.checkpoints import Checkpoint
from smpo_trainer.output.skipped_steps import SkippedStep, SkippedSteps
from smpo_trainer.runtime.distributed import on_all, on_main
from smpo_trainer.safeguards.best_checkpoint import BestCheckpoint
from smpo_trainer.safeguards.robust import RobustMean
from smpo_trainer.safeguards.spikes import SpikeDetector
from smpo_trainer.validation.held_out import HeldOut

Losses = list[tuple[str, float]]
"""Pair id and loss of every state that this process has used in a step."""


def _with_loss(loss_B: torch.Tensor, metrics: Metrics) -> Metrics:
    # The meter takes NaN as "missing", so report a NaN loss as inf.
    return {"loss": loss_B.where(loss_B.isfinite(), math.inf), **metrics}


def _prepare(accelerator: Accelerator, policy: Policy, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    try:
        return accelerator.prepare(policy.denoiser, optimizer)
    except ValueError as error:  # --fsdp_transformer_layer_cls_to_wrap names a class that the denoiser does not have
        raise UserError(f"accelerate cannot prepare the denoiser: {error}") from error


class Trainer:
    """Denoiser, optimizer and schedule of a run; ``train_step`` takes one optimizer step.

    Attributes:
        spikes: detector of sudden rises of the model's error.
        best: the best checkpoint by the reward of validation images.
    """

    def __init__(self, experiment: Experiment, policy: Policy, batching: Batching, accelerator: Accelerator) -> None:
        """Prepare the first step."""
        settings = experiment.settings
        self._settings, self._pair_loss = settings, experiment.pair_loss(policy.family.noise_schedule)
        self._beta, self._loss = experiment.beta_controller(), self._pair_loss
        self._policy, self._batching, self._accelerator = policy, batching, accelerator
        if settings.compute.gradient_checkpointing:
            policy.denoiser.enable_gradient_checkpointing()
        self._peak_lr = settings.peak_lr(batching.states_per_step)
        optimizer = make_optimizer(settings.optimizer, list(policy.trainable_parameters().values()), self._peak_lr)
        # Not prepared by accelerate, which would step it once per process.
        self._schedule = make_schedule(settings.optimizer, optimizer, settings.steps.max_steps)
        self._skipped = SkippedSteps(settings.out, min(settings.steps.max_skipped, settings.steps.max_steps))
        self.best = BestCheckpoint(settings.safeguards.validation_patience)
        self.spikes = SpikeDetector(settings.out, settings.safeguards.spike_ratio)
        self._utilization = Utilization.on_device(policy, accelerator)
        self._denoiser, self._optimizer = on_all(accelerator, lambda: _prepare(accelerator, policy, optimizer))
        # FSDP replaces the parameters by DTensors: collect them again.
        self._parameters = list(policy.trainable_parameters().values())
        self._average = (
            WeightAverage(self._parameters, settings.optimizer.ema_decay) if settings.optimizer.ema_decay else None
        )

    def train_step(self, step: int, batches: Iterator[StateBatch]) -> Record:
        """Take optimizer step ``step`` (from 0) and return its metrics.

        The gradient is that of the mean loss over all states of the step (with ``--robust`` of the robust mean),
        independent of how they are split into micro-batches and processes. If it or a loss is not finite, weights and
        learning rate stay unchanged.

        Raises:
            UserError: too many steps in a row were skipped.
        """
        start, data_seconds = time.perf_counter(), 0.0
        self._loss = pair_loss = self._loss_of(step + 1)
        meter = StepMeter()
        robust = self._robust_mean()
        losses: Losses = []
        for accumulation in range(self._batching.grad_accum):
            before = time.perf_counter()
            batch = next(batches)
            data_seconds += time.perf_counter() - before
            batch = batch.to(self._accelerator.device)
            is_last = accumulation == self._batching.grad_accum - 1
            # DDP reduces gradients once per step, in the last backward. FSDP reduces them in every backward: without,
            # each process would hold unsharded gradients.
            reduces = is_last or self._accelerator.is_fsdp2
            with nullcontext() if reduces else self._accelerator.no_sync(self._denoiser):
                loss_B, metrics = self._forward(batch, pair_loss)
                total = robust.add(loss_B, batch.weight_B) if robust else loss_B.sum()
                # Gradients are averaged over processes: undo it, to get the mean over all states of the step.
                scale = self._accelerator.num_processes / self._batching.states_per_step
                self._accelerator.backward(total * scale)
            loss_B = loss_B.detach()
            meter.add(_with_loss(loss_B, metrics))
            # Keep numbers only, so that the latents and the graph of the micro-batch are freed.
            losses += zip(batch.pair_ids, loss_B.tolist(), strict=True)
        lr = self._schedule.get_last_lr()[0]
        means = meter.means(self._accelerator) | (robust.finish() if robust else {})
        grad_norm = self._update(step, losses)
        record: Record = {"step": step + 1, **means, "grad_norm": grad_norm, "lr": lr}
        if self._pair_loss.beta_decay or self._beta:
            record["beta"] = pair_loss.objective.options.beta
        if self._beta:
            self._beta.update(step + 1, means.get("rewards/margins_rms"))
        record["skipped_steps"] = self._skipped.total
        elapsed = time.perf_counter() - start
        record["states_per_second"] = self._batching.states_per_step / elapsed
        record["data_wait_percent"] = 100 * data_seconds / elapsed
        record["memory_gib"] = peak_memory_gib(self._accelerator.device)
        if self._utilization and (share := self._utilization.share(elapsed)) is not None:
            record["mfu_percent"] = 100 * share
        return record

    def _loss_of(self, step: int) -> PairLoss:
        """Return the loss of optimizer step ``step``, from 1."""
        return self._pair_loss.with_beta(self._beta.beta) if self._beta else self._pair_loss.at_step(step)

    def _robust_mean(self) -> RobustMean | None:
        loss = self._settings.loss
        if loss.robust is None:
            return None
        states = self._batching.states_per_step
        return RobustMean(loss.robust, loss.robust_form, states, self._accelerator, self._parameters)

    @torch.no_grad()
    def validate(self, held_out: HeldOut) -> Record:
        """Compute the last step's loss and metrics on held-out pairs, with the weights that would be saved.

        Names are ``val/...``.
        """
        meter = StepMeter()
        with self.as_saved():
            for number in range(held_out.num_forwards):
                # Collective with FSDP: a process with fewer batches repeats its last, so that all do as many forwards.
                batch = held_out.batches[min(number, len(held_out.batches) - 1)].to(self._accelerator.device)
                loss_B, metrics = self._forward(batch, self._loss)
                if number < len(held_out.batches):
                    meter.add(_with_loss(loss_B, metrics))
        return {f"val/{name}": value for name, value in meter.means(self._accelerator).items()}

    def _forward(self, batch: StateBatch, pair_loss: PairLoss) -> tuple[torch.Tensor, Metrics]:
        """Compute the loss of each state of a micro-batch, [B], and metrics."""
        family = self._policy.family
        conditioning = condition(self._policy, batch)
        if self._utilization and torch.is_grad_enabled():
            self._utilization.add(batch, conditioning)
        ref_error_B2, ref_norm_B2 = batch.ref_error_B2, batch.ref_norm_B2
        if self._policy.reference is not None:
            with self._policy.as_reference(), torch.no_grad(), self._accelerator.autocast():
                reference = pair_outputs(family, self._policy.reference, batch, conditioning)
            ref_error_B2, ref_norm_B2 = reference.error_B2, reference.norm_B2
        with self._accelerator.autocast():
            outputs = pair_outputs(family, self._denoiser, batch, conditioning)
        error_B2 = outputs.error_B2
        pairs = PairBatch(
            error_B2=error_B2,
            ref_error_B2=ref_error_B2,
            preference_B=batch.preference_B,
            label_B=batch.label_B,
            timestep_B=batch.timestep_B,
            cross_B=outputs.cross_B,
            norm_B2=outputs.norm_B2,
            ref_norm_B2=ref_norm_B2,
        )
        loss_B, metrics = pair_loss(pairs, batch.weight_B)
        difference_B2 = error_B2.detach() - ref_error_B2
        for image in (0, 1):
            metrics[f"error/image_{image}"] = error_B2.detach()[:, image]
            metrics[f"error_minus_reference/image_{image}"] = difference_B2[:, image]
        metrics["drift"] = difference_B2.abs().mean(dim=1)
        preferred_B = pair_loss.objective.preferred(pairs)
        metrics["error_minus_reference/chosen"] = select_preferred(difference_B2, preferred_B)
        metrics["error_minus_reference/rejected"] = select_preferred(difference_B2, -preferred_B)
        return loss_B, metrics | by_band(metrics, batch.timestep_B, family.noise_schedule.num_train_timesteps)

    def _update(self, step: int, losses: Losses) -> float:
        """Clip the gradient and step if all losses and gradients are finite; return the norm before clipping."""
        limit = self._settings.optimizer.max_grad_norm or float("inf")
        # Collective with FSDP, like the sum below: all processes must decide alike whether to skip the step.
        grad_norm = float(full_tensor(self._accelerator.clip_grad_norm_(self._parameters, limit)))
        bad = [pair_id for pair_id, value in losses if not math.isfinite(value)]
        count = torch.tensor(float(len(bad)), device=self._accelerator.device)
        any_bad = bool(self._accelerator.reduce(count, "sum").item())
        if math.isfinite(grad_norm) and not any_bad:
            self._optimizer.step()
            self._schedule.step()
            if self._average:
                self._average.step()
            self._skipped.reset_row()
        else:
            self._skip(step, [pair_id for pair_id, _ in losses], bad, overflowed=not math.isfinite(grad_norm))
        self._optimizer.zero_grad()
        return grad_norm

    def _skip(self, step: int, pairs: list[str], bad: list[str], *, overflowed: bool) -> None:
        """Record a step that was not taken.

        Args:
            step: number of the step, from 0.
            pairs: pair ids of this process.
            bad: those of them whose loss is not finite.
            overflowed: whether the gradient is not finite.
        """
        bad_everywhere = gather_object(bad)
        scaler = self._accelerator.scaler
        if scaler is not None:
            scaler.update()
            # An overflow is normal in fp16: the scaler has just lowered its scale. Below scale 1 it is a real one.
            if overflowed and not bad_everywhere and scaler.get_scale() >= 1:
                self._skipped.count_overflow()
                return
        self._skipped.add(SkippedStep(step + 1, bad_everywhere, gather_object(pairs)))
        on_main(self._accelerator, self._skipped.write)
        on_main(self._accelerator, self._skipped.require_few)

    @contextmanager
    def as_saved(self) -> Iterator[None]:
        """Context in which the model has the weights that would be saved (with ``--ema-decay`` their average)."""
        with self._average.applied() if self._average else nullcontext():
            yield
        reshard(self._denoiser)

    def checkpoint(self, step: int, identity: dict[str, object]) -> Checkpoint:
        """Collect everything needed to resume after ``step`` finished steps.

        Collective with FSDP: all processes must call it. Only the main process gets the tensors.
        """
        scaler = self._accelerator.scaler
        states = {
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "average": self._average.state_dict() if self._average else None,
            "skipped": self._skipped.state_dict(),
            "beta": self._beta.state_dict() if self._beta else None,
            "spikes": self.spikes.state_dict(),
            "best": self.best.state_dict(),
        }
        # No random state: the order of states is a function of the step, and training draws no random numbers.
        keep = self._accelerator.is_main_process
        trained = self._policy.trainable_parameters()
        average = dict(zip(trained, self._average.tensors, strict=True)) if self._average else None
        return Checkpoint(
            step,
            identity,
            weights=gather_full(dict(trained), keep=keep),
            average=gather_full(average, keep=keep),
            optimizer=gather_full(states, keep=keep),
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore a checkpoint.

        Raises:
            UserError: its weights do not fit this model.
        """
        self._policy.load_weights(checkpoint.weights)
        optimizer = checkpoint.optimizer["optimizer"]
        if self._accelerator.device.type == "cpu":
            # On the CPU, loading keeps the tensors: copy them, they are mapped from a file that a later save removes.
            optimizer = copy.deepcopy(optimizer)
        if self._accelerator.is_fsdp2:
            optimizer = self._shard_moments(optimizer)
        self._optimizer.load_state_dict(optimizer)
        self._schedule.load_state_dict(checkpoint.optimizer["schedule"])
        # This run may have another --max-steps than the one that wrote the checkpoint.
        self._recompute_lr()
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(checkpoint.optimizer["scaler"])
        if self._average:
            averaged = checkpoint.average or {}
            tensors = [averaged[name] for name in self._policy.trainable_parameters()]
            self._average.load_state_dict(checkpoint.optimizer["average"], tensors)
        self._skipped.load_state_dict(checkpoint.optimizer["skipped"])
        if self._beta:
            self._beta.load_state_dict(checkpoint.optimizer["beta"])
        if "spikes" in checkpoint.optimizer:  # not in checkpoints of older versions
            self.spikes.load_state_dict(checkpoint.optimizer["spikes"])
            self.best.load_state_dict(checkpoint.optimizer["best"])
            on_main(self._accelerator, self.spikes.write)
        on_main(self._accelerator, self._skipped.write)

    def scale_lr(self, factor: float) -> None:
        """Multiply the configured learning rate of this and all later steps; checkpoints keep it."""
        self._schedule.base_lrs = [factor * self._peak_lr for _ in self._schedule.base_lrs]
        self._recompute_lr()

    def _recompute_lr(self) -> None:
        self._schedule.last_epoch -= 1
        self._schedule.step()

    def _shard_moments(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        """Shard the moments of an AdamW state like their parameters."""
        state = {
            number: {
                # The step count is a tensor, too; it has no dimension to shard.
                name: shard_like(value, self._parameters[number]) if value.ndim else value
                for name, value in moments.items()
            }
            for number, moments in optimizer["state"].items()
        }
        return {**optimizer, "state": state}
