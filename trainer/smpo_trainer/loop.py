"""The training loop.

Shape suffixes: B a micro-batch of states, 2 images.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler

from smpo_schemas.errors import UserError
from smpo_trainer.batches import StateBatch
from smpo_trainer.checkpoints import Checkpoint
from smpo_trainer.errors import condition, pair_errors
from smpo_trainer.experiment import Experiment
from smpo_trainer.metrics import Record, StepMeter
from smpo_trainer.objectives.base import Metrics, PairBatch
from smpo_trainer.plan import Plan
from smpo_trainer.policy import Policy

_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
"""Our names to diffusers'; all of them begin with the warm-up."""

_NAMED_PAIRS = 8
"""How many pair ids an error lists."""


class Trainer:
    """Denoiser, optimizer and schedule of a run; ``train_step`` is one optimizer step."""

    def __init__(self, experiment: Experiment, policy: Policy, plan: Plan, accelerator: Accelerator) -> None:
        settings = experiment.settings
        self._settings, self._pair_loss = settings, experiment.pair_loss(policy.family.process)
        self._policy, self._plan, self._accelerator = policy, plan, accelerator
        self._parameters = list(policy.trained().values())
        optimizer = torch.optim.AdamW(self._parameters, lr=settings.peak_lr, weight_decay=settings.weight_decay)
        # Not prepared by accelerate, which would step it once a process.
        self._schedule = get_scheduler(
            _SCHEDULES[settings.lr_schedule],
            optimizer,
            num_warmup_steps=settings.warmup_steps,
            num_training_steps=settings.max_steps,
        )
        self._denoiser, self._optimizer = accelerator.prepare(policy.denoiser, optimizer)

    def train_step(self, step: int, batches: Iterator[StateBatch]) -> Record:
        """Make optimizer step ``step`` (from 0) and return what is logged of it.

        The gradient is that of the mean loss over all states of the step, however they are cut into micro-batches and
        processes.

        Raises:
            UserError: loss or gradient is not finite; the weights are then as before the step.
        """
        started, waited = time.perf_counter(), 0.0
        meter = StepMeter()
        losses: list[tuple[list[str], torch.Tensor]] = []
        for accumulation in range(self._plan.grad_accum):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            batch = batch.to(self._accelerator.device)
            is_last = accumulation == self._plan.grad_accum - 1
            with nullcontext() if is_last else self._accelerator.no_sync(self._denoiser):
                loss_B, metrics = self._forward(batch)
                # Processes' gradients are averaged: each gives its share of the sum times their number.
                share = self._accelerator.num_processes / self._plan.states_per_step
                self._accelerator.backward(loss_B.sum() * share)
            meter.add({"loss": loss_B.detach(), **metrics})
            # Only what the end of the step needs: the latents and the graph of a micro-batch are freed here.
            losses.append((batch.pair_ids, loss_B.detach()))
        _require_finite(step, losses)
        lr = self._schedule.get_last_lr()[0]
        grad_norm = self._update(step)
        record: Record = {"step": step + 1, **meter.means(self._accelerator), "grad_norm": grad_norm, "lr": lr}
        elapsed = time.perf_counter() - started
        record["pairs_per_second"] = self._plan.states_per_step / elapsed
        record["data_wait_percent"] = 100 * waited / elapsed
        if self._accelerator.device.type == "cuda":
            record["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return record

    def _forward(self, batch: StateBatch) -> tuple[torch.Tensor, Metrics]:
        """Loss of each pair of a micro-batch, [B], and metrics."""
        family = self._policy.family
        conditioning = condition(family, batch)
        with self._accelerator.autocast():
            error_B2 = pair_errors(family, self._denoiser, batch, conditioning)
        ref_error_B2 = batch.ref_error_B2
        if self._policy.reference is not None:
            with torch.no_grad(), self._accelerator.autocast():
                ref_error_B2 = pair_errors(family, self._policy.reference, batch, conditioning)
        pairs = PairBatch(error_B2, ref_error_B2, batch.preference_B, batch.label_B, batch.timestep_B)
        loss_B, metrics = self._pair_loss(pairs, batch.weight_B)
        moved_B2 = error_B2.detach() - ref_error_B2
        for image in (0, 1):
            metrics[f"error/image_{image}"] = error_B2.detach()[:, image]
            metrics[f"error_minus_reference/image_{image}"] = moved_B2[:, image]
        return loss_B, metrics

    def _update(self, step: int) -> float:
        """Clip, and step the optimizer and the schedule; returns the gradient's norm before clipping."""
        limit = self._settings.max_grad_norm or float("inf")
        grad_norm = float(self._accelerator.clip_grad_norm_(self._parameters, limit))
        # A gradient scaler (fp16) meets infinities in its normal course: it skips the step and lowers its scale.
        if self._accelerator.scaler is None and not torch.isfinite(torch.tensor(grad_norm)):
            raise UserError(f"step {step + 1}: the gradient is not finite; lower --lr (the last checkpoint is kept)")
        self._optimizer.step()
        if not self._optimizer.step_was_skipped:
            self._schedule.step()
        self._optimizer.zero_grad()
        return grad_norm

    def checkpoint(self, step: int, identity: dict[str, object]) -> Checkpoint:
        """Everything that is needed to go on after ``step`` finished steps."""
        scaler = self._accelerator.scaler
        states = {
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
        }
        position = step * self._plan.states_per_step
        return Checkpoint(step, position, identity, dict(self._policy.trained()), states)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint.

        Raises:
            UserError: its weights are not those of this model.
        """
        self._policy.load_trained(checkpoint.weights)
        self._optimizer.load_state_dict(checkpoint.optimizer["optimizer"])
        self._schedule.load_state_dict(checkpoint.optimizer["schedule"])
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(checkpoint.optimizer["scaler"])


def _require_finite(step: int, losses: list[tuple[list[str], torch.Tensor]]) -> None:
    """Refuse to go on with a loss that is no number; ``losses`` are pair ids and their losses, by micro-batch."""
    finite = [
        (pair_id, ok) for ids, loss_B in losses for pair_id, ok in zip(ids, loss_B.isfinite().tolist(), strict=True)
    ]
    bad = [pair_id for pair_id, ok in finite if not ok]
    if bad:
        more = f" and {len(bad) - _NAMED_PAIRS} more" if len(bad) > _NAMED_PAIRS else ""
        raise UserError(
            f"step {step + 1}: the loss is not finite for pair {', '.join(bad[:_NAMED_PAIRS])}{more}; training has "
            "diverged: lower --lr, raise --warmup-steps, or use a wider --mixed-precision (the last checkpoint is kept)"
        )
