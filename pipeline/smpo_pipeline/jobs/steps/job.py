"""``smpo-pipeline steps`` on Ray Data: actors that sample a unit's trajectories and write one shard per unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import ray
from rich.console import Console

from smpo_common.files import sha256_file
from smpo_common.retry import retry_transient
from smpo_pipeline.generation.generator import quiet_libraries
from smpo_pipeline.generation.prompts import PromptFile, read_prompt_file
from smpo_pipeline.inversion.health import HealthSums
from smpo_pipeline.jobs.cluster.pools import model_pool
from smpo_pipeline.jobs.cluster.run_units import run_units
from smpo_pipeline.jobs.cluster.session import resolve_device
from smpo_pipeline.jobs.generate.parts import Prompts, prompt_rows
from smpo_pipeline.jobs.invert.models import (
    ModelIdentity,
    choose_text,
    describe_model,
    load_models,
    read_configs,
    weight_bytes,
)
from smpo_pipeline.jobs.invert.text import store_text, text_run
from smpo_pipeline.jobs.record.lock import locked
from smpo_pipeline.jobs.record.run_record import Run, UnitRecord, unit_records
from smpo_pipeline.jobs.record.work_log import WorkLog
from smpo_pipeline.jobs.score.table import RewardRecord
from smpo_pipeline.jobs.shards import assemble_manifest, open_shards
from smpo_pipeline.jobs.steps.actor import StepsActor, StepWork
from smpo_pipeline.jobs.steps.options import StepsOptions
from smpo_pipeline.options import absolute_spec
from smpo_pipeline.rewards import Reward, load_reward, parse_reward
from smpo_pipeline.step_pairs.gradient import gradient_delta
from smpo_pipeline.step_pairs.plan import plan_steps
from smpo_schemas.manifest import (
    MANIFEST_FILE,
    MANIFEST_VERSION,
    Manifest,
    StepSettings,
    StoredTextEntry,
    autocast_arithmetic,
    write_manifest,
)
from smpo_schemas.scoring.scores import RewardStatistics, reward_statistics
from smpo_schemas.shards.index import indexed_trajectories
from smpo_schemas.shards.reader import ShardDirectory


@dataclass(frozen=True)
class _Checked:
    """Facts that are needed before any work starts; ``weights`` and ``text_weights``: bytes."""

    model: ModelIdentity
    reward_name: str
    reward: RewardRecord
    steps: StepSettings
    side: int
    prompts: PromptFile
    weights: int
    text_weights: int


def steps(options: StepsOptions) -> Manifest:
    """Make shards of pairs from all prompts, or continue an unfinished run of the same command.

    Raises:
        UserError: the prompts, the model, the reward or the output directory cannot be used, or every pair was
            rejected.
    """
    running = options.running
    kind, _ = parse_reward(options.reward)
    device = resolve_device(running.device, running.ray_address)
    options = options.replace(device=device, reward=absolute_spec(options.reward))
    options.out.exists()  # fails early if the bucket does not exist
    quiet_libraries()
    options = choose_text(options)
    checked = _check(options, kind)
    run = Run(options.out, MANIFEST_FILE, _identity(options, checked))
    with locked(options.out):
        if finished := open_shards(run, text_run(options), overwrite=running.overwrite):
            return finished
        line = options.choices(checked.side, checked.steps.trained, len(checked.prompts.rows))
        Console(markup=False).print(line, highlight=False, soft_wrap=True)
        manifest = _run(options, run, checked)
        run.finish()
        return manifest


def _check(options: StepsOptions, kind: type[Reward]) -> _Checked:
    """Check the settings against the model's configs, then load model and reward on the driver to identify them."""
    models, drawn = options.models, options.trajectory
    prompts = read_prompt_file(options.prompts, options.running.limit)
    configs = read_configs(options)
    side = models.resolution or configs.resolution()
    sampler, trained = plan_steps(configs, models.model, side, steps=drawn.steps, eta=drawn.eta, trained=drawn.trained)
    delta = gradient_delta(kind, drawn.gradient_delta) if drawn.gradient_guidance else None
    reward = load_reward(options.reward, "cpu")
    family, sampling_denoiser = load_models(options)
    return _Checked(
        model=describe_model(options, family, sampling_denoiser),
        reward_name=kind.name,
        reward=RewardRecord(reward.model, reward.fingerprint, reward.unit, "fp32"),
        steps=StepSettings(
            grid=list(sampler.grid),
            trained=trained,
            candidates=drawn.candidates,
            continue_from=drawn.continue_from,
            gap=drawn.gap,
            gradient_delta=delta,
        ),
        side=side,
        prompts=prompts,
        weights=weight_bytes({family.denoiser, sampling_denoiser, family.vae}),
        text_weights=weight_bytes(family.text_modules),
    )


