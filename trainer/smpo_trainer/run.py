"""A whole training run: check everything, then train, then write the result."""

from __future__ import annotations

import fcntl
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers.utils.logging
import transformers.utils.logging
from accelerate import Accelerator
from accelerate.utils import set_seed

from smpo_common.errors import UserError
from smpo_common.run_lock import hold
from smpo_models.family import Family
from smpo_schemas.trained_model import LORA_FILE, UNET_FOLDER
from smpo_trainer.data.bucketed_order import group_size, make_order
from smpo_trainer.data.loader import Feed, StateDataset
from smpo_trainer.data.order import Batching
from smpo_trainer.data.state_table import StateTable, index_states
from smpo_trainer.distributed import leave, on_main, together
from smpo_trainer.experiment import Experiment, resolve_experiment
from smpo_trainer.launch import choose_dtype, describe, make_accelerator
from smpo_trainer.memory import memory_in_a_line
from smpo_trainer.model.optimizers import require_optimizer
from smpo_trainer.model.policy import Policy, load_policy
from smpo_trainer.model.reference import settle_reference
from smpo_trainer.model.text import CachedText, cache_text
from smpo_trainer.monitoring.console import RunConsole
from smpo_trainer.output.run_folder import OutputFolder, evaluation_command, training_summary
from smpo_trainer.remarks import bucket_remark, remarks
from smpo_trainer.settings import TrainSettings
from smpo_trainer.shards.fetch import ShardStore
from smpo_trainer.train_loop import TrainLoop
from smpo_trainer.validation.held_out import HeldOut, split_by_prompt, spread
from smpo_trainer.validation.images import ValidationImages


def run_training(settings: TrainSettings) -> None:
    """Train as ``settings`` say, go on with an unfinished run, or leave a finished one alone.

    Raises:
        UserError: anything that the user can change.
        SystemExit: the run was asked to stop and can go on; the status is 130 for Ctrl-C, 143 for SIGTERM.
    """
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    settings = choose_dtype(settings)
    accelerator = make_accelerator(settings)
    report = RunConsole(is_main=accelerator.is_main_process)
    report.say(describe(accelerator, settings.compute))
    together(accelerator, lambda: require_optimizer(settings.optimizer, accelerator.device))
    experiment = together(accelerator, lambda: resolve_experiment(settings, report.say))
    states_per_step = settings.steps.batch_size * settings.steps.grad_accum * accelerator.num_processes
    identity = on_main(accelerator, lambda: experiment.identity(states_per_step))
    for line in [*experiment.describe(states_per_step), *remarks(experiment, states_per_step)]:
        report.say(line)
    output = OutputFolder(
        settings.out, settings.output.checkpoints_total_limit, keeps_after_the_end=settings.output.keep_checkpoints
    )
    stopped_by = 0
    with ExitStack() as held:
        on_main(accelerator, lambda: held.enter_context(hold(settings.out, fcntl.lockf)))
        if on_main(accelerator, lambda: not settings.overwrite and output.is_finished(identity)):
            on_main(accelerator, output.checkpoints.drop_leftovers)
            report.say(f"{settings.out} holds this run, finished; nothing to do (--overwrite starts over)")
        else:
            set_seed(settings.steps.seed)
            # Without the end of its fetches, a run that failed would wait for all of them.
            store = held.enter_context(
                closing(ShardStore(experiment.shards.places, int(settings.data.cache_gib * 2**30)))
            )
            with memory_in_a_line(settings, str(accelerator.device)):
                stopped_by = _train(experiment, identity, store, output, accelerator, report)
    leave(accelerator)
    if stopped_by:
        raise SystemExit(128 + stopped_by)  # as a shell says it: not 0, which would be a finished run


