"""Refresh a reward: embed, compare, fit, check, write.

Shape suffixes: P human pairs, 2 images, D features, C comparisons.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import save
from scipy.special import expit

from smpo_common.errors import UserError
from smpo_common.files import write_bytes
from smpo_models.devices import choose_device
from smpo_pipeline.calibration.fit import fit_temperature
from smpo_pipeline.calibration.folds import split_by_prompt
from smpo_pipeline.calibration.labels import read_labelled
from smpo_pipeline.calibration.logistic import PENALTIES, Objective, cross_fit
from smpo_pipeline.calibration.measures import agreement, log_loss
from smpo_pipeline.embeddings.clip import load_clip
from smpo_pipeline.embeddings.extract import Extractor
from smpo_pipeline.jobs.record.lock import locked
from smpo_pipeline.options import absolute_spec
from smpo_pipeline.refreshing.comparisons import Comparisons, Images, compare
from smpo_pipeline.refreshing.inputs import STAGE, draw_samples, human_images
from smpo_pipeline.refreshing.options import RefreshOptions
from smpo_pipeline.rewards import Reward, load_reward
from smpo_pipeline.rewards.networks.clip import ClipCosineReward, clip_of
from smpo_schemas.frozen import StoredFile
from smpo_schemas.pairs import ReadingChoices
from smpo_schemas.rejects import REJECTS_FILE, Reject, write_rejects
from smpo_schemas.scoring.refresh import (
    HEAD_FILE,
    REFRESH_FILE,
    REFRESH_VERSION,
    RefreshInfo,
    RefreshMeasures,
    read_refresh,
    write_refresh,
)

_WORSE = 0.01
"""Largest loss of held-out agreement that is accepted without --allow-worse."""


def refresh(options: RefreshOptions, console: Console) -> RefreshInfo:
    """Fit a head to human pairs and samples, and write it.

    Args:
        options: the flags.
        console: for what was decided, and progress.

    Raises:
        UserError: an input cannot be used, the head makes the reward worse, or --out holds another.
    """
    device = choose_device(options.embedding.device)
    data = read_labelled(options.scores, [], options.labels)
    reward, clip = _load(options, device)
    folder = options.embedding.embeddings or options.scores / ".embeddings"
    extractor = Extractor(clip, None if reward is clip else reward, STAGE, device, folder, options.embedding)
    how = f"{clip.model} on {device}, {options.embedding.dtype}; {options.folds} folds; seed {options.seed}"
    console.print(f"{int(data.labelled.sum())} labelled pairs; embeddings by {how}", highlight=False, soft_wrap=True)
    human_embeddings = extractor(options.pairs, options.columns.choices())
    drawn_embeddings = extractor(options.candidates, ReadingChoices(), "--candidates")
    human, prompts, label_P, rejects = human_images(data, human_embeddings, str(options.scores))
    samples = draw_samples(drawn_embeddings, set(prompts), options.samples, options.seed)
    tau = options.tau or _fitted_tau(human, label_P, options.reward)
    comparisons = compare(human, label_P, prompts, samples, tau, options.adversarial)
    with console.status("fitting"):
        fit = _fit(comparisons, prompts, options.folds, options.seed)
    if fit.before.agreement - fit.after.agreement > _WORSE and not options.allow_worse:
        raise UserError(
            f"the refreshed reward agrees with {fit.after.agreement:.1%} of the held-out labels, {options.reward} with "
            f"{fit.before.agreement:.1%}; nothing is written; reduce --adversarial, or give --allow-worse"
        )
    if fit.l2 == max(PENALTIES):
        said = f"the strongest penalty does best on prompts held out: the data support no change of {options.reward}"
        console.print(said, highlight=False, soft_wrap=True)
    rejects += drawn_embeddings.rejects
    info = RefreshInfo(
        schema_version=REFRESH_VERSION,
        reward=absolute_spec(options.reward),
        fingerprint=reward.fingerprint,
        features=absolute_spec(options.features) if options.features else None,
        clip_fingerprint=clip.fingerprint,
        unit=reward.unit,
        head=StoredFile(name=HEAD_FILE, bytes=0, sha256=""),
        tau=tau,
        l2=fit.l2,
        adversarial=options.adversarial,
        samples=options.samples,
        folds=options.folds,
        seed=options.seed,
        human_pairs=len(label_P),
        human_prompts=len(set(prompts)),
        sampled_prompts=len(samples),
        comparisons=int((~comparisons.is_human).sum()),
        rejected=len(rejects),
        before=fit.before,
        after=fit.after,
        change=fit.change,
    )
    return _write(options, info, fit.v_D, rejects)


@dataclass(frozen=True)
class _Fit:
    """The head, and how it does on prompts held out, as in :class:`smpo_schemas.scoring.refresh.RefreshInfo`."""

    v_D: np.ndarray
    l2: float
    before: RefreshMeasures
    after: RefreshMeasures
    change: float


def _fit(comparisons: Comparisons, prompts: list[str], folds: int, seed: int) -> _Fit:
    """Choose the penalty on prompts held out, then fit to all."""
    fold_P = split_by_prompt(prompts, folds, seed)
    held_out = cross_fit(comparisons.rows, fold_P[comparisons.pair_C], comparisons.weigh)
    everything = comparisons.weigh(np.ones(len(comparisons.pair_C), dtype=bool))
    objective = Objective.of(comparisons.rows, everything, held_out.l2)
    v_D = objective.unscaled(objective.minimise()).v_D
    logits = np.asarray(comparisons.rows.offset_N), held_out.z_N
    p_before_P, p_after_P = (expit(z_C[comparisons.is_human]) for z_C in logits)
    before, after = (_measure(comparisons, z_C) for z_C in logits)
    return _Fit(v_D, held_out.l2, before, after, float(np.abs(p_after_P - p_before_P).mean()))


def _load(options: RefreshOptions, device: str) -> tuple[Reward, ClipCosineReward]:
    """Load the reward, and the CLIP of its head.

    Raises:
        UserError: one cannot be loaded, or there is no CLIP.
    """
    reward = load_reward(options.reward, device)
    clip = load_clip(options.features, device) if options.features else clip_of(reward)
    if clip is None:
        raise UserError(
            f"--reward {options.reward} has no CLIP of its own: give one for the head, --features clipscore"
        )
    return reward, clip


def _fitted_tau(human: Images, label_P: np.ndarray, reward: str) -> float:
    margin_P = human.score[:, 0] - human.score[:, 1]
    if not margin_P.any():
        raise UserError(f"--reward {reward} gives both images the same score in all {len(margin_P)} pairs; give --tau")
    return fit_temperature(margin_P, label_P)


def _measure(comparisons: Comparisons, z_C: np.ndarray) -> RefreshMeasures:
    human = comparisons.is_human
    p_P, label_P, sampled = expit(z_C[human]), comparisons.rows.y_N[human], z_C[~human]
    alike, decided = agreement(p_P, label_P)
    over = float(((sampled > 0) + 0.5 * (sampled == 0)).mean()) if len(sampled) else None
    return RefreshMeasures(agreement=alike / decided, log_loss=log_loss(p_P, label_P), golden_over_sample=over)


def _write(options: RefreshOptions, info: RefreshInfo, v_D: np.ndarray, rejects: list[Reject]) -> RefreshInfo:
    """Write the head, the rejects, and ``refresh.json`` last.

    Raises:
        UserError: the folder holds another refreshed reward.
    """
    out, head = options.out, save({"v": torch.from_numpy(v_D)})
    stored = StoredFile(name=HEAD_FILE, bytes=len(head), sha256=hashlib.sha256(head).hexdigest())
    info = info.model_copy(update={"head": stored})
    with locked(out):
        if (out / REFRESH_FILE).is_file() and not options.overwrite and read_refresh(out) != info:
            raise UserError(f"{out} holds another refreshed reward; use another --out, or replace it with --overwrite")
        write_bytes(out / HEAD_FILE, head)
        write_rejects(out / REJECTS_FILE, rejects)
        write_refresh(out, info)
    return info
