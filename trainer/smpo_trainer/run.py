"""A training run: check the settings and inputs, train, write the result."""

from __future__ import annotations

import fcntl
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers.utils.logging
import transformers.utils.logging
from accelerate import Accelerator
from accelerate.utils import set_seed

from smpo_common.errors import UserError
from smpo_common.run_lock import hold
from smpo_models.family import Family
from smpo_schemas.trained_model import LORA_FILE
from smpo_trainer.data.bucketed_order import group_size, make_order
from smpo_trainer.data.loader import Feed, StateDataset
from smpo_trainer.data.order import Batching
from smpo_trainer.data.state_table import StateTable, index_states
from smpo_trainer.experiment import Experiment, resolve_experiment
from smpo_trainer.model.adapter import convert_finished, require_adapter
from smpo_trainer.model.optimizers import require_optimizer
from smpo_trainer.model.policy import Policy, load_policy
from smpo_trainer.model.quantization import require_quantization
from smpo_trainer.model.reference import prepare_reference_errors
from smpo_trainer.monitoring.console import RunConsole
from smpo_trainer.output.run_folder import OutputFolder, evaluation_command, training_summary
from smpo_trainer.output.sharing import open_result, push_result
from smpo_trainer.remarks import bucket_remark, remarks
from smpo_trainer.runtime.distributed import end_run, on_all, on_main
from smpo_trainer.runtime.launch import choose_dtype, describe, make_accelerator
from smpo_trainer.runtime.memory import explain_out_of_memory
from smpo_trainer.safeguards.spikes import USUAL_STEPS
from smpo_trainer.settings import TrainSettings
from smpo_trainer.shards.fetch import ShardStore
from smpo_trainer.train_loop import TrainLoop
from smpo_trainer.validation.held_out import HeldOut, sample_evenly, split_by_prompt
from smpo_trainer.validation.images import Sampling, ValidationImages


def run_training(settings: TrainSettings) -> None:
    """Start a run, resume an unfinished one, or do nothing if it is finished.

    Raises:
        UserError: the settings, the inputs or the machine do not allow the run.
        SystemExit: the run was stopped by a signal and can be resumed; status 130 for Ctrl-C, 143 for SIGTERM.
    """
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    settings = choose_dtype(settings)
    accelerator = make_accelerator(settings)
    console = RunConsole(is_main=accelerator.is_main_process)
    console.say(describe(accelerator, settings))
    # on_all and on_main are collective: every process reaches each of them, in the same order.
    on_all(accelerator, lambda: require_optimizer(settings.optimizer, accelerator.device))
    on_all(accelerator, lambda: require_adapter(settings))
    on_all(accelerator, lambda: require_quantization(settings))
    experiment = on_all(accelerator, lambda: resolve_experiment(settings, console.say))
    states_per_step = settings.steps.batch_size * settings.steps.grad_accum * accelerator.num_processes
    identity = on_main(accelerator, lambda: experiment.identity(states_per_step))
    for line in [*experiment.describe(states_per_step), *remarks(experiment, states_per_step)]:
        console.say(line)
    output = _output_folder(settings)
    stopped_by = 0
    with ExitStack() as stack:
        # Only the main process writes into the folder, so it alone takes the lock.
        on_main(accelerator, lambda: stack.enter_context(hold(settings.out, fcntl.lockf)))
        finished = on_main(accelerator, lambda: not settings.overwrite and output.is_finished(identity))
        repository = on_main(accelerator, lambda: open_result(settings))
        if repository:
            console.say(f"the result will be pushed to {repository}")
        if finished:
            on_main(accelerator, output.checkpoints.drop_leftovers)
            if written := on_main(accelerator, lambda: convert_finished(settings)):
                console.say(f"wrote {written}")
            console.say(f"{settings.out} holds this run, finished; nothing to do (start over with --overwrite)")
        else:
            set_seed(settings.steps.seed)  # for the initial weights of an adapter
            # Closing cancels pending downloads, or a failed run would block until they finish.
            store = stack.enter_context(
                closing(
                    ShardStore(
                        experiment.shards.places,
                        int(settings.data.cache_gib * 2**30),
                        experiment.shards.text_files if experiment.shards.text else (),
                    )
                )
            )
            holds = {"uses_fsdp": accelerator.is_fsdp2, "holds_text_encoders": experiment.shards.text is None}
            with explain_out_of_memory(settings, str(accelerator.device), **holds):
                stopped_by = _train(experiment, identity, store, output, accelerator, console)
    end_run(accelerator)
    if stopped_by:
        raise SystemExit(128 + stopped_by)  # the shell's convention; 0 would mean a finished run
    if repository and accelerator.is_main_process:
        # After the last collective: an upload may outlast the time that processes wait for each other.
        push_result(settings, repository, console.say)


def _output_folder(settings: TrainSettings) -> OutputFolder:
    return OutputFolder(
        settings.out,
        settings.output.checkpoints_total_limit,
        keep_checkpoints=settings.output.keep_checkpoints,
        reach=USUAL_STEPS if settings.safeguards.on_spike == "rollback" else 0,
    )


