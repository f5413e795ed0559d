"""A whole training run: check everything, then train, then write the result."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers.utils.logging
import torch
import transformers.utils.logging
from accelerate import Accelerator
from accelerate.utils import set_seed

from smpo_common.errors import UserError
from smpo_common.run_lock import hold
from smpo_models.family import Family
from smpo_trainer.data.bucketed_order import group_size, make_order
from smpo_trainer.data.loader import Feed, StateDataset
from smpo_trainer.data.order import Plan
from smpo_trainer.data.state_table import StateTable, index_states
from smpo_trainer.distributed import leave, on_main, together
from smpo_trainer.experiment import Experiment, resolve_experiment
from smpo_trainer.interrupts import StopRequest
from smpo_trainer.launch import describe, make_accelerator
from smpo_trainer.memory import memory_in_a_line
from smpo_trainer.model.optimizers import require_optimizer
from smpo_trainer.model.policy import LORA_FILE, UNET_FOLDER, Policy, load_policy
from smpo_trainer.model.reference import settle_reference
from smpo_trainer.model.text import CachedText, cache_text
from smpo_trainer.monitoring.console import Report
from smpo_trainer.monitoring.health import Health
from smpo_trainer.monitoring.metrics import METRICS_FILE, MetricsLog, Record, plain
from smpo_trainer.monitoring.trackers import start_wandb
from smpo_trainer.output.checkpoints import load_checkpoint
from smpo_trainer.output.run_folder import OutputFolder
from smpo_trainer.preference.reward_mix import RewardMix
from smpo_trainer.remarks import bucket_remark, remarks
from smpo_trainer.settings import TrainSettings
from smpo_trainer.shards.fetch import ShardStore
from smpo_trainer.trainer import Trainer
from smpo_trainer.validation.held_out import HeldOut, split_by_prompt, spread
from smpo_trainer.validation.images import ValidationImages


def run_training(settings: TrainSettings, write_config: Callable[[Path], None]) -> None:
    """Train as ``settings`` say, go on with an unfinished run, or leave a finished one alone.

    Args:
        settings: the experiment.
        write_config: writes the resolved configuration into the folder that it is given.

    Raises:
        UserError: anything that the user can mend.
        SystemExit: the run was asked to stop and can go on; the status is 130 for Ctrl-C, 143 for SIGTERM.
    """
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    accelerator = make_accelerator(settings)
    report = Report(is_main=accelerator.is_main_process)
    report.say(describe(accelerator, settings))
    together(accelerator, lambda: require_optimizer(settings, accelerator.device))
    experiment = together(accelerator, lambda: resolve_experiment(settings, report.say))
    states_per_step = settings.batch_size * settings.grad_accum * accelerator.num_processes
    identity = on_main(accelerator, lambda: experiment.identity(states_per_step))
    for line in [*experiment.describe(states_per_step), *remarks(experiment, states_per_step)]:
        report.say(line)
    output = OutputFolder(settings.out, settings.checkpoints_total_limit, keeps_after_the_end=settings.keep_checkpoints)
    stopped_by = 0
    with ExitStack() as held:
        on_main(accelerator, lambda: held.enter_context(hold(settings.out, fcntl.lockf)))
        if on_main(accelerator, lambda: not settings.overwrite and output.is_finished(identity)):
            on_main(accelerator, output.checkpoints.drop_leftovers)
            report.say(f"{settings.out} holds this run, finished; nothing to do (--overwrite begins anew)")
        else:
            set_seed(settings.seed)
            # Without the end of its fetches, a run that failed would wait for all of them.
            store = held.enter_context(closing(ShardStore(experiment.shards.places, int(settings.cache_gib * 2**30))))
            with memory_in_a_line(settings, str(accelerator.device)):
                stopped_by = _train(experiment, identity, store, output, write_config, accelerator, report)
    leave(accelerator)
    if stopped_by:
        raise SystemExit(128 + stopped_by)  # as a shell says it: not 0, which would be a finished run


def _train(
    experiment: Experiment,
    identity: dict[str, Any],
    store: ShardStore,
    output: OutputFolder,
    write_config: Callable[[Path], None],
    accelerator: Accelerator,
    report: Report,
) -> int:
    """Train from the start, or from where the run was left, and write the result.

    Returns:
        The number of the signal that stopped the run before its end; 0: none did.
    """
    settings = experiment.settings
    policy = together(accelerator, lambda: _load(experiment, accelerator, report))
    table = together(accelerator, lambda: _index(experiment, policy.family, report))
    held_out = None
    if settings.val_fraction:
        table, held_out_table = together(accelerator, lambda: split_by_prompt(table, settings.val_fraction))
        held_out = together(accelerator, lambda: _hold_out(experiment, held_out_table, store, accelerator, report))
    on_main(accelerator, lambda: _begin(settings, output, write_config))
    checkpoint = _find_checkpoint(output, accelerator)
    plan = _make_plan(settings, table, accelerator, report)
    dataset = StateDataset(experiment.shards, table)
    feed = Feed(dataset, plan, store, accelerator.process_index, settings.workers)
    going_on = checkpoint is not None
    noise = settle_reference(experiment, policy, feed, accelerator, output, report, going_on=going_on)
    if held_out and dataset.ref_error_S2 is not None:
        held_out.recompute_reference(policy)  # which is as it starts, also where the run goes on
    if settings.reference != "live":
        policy = replace(policy, reference=None)  # what it was for is done
    images = ValidationImages(experiment, policy, accelerator) if experiment.validation_prompts else None
    run = _Run(experiment, policy, feed, held_out, images, accelerator, output, report, identity)
    last = run.train(noise, checkpoint)
    if run.stopped_by:
        return run.stopped_by
    found = {
        "warnings": run.health.warnings,
        "metrics": last,
    }
    on_main(accelerator, lambda: output.finish({**_summary(experiment, policy, plan, identity), **found}))
    report.say(f"saved {settings.out / (LORA_FILE if policy.lora_rank else UNET_FOLDER)}")
    return 0


def _begin(settings: TrainSettings, output: OutputFolder, write_config: Callable[[Path], None]) -> None:
    if settings.overwrite:
        output.clear()
    else:
        output.begin()
    write_config(settings.out)


def _find_checkpoint(output: OutputFolder, accelerator: Accelerator) -> Path | None:
    """What the run goes on from, which all processes must agree on; None: it begins.

    Raises:
        UserError: a process does not see what the main process does.
    """
    path = on_main(accelerator, output.checkpoints.latest)

    def require_seen() -> None:
        if path and not path.is_dir():
            raise UserError(
                f"process {accelerator.process_index} does not see {path}, from which the run goes on: --out must be "
                "a folder that all machines share"
            )

    together(accelerator, require_seen)
    return path


def _make_plan(settings: TrainSettings, table: StateTable, accelerator: Accelerator, report: Report) -> Plan:
    states_per_step = settings.batch_size * settings.grad_accum * accelerator.num_processes
    bucket_S = table.buckets()
    group = group_size(states_per_step, settings.batch_size)
    remark = bucket_remark(bucket_S, group)
    if remark:
        report.say(remark)
    order = make_order(bucket_S, table.states_per_shard, settings.seed, settings.shuffle_window, group)
    return Plan(order, settings.batch_size, settings.grad_accum, accelerator.num_processes)


class _Run:
    """What the steps of one run share.

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
        report: Report,
        identity: dict[str, Any],
    ) -> None:
        self._settings = experiment.settings
        self._trainer = Trainer(experiment, policy, feed.plan, accelerator)
        self._policy, self._feed, self._held_out, self._images = policy, feed, held_out, images
        self._accelerator, self._output = accelerator, output
        self._report, self._identity = report, identity
        self.health = Health(
            warmup_steps=self._settings.warmup_steps,
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
        first, last = self._resume(checkpoint) if checkpoint else 0, self._settings.max_steps
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
                    if self.stopped_by or (step + 1) % self._settings.save_every == 0 or step + 1 == last:
                        self._save(step + 1, log)
                    if self.stopped_by:
                        same = "the same command" + (" without --overwrite" if self._settings.overwrite else "")
                        self._report.say(f"stopped after step {step + 1} of {last}; {same} goes on from here")
                        return record
        finally:
            self._report.stop()
            if log:
                log.close()
        return record

    def _look_at_held_out(self, step: int) -> Record:
        """After ``step`` steps: what is logged of the held-out pairs, where it is time for it."""
        if self._held_out is None or (step % self._settings.val_every and step != self._settings.max_steps):
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
        project, out = self._settings.wandb_project, self._output.path
        return MetricsLog(out, finished_steps, start_wandb(project, out, self._identity) if project else None)

    def _resume(self, path: Path) -> int:
        """Go back to a checkpoint; returns the number of finished steps."""
        checkpoint = together(self._accelerator, lambda: load_checkpoint(path, self._policy))
        self._trainer.restore(checkpoint)
        settings, before = self._settings, checkpoint.identity["max_steps"]
        self._report.say(f"going on after step {checkpoint.step} of {settings.max_steps}")
        if before != settings.max_steps and settings.lr_schedule != "constant":
            self._report.say(
                f"--lr-schedule {settings.lr_schedule}: from here on it is that of {settings.max_steps} steps, so far "
                f"it was that of {before}"
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


def _load(experiment: Experiment, accelerator: Accelerator, report: Report) -> Policy:
    settings = experiment.settings
    policy = load_policy(settings, experiment.shards.model, accelerator.device, report.say)
    policy.family.encodes_empty_prompt = experiment.shards.encodes_empty_prompt
    if settings.compile:
        policy.compile()
    if settings.text == "cache":
        path = cache_text(settings, experiment.shards, policy.family, report)
        policy = policy.with_cached_text(CachedText(path, accelerator.device))
    return policy


def _index(experiment: Experiment, family: Family, report: Report) -> StateTable:
    """List the states to train on.

    Raises:
        UserError: there are none, or they are not of this model's latent space.
    """
    shards, settings = experiment.shards, experiment.settings
    table = index_states(
        shards,
        experiment.objective,
        experiment.mix,
        experiment.weights,
        (settings.min_timestep, settings.max_timestep),
        say=report.say,
    )
    channels = family.latent_shape(0, 0)[0]
    others = [latent for latent in table.latents if latent[0] != channels]
    if others:
        # The manifest says that they are of this model, or the run would not have come this far.
        raise UserError(
            f"{' '.join(map(str, settings.shards))}: there are latents of the shape {others[0]}, but --model "
            f"{settings.model} takes {channels} channels; the shards are not what their manifest says, make them anew"
        )
    return table


def _hold_out(
    experiment: Experiment, table: StateTable, store: ShardStore, accelerator: Accelerator, report: Report
) -> HeldOut:
    settings = experiment.settings
    chosen = spread(table, settings.val_states).tolist()
    report.say(f"{len(table)} states are held out by their prompts; {len(chosen)} of them are looked at")
    return HeldOut(experiment.shards, table, chosen, store, settings.batch_size, accelerator)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _summary(experiment: Experiment, policy: Policy, plan: Plan, identity: dict[str, Any]) -> dict[str, Any]:
    """What ``training.json`` says of how the run was made, besides versions."""
    settings, shards = experiment.settings, experiment.shards
    return {
        "settings": identity,
        "model": settings.model,
        "kind": shards.model.kind,
        "objective": experiment.objective.name,
        "rewards": _described(experiment.mix) if experiment.mix else {},
        "shards": [
            {"path": source.name, "manifest_sha256": digest}
            for source, digest in zip(shards.sources, shards.manifest_hashes(), strict=True)
        ],
        "starts_from_reference": policy.starts_from_reference,
        "states": plan.num_states,
        "states_per_step": plan.states_per_step,
        "steps": settings.max_steps,
        "epochs": settings.max_steps * plan.states_per_step / plan.num_states,
    }


def _described(mix: RewardMix) -> dict[str, Any]:
    """Of each reward its weight, its model, and what its score differences were divided by in the mix."""
    return {
        name: {
            "weight": weight,
            "scale": mix.preference.scales[name],
            **mix.statistics[name].model_dump(include={"model", "unit", "min", "max"}),
        }
        for name, weight in mix.preference.weights.items()
    }
