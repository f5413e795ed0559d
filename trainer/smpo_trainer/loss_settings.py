"""The flags of ``smpo-train`` that define what is learned: rewards, preference and loss.

This module does not import torch, so that ``--help`` is fast.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer

from smpo_common.named_values import (
    parse_options,
    parse_ranges,
    parse_weights,
    write_options,
    write_ranges,
    write_weights,
)
from smpo_common.options import Flag, Options
from smpo_schemas.preference import preferences
from smpo_trainer.beta_decay import BetaDecay
from smpo_trainer.presets import PICKSCORE_RANGE
from smpo_trainer.safeguards.auto_beta import AutoBeta, Band

TimestepWeightingKind = Literal["uniform", "min-snr", "sigmoid", "x0", "transition"]
RobustForm = Literal["pair", "list"]

# A run is resumed only with the same identity, see Flag.identity and Experiment.identity.
IDENTITY = Flag(identity="value")
RESOLVED_IDENTITY = Flag(identity="resolved")


class RewardOptions(Options):
    """How the scores of a pair's images become P(image_0 preferred)."""

    model_config = ConfigDict(title="Rewards and preference")

    reward: Annotated[
        dict[str, float],
        BeforeValidator(partial(parse_weights, "--reward")),
        PlainSerializer(write_weights),
        Flag(typed=list[str], metavar="NAME[:WEIGHT]", identity="resolved"),
    ] = Field(default_factory=dict)
    """Rewards that define the preference, with weight 1 by default. May be left out if the scores have one reward."""
    preference: Annotated[
        str,
        RESOLVED_IDENTITY,
        Field(
            description="How scores become the preference, the probability that image_0 is the better one. "
            + " ".join(f"{name}: {way.summary}." for name, way in sorted(preferences().items()))
        ),
    ] = "minmax"
    calibration: Annotated[Path | None, Flag(metavar="FILE", identity="resolved")] = None
    """Output of `smpo-pipeline calibrate`: each reward's temperature, and its weight if --reward is not given, for
    mixture, winrate and votes-mixture; the strength of the votes' prior, for votes and votes-mixture."""
    reward_range: Annotated[
        dict[str, tuple[float, float]],
        BeforeValidator(partial(parse_ranges, "--reward-range")),
        PlainSerializer(write_ranges),
        Flag(typed=list[str], metavar="NAME=MIN:MAX|raw", identity="resolved"),
        Field(
            description="Range of a reward's raw score, in place of the minimum and maximum over the data set, for "
            "minmax and winrate; raw takes scores as they are, for those that are log-odds. SmPO's published range for "
            f"PickScore: {PICKSCORE_RANGE}."
        ),
    ] = Field(default_factory=dict)
    scores: Annotated[Path | None, Flag(metavar="DIR", identity="resolved")] = None
    """Output of `smpo-pipeline score`, to replace the scores in the shards; joined by pair_id and prompt."""
    weight_column: Annotated[str | None, Flag(metavar="NAME", identity="resolved")] = None
    """Column with a weight for each pair, in the Parquet files of --scores. Pairs without a weight are left out."""