def _identity(options: StepsOptions, checked: _Checked) -> dict[str, object]:
    path = options.prompts
    listing = [[str(path), len(checked.prompts.rows), path.stat().st_size, sha256_file(path)]]
    return {
        "job": "steps",
        "schema_version": MANIFEST_VERSION,
        "input": {"files": listing, "limit": options.running.limit},
        "model": checked.model.model_dump(),
        "reward": {"name": checked.reward_name, **asdict(checked.reward)},
        "resolution": checked.side,
        "inversion": options.settings.model_dump(),
        "steps": checked.steps.model_dump(),
        "ref_error_arithmetic": autocast_arithmetic(options.settings.dtype),
        "seed": options.trajectory.seed,
        "prompts_per_shard": options.storing.prompts_per_shard,
        "pairs_per_prompt": options.trajectory.trajectories * len(checked.steps.trained),
    }


def _run(options: StepsOptions, run: Run, checked: _Checked) -> Manifest:
    """Make the shards that are missing, then write the manifest."""
    running, per_unit, total = options.running, options.storing.prompts_per_shard, len(checked.prompts.rows)
    pairs_per_prompt = options.trajectory.trajectories * len(checked.steps.trained)
    sizes = [min(per_unit, total - start) * pairs_per_prompt for start in range(0, total, per_unit)]
    text = None
    if options.storing.text == "stored":
        usable = [str(row.prompt) for row in checked.prompts.rows if row.reason is None]
        text = store_text(options, ["", *usable], checked.model, checked.text_weights)
    weights = checked.weights + (0 if text else checked.text_weights)
    table = prompt_rows(checked.prompts.rows)

    def build(source: ray.data.Dataset, work_log: WorkLog) -> ray.data.Dataset:
        pool = model_pool(running.chosen_device, running.concurrency, running.ray_address, weights, len(sizes))
        work = StepWork(
            options=options,
            model=checked.model,
            reward=checked.reward.fingerprint,
            steps=checked.steps,
            side=checked.side,
            prompts=Prompts(options.prompts, per_unit, ray.put((table, pa.table({})))),
            run=run,
            work_log=work_log,
            text=text,
        )
        return source.map_batches(
            StepsActor,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_kwargs={"work": work},
            **pool.options(),
        )

    rate = running.max_reject_rate
    records = run_units(
        run, sizes, build, unit_records, title="steps", address=running.ray_address, max_reject_rate=rate
    )
    manifest = _finish(options, run, records, checked, text)
    if text:
        text_run(options).remove()
    return manifest


@retry_transient
def _finish(
    options: StepsOptions,
    run: Run,
    records: Sequence[UnitRecord],
    checked: _Checked,
    text: StoredTextEntry | None,
) -> Manifest:
    """Write the rejects, then ``manifest.json``, which marks the run as finished."""
    manifest = assemble_manifest(
        run,
        records,
        model=checked.model.info(),
        resolution=checked.side,
        inversion=options.settings,
        seed=options.trajectory.seed,
        rewards={},
        health=HealthSums().bands(checked.model.num_train_timesteps),
        text=text,
        steps=checked.steps,
    )
    rewards = {checked.reward_name: _statistics(options, manifest, checked)}
    manifest = manifest.model_copy(update={"rewards": rewards})
    write_manifest(options.out, manifest)
    return manifest


def _statistics(options: StepsOptions, manifest: Manifest, checked: _Checked) -> RewardStatistics:
    """Describe the reward over the images of all pairs."""
    metas = [trajectory.meta for trajectory in indexed_trajectories(ShardDirectory(options.out, manifest))]
    scores_P2 = np.array([meta.scores[checked.reward_name] for meta in metas])
    return reward_statistics(scores_P2, np.array([meta.label for meta in metas]), **asdict(checked.reward))