def _train(
    experiment: Experiment,
    identity: dict[str, Any],
    store: ShardStore,
    output: OutputFolder,
    accelerator: Accelerator,
    report: RunConsole,
) -> int:
    """Train from the start, or from where the run was left, and write the result.

    Returns:
        The number of the signal that stopped the run before its end; 0: none did.
    """
    settings = experiment.settings
    policy = together(accelerator, lambda: _load(experiment, accelerator, report))
    table = together(accelerator, lambda: _index(experiment, policy.family, report))
    held_out = None
    if settings.held_out.val_fraction:
        table, held_out_table = together(accelerator, lambda: split_by_prompt(table, settings.held_out.val_fraction))
        held_out = together(accelerator, lambda: _hold_out(experiment, held_out_table, store, accelerator, report))
    on_main(accelerator, lambda: _begin(settings, output))
    checkpoint = _find_checkpoint(output, accelerator)
    plan = _make_batching(settings, table, accelerator, report)
    dataset = StateDataset(experiment.shards, table)
    feed = Feed(dataset, plan, store, accelerator.process_index, settings.data.workers)
    going_on = checkpoint is not None
    noise = settle_reference(experiment, policy, feed, accelerator, output, report, going_on=going_on)
    if held_out and dataset.ref_error_S2 is not None:
        held_out.recompute_reference(policy)  # which is as it starts, also where the run goes on
    if settings.compute.reference != "live":
        policy = replace(policy, reference=None)  # what it was for is done
    images = ValidationImages(experiment, policy, accelerator) if experiment.validation_prompts else None
    loop = TrainLoop(experiment, policy, feed, held_out, images, accelerator, output, report, identity)
    last = loop.train(noise, checkpoint)
    if loop.stopped_by:
        return loop.stopped_by
    made = training_summary(experiment, policy, plan, identity)
    on_main(accelerator, lambda: output.finish({**made, "warnings": loop.health.warnings, "metrics": last}))
    report.say(f"saved {settings.out / (LORA_FILE if policy.lora_rank else UNET_FOLDER)}")
    report.say(f"next: {evaluation_command(experiment)}")
    return 0


def _begin(settings: TrainSettings, output: OutputFolder) -> None:
    if settings.overwrite:
        output.clear()
    else:
        output.begin()
    settings.write(settings.out)


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


def _make_batching(
    settings: TrainSettings, table: StateTable, accelerator: Accelerator, report: RunConsole
) -> Batching:
    states_per_step = settings.steps.batch_size * settings.steps.grad_accum * accelerator.num_processes
    bucket_S = table.buckets()
    group = group_size(states_per_step, settings.steps.batch_size)
    remark = bucket_remark(bucket_S, group)
    if remark:
        report.say(remark)
    order = make_order(bucket_S, table.states_per_shard, settings.steps.seed, settings.data.shuffle_window, group)
    return Batching(order, settings.steps.batch_size, settings.steps.grad_accum, accelerator.num_processes)


def _load(experiment: Experiment, accelerator: Accelerator, report: RunConsole) -> Policy:
    settings = experiment.settings
    policy = load_policy(settings, experiment.shards.model, accelerator.device, report.say)
    policy.family.encodes_empty_prompt = experiment.shards.encodes_empty_prompt
    if settings.compute.compile:
        policy.compile()
    if settings.compute.text == "cache":
        path = cache_text(settings, experiment.shards, policy.family, report)
        policy = policy.with_cached_text(CachedText(path, accelerator.device))
    return policy


def _index(experiment: Experiment, family: Family, report: RunConsole) -> StateTable:
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
        (settings.data.min_timestep, settings.data.max_timestep),
        say=report.say,
    )
    channels = family.latent_shape(0, 0)[0]
    others = [latent for latent in table.latents if latent[0] != channels]
    if others:
        # The manifest says that they are of this model, or the run would not have come this far.
        raise UserError(
            f"{' '.join(map(str, settings.shards))}: there are latents of the shape {others[0]}, but --model "
            f"{settings.model} takes {channels} channels; the shards are not what their manifest says, make them again"
        )
    return table


def _hold_out(
    experiment: Experiment, table: StateTable, store: ShardStore, accelerator: Accelerator, report: RunConsole
) -> HeldOut:
    settings = experiment.settings
    chosen = spread(table, settings.held_out.val_states).tolist()
    report.say(f"{len(table)} states are held out by their prompts; {len(chosen)} of them are looked at")
    return HeldOut(experiment.shards, table, chosen, store, settings.steps.batch_size, accelerator)