class LossOptions(Options):
    """The loss of a pair, and terms that combine with it."""

    model_config = ConfigDict(title="Objective")

    objective: Annotated[str, RESOLVED_IDENTITY] = "smpo"
    """Loss, by name or as MODULE:CLASS. --list-objectives prints all of them with their options and defaults."""
    # One repeatable flag: a flag for each option would make --help import every objective, and so torch.
    objective_option: Annotated[
        dict[str, str],
        BeforeValidator(partial(parse_options, "--objective-option")),
        PlainSerializer(write_options),
        Flag(typed=list[str], metavar="NAME=VALUE", identity="resolved"),
    ] = Field(default_factory=dict)
    """Option of the chosen objective, such as label_smoothing=0.1 for dpo; see --list-objectives."""
    beta: Annotated[
        Annotated[float, Field(ge=0)] | AutoBeta | None,
        BeforeValidator(AutoBeta.parse),
        PlainSerializer(lambda beta: str(beta) if isinstance(beta, AutoBeta) else beta),
        Flag(typed=str, metavar="FLOAT|auto[:START]", identity="resolved"),
    ] = None
    """DPO's beta: an image's implicit reward is beta / 2 times the reference's squared error minus the model's. Larger
    values keep the model closer to the reference. Default: the published value for the objective and model (smpo: 2000
    for SD 1.5, 5000 for SDXL), see --list-objectives. auto begins with it, or with START, and moves beta after the
    warm-up so that margins stay within --beta-band; for smpo, dpo and npo."""
    beta_band: Annotated[
        Band,
        BeforeValidator(Band.parse),
        PlainSerializer(str),
        Flag(typed=str, metavar="LOW:HIGH", identity="resolved"),
    ] = Band(1.5, 3.0)
    """With --beta auto: bounds of rewards/margins_rms."""
    beta_rate: Annotated[float, Field(gt=1), RESOLVED_IDENTITY] = 1.1
    """With --beta auto: largest factor between the betas of successive steps."""
    beta_decay: Annotated[
        BetaDecay | None,
        BeforeValidator(BetaDecay.parse),
        PlainSerializer(str, when_used="unless-none"),
        Flag(metavar="N1:N2:END", identity="value"),
    ] = None
    """Multiply beta by END (such as 0.5) from optimizer step N2 on, by 1 up to step N1, and by a cosine between them:
    PNAPO's schedule. Default: beta stays."""
    gamma: Annotated[float, Field(ge=0), RESOLVED_IDENTITY] = 10.0
    """smpo only: the margin, the implicit reward of image_0 minus that of image_1, is multiplied by gamma (2p - 1),
    where p is P(image_0 preferred)."""
    timestep_weighting: Annotated[TimestepWeightingKind | None, RESOLVED_IDENTITY] = None
    """Weight of a state's errors by its timestep. uniform: 1. min-snr, sigmoid: smaller at low noise. x0: errors count
    as those of x0. transition: implicit rewards are log-likelihood ratios of the sampler's step, for shards of
    `smpo-pipeline steps`. Default: the published weighting of the objective, see --list-objectives."""
    snr_gamma: Annotated[float, Field(ge=0), RESOLVED_IDENTITY] = 5.0
    """With --timestep-weighting min-snr: signal-to-noise ratio above which weights decrease (not --gamma)."""
    sigmoid_bias: Annotated[float | None, RESOLVED_IDENTITY] = None
    """With --timestep-weighting sigmoid: log SNR at which the weight is 1/2. Default: the published bias of the
    objective, else 0."""
    x0_cap: Annotated[float | None, Field(gt=0), RESOLVED_IDENTITY] = None
    """With --timestep-weighting x0: upper limit of the weight of the noise's squared error. This weight is 1 / SNR, for
    example 213 at the last timestep of SD 1.5. Default: no limit."""
    budget: Annotated[float | None, Field(ge=0), IDENTITY] = None
    """Penalise the preferred image's error for rising above the reference's by more than this, in units of the margin
    (beta / 2 times the error), so that not both images get worse. Default: no penalty."""
    budget_weight: Annotated[float, Field(ge=0), RESOLVED_IDENTITY] = 1.0
    """Weight in the loss of the excess over --budget."""
    winner_preserving: Annotated[float | None, Field(ge=0, le=1), Flag(metavar="MU", identity="value")] = None
    """Scale the gradient of the image that is not preferred such that the preferred image's error does not rise, to
    first order: Diffusion-SDPO, published with 0. With MU above 0 it must fall by at least this share of the fall under
    its own gradient alone. Default: full gradients."""
    norm_guard: Annotated[float | None, Field(gt=0), Flag(metavar="WEIGHT", identity="value")] = None
    """Penalise norms (rms) of the model's outputs above the reference's, in both images of a pair: NormGuard. The loss
    gets WEIGHT times beta / 2 times the excess. Needs shards that have the reference's norms, or --reference live,
    as with --quantize. Default: no penalty."""
    robust: Annotated[float | None, Field(gt=0), Flag(metavar="LAMBDA", identity="value")] = None
    """Minimise LAMBDA log mean exp(loss / LAMBDA) over the states of a step in place of the mean, so that large losses
    count more: DoRA's loss, published with 1. Smaller values count them more still. Default: the mean."""
    robust_form: Annotated[RobustForm, RESOLVED_IDENTITY] = "pair"
    """With --robust, how the weights of --weight-column are applied: pair multiplies each loss within the exponential;
    list multiplies the loss of the whole step by its mean weight."""