def _train(
    experiment: Experiment,
    identity: dict[str, Any],
    store: ShardStore,
    output: OutputFolder,
    accelerator: Accelerator,
    console: RunConsole,
) -> int:
    """Train from the start or from the last checkpoint, and write the result.

    Returns:
        The number of the signal that stopped the run early, or 0.
    """
    settings = experiment.settings
    policy = on_all(accelerator, lambda: _load(experiment, store, accelerator, console))
    table = on_all(accelerator, lambda: _index(experiment, policy.family, console))
    held_out = None
    if settings.held_out.val_fraction:
        table, held_out_table = on_all(accelerator, lambda: split_by_prompt(table, settings.held_out.val_fraction))
        held_out = on_all(accelerator, lambda: _hold_out(experiment, held_out_table, store, accelerator, console))
    sampling = None
    if experiment.image_prompts:
        sampling = on_all(accelerator, lambda: Sampling.choose(settings.images, policy.family))
        console.say(f"validation images: {len(experiment.image_prompts)} prompts, {sampling}")
    # Only now touch the output folder: a run that cannot start must not overwrite another one.
    on_main(accelerator, lambda: _begin(settings, output))
    checkpoint = _find_checkpoint(output, accelerator)
    batching = _make_batching(settings, table, accelerator, console)
    dataset = StateDataset(experiment.shards, table)
    feed = Feed(dataset, batching, store, accelerator.process_index, settings.data.workers)
    resuming = checkpoint is not None
    noise = prepare_reference_errors(experiment, policy, feed, accelerator, output, console, resuming=resuming)
    if held_out and dataset.ref_error_S2 is not None:
        # In a resumed run too: the policy is still the reference until the checkpoint is loaded.
        held_out.recompute_reference(policy)
    if settings.compute.reference != "live":
        policy = replace(policy, reference=None)  # free its memory
    images = ValidationImages(experiment, policy, accelerator, sampling) if sampling else None
    loop = TrainLoop(experiment, policy, feed, held_out, images, accelerator, output, console, identity)
    last = loop.train(noise, checkpoint)
    if loop.stopped_by:
        return loop.stopped_by
    # With --validation-reward the run may have ended before --max-steps.
    steps = int(last.get("step") or settings.steps.max_steps)
    summary = training_summary(experiment, policy, batching, identity, steps)
    summary |= {"best": loop.best, "warnings": loop.warnings, "metrics": last}
    on_main(accelerator, lambda: output.finish(summary, settings.sharing.license_))
    on_main(accelerator, lambda: convert_finished(settings))  # the best model may be of a run in another format
    console.say(f"saved {settings.out / (LORA_FILE if policy.lora_rank else policy.family.denoiser_folder)}")
    console.say(f"next: {evaluation_command(experiment)}")
    return 0


def _begin(settings: TrainSettings, output: OutputFolder) -> None:
    if settings.overwrite:
        output.clear()
    else:
        output.begin()
    settings.write(settings.out)


def _find_checkpoint(output: OutputFolder, accelerator: Accelerator) -> Path | None:
    """Return the checkpoint to resume from, the same in all processes, or None for a new run.

    Raises:
        UserError: a process does not see the checkpoint that the main process sees.
    """
    path = on_main(accelerator, output.checkpoints.latest)

    def require_seen() -> None:
        if path and not path.is_dir():
            raise UserError(
                f"process {accelerator.process_index} does not see the checkpoint {path}: --out must be a folder that "
                "all machines share"
            )

    on_all(accelerator, require_seen)
    return path


def _make_batching(
    settings: TrainSettings, table: StateTable, accelerator: Accelerator, console: RunConsole
) -> Batching:
    states_per_step = settings.steps.batch_size * settings.steps.grad_accum * accelerator.num_processes
    bucket_S = table.buckets()
    group = group_size(states_per_step, settings.steps.batch_size)
    remark = bucket_remark(bucket_S, group)
    if remark:
        console.say(remark)
    order = make_order(bucket_S, table.states_per_shard, settings.steps.seed, settings.data.shuffle_window, group)
    return Batching(order, settings.steps.batch_size, settings.steps.grad_accum, accelerator.num_processes)


def _load(experiment: Experiment, store: ShardStore, accelerator: Accelerator, console: RunConsole) -> Policy:
    settings, text = experiment.settings, experiment.shards.text
    policy = load_policy(settings, experiment.shards.model, accelerator.device, console.say, text=text is None)
    if text:
        policy.family.stored_text = partial(text.read, wait_for=store.wait_for)
    policy.family.encodes_empty_prompt = experiment.shards.encodes_empty_prompt
    if experiment.shards.model.embedded_guidance is not None:
        policy.family.embedded_guidance = experiment.shards.model.embedded_guidance
    if settings.compute.compile:
        policy.compile()
    return policy


def _index(experiment: Experiment, family: Family, console: RunConsole) -> StateTable:
    """List the states to train on.

    Raises:
        UserError: there are none, or their latents do not fit the model.
    """
    shards, settings = experiment.shards, experiment.settings
    table = index_states(
        shards,
        experiment.objective,
        experiment.mix,
        experiment.weights,
        (settings.data.min_timestep, settings.data.max_timestep),
        say=console.say,
    )
    channels = family.latent_shape(0, 0)[0]
    wrong = [latent for latent in table.latents if latent[0] != channels]
    if wrong:
        # The manifest names this model, or the run would have ended before: the shards contradict their manifest.
        raise UserError(
            f"--shards {' '.join(settings.shards)}: latents have the shape {wrong[0]}, but --model {settings.model} "
            f"takes {channels} channels; the shards contradict their manifest: make them again with `smpo-pipeline "
            "invert`"
        )
    return table


def _hold_out(
    experiment: Experiment, table: StateTable, store: ShardStore, accelerator: Accelerator, console: RunConsole
) -> HeldOut:
    settings = experiment.settings
    chosen = sample_evenly(table, settings.held_out.val_states).tolist()
    console.say(f"{len(table)} states are held out by their prompts; {len(chosen)} of them are evaluated")
    return HeldOut(experiment.shards, table, chosen, store, settings.steps.batch_size, accelerator)
