"""A batch of trajectories in the making: what was drawn for each, and the model's outputs that sources of states use.

Shape suffixes: B trajectories, R = 2B rows (both images of a trajectory, one after the other), S some of these rows, C
h w a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from smpo_models.draws import gaussian, trajectory_stream
from smpo_models.family import Conditioning, Family
from smpo_pipeline.inversion.denoisers import guided_output
from smpo_pipeline.inversion.generated import GeneratedPair
from smpo_pipeline.inversion.timesteps import TrajectoryPlan, plan_trajectory
from smpo_schemas.inversion_settings import GENERATED, InversionSettings
from smpo_schemas.shards.samples import STORAGE, SampleMeta


@dataclass(frozen=True)
class PreparedPair:
    """A pair whose images are decoded, resized and cropped, or whose latents are known.

    Attributes:
        pixels_2HW3: uint8, both images; with ``generated`` there are none, and the shape is [2, H, W, 0].
        size: both images' original (height, width).
        crop: both crops' (top, left) in the resized images.
        measured: whether this pair is in the sample that trajectory health is measured on.
        generated: the sampler's latents, for sources that use them.
    """

    pair_id: str
    prompt: str
    label: float | None
    annotator: str | None
    scores: dict[str, tuple[float, float]]
    pixels_2HW3: np.ndarray
    size: tuple[tuple[int, int], tuple[int, int]]
    crop: tuple[tuple[int, int], tuple[int, int]]
    measured: bool
    generated: GeneratedPair | None = None
    votes: int | None = None

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of its prepared images."""
        return self.pixels_2HW3.shape[1], self.pixels_2HW3.shape[2]


@dataclass(frozen=True)
class Trajectory:
    """One trajectory to make, and what was drawn for it.

    Attributes:
        pair: the pair.
        number: 0, 1, ...: which of the pair's trajectories.
        plan: timesteps.
        flipped: whether both images are mirrored.
        dropped: whether the trajectory is made under the empty prompt.
        size, crop: size and crop conditioning of both images, for denoisers that take it.
        stream: source of this trajectory's further randomness, by purpose.
    """

    pair: PreparedPair
    number: int
    plan: TrajectoryPlan
    flipped: bool
    dropped: bool
    size: tuple[tuple[int, int], tuple[int, int]]
    crop: tuple[tuple[int, int], tuple[int, int]]
    stream: Callable[[str], np.random.Generator]

    def meta(self) -> SampleMeta:
        """Return the metadata that a shard stores with the trajectory."""
        return SampleMeta(
            pair_id=self.pair.pair_id,
            trajectory=self.number,
            flipped=self.flipped,
            prompt=self.pair.prompt,
            prompt_dropped=self.dropped,
            label=self.pair.label,
            votes=self.pair.votes,
            annotator=self.pair.annotator,
            scores=self.pair.scores,
            size=self.size,
            crop=self.crop,
        )


def draw_trajectory(
    pair: PreparedPair, number: int, family: Family, settings: InversionSettings, seed: int
) -> Trajectory:
    """Draw all that is random about one trajectory, from (seed, pair_id, number) alone."""

    def stream(purpose: str) -> np.random.Generator:
        return trajectory_stream(seed, pair.pair_id, number, purpose)

    constant = settings.size_conditioning == "constant"
    told = pair.image_size
    return Trajectory(
        pair=pair,
        number=number,
        plan=plan_trajectory(
            settings,
            family.noise_schedule,
            seed,
            pair.pair_id,
            number,
            tokens=family.num_tokens(*pair.image_size),
            kept=pair.generated.timesteps if pair.generated else (),
        ),
        flipped=settings.hflip and bool(stream("flip").random() < 0.5),  # noqa: PLR2004  (an even coin)
        dropped=bool(stream("dropout").random() < settings.prompt_dropout),
        size=(told, told) if constant else pair.size,
        crop=((0, 0), (0, 0)) if constant else pair.crop,
        stream=stream,
    )


@dataclass(frozen=True)
class Visit:
    """The rows of a batch at the ``index``-th nodes of their trajectories, those with fewer nodes left out.

    Attributes:
        index: into the trajectories' ``plan.nodes``.
        rows_S: which of the batch's R rows.
        t_S: their nodes' timesteps.
        x_SChw: their states, float32.
        origin: x_s and s that the step came from, the timestep at which the inverting denoiser was evaluated, and which
            rows took a step at all; None where none did.
        solved_S: the residuals at which the solver stopped, before noise of eta, NaN where no step was taken; None
            where the solver does not know them.
        noise_SChw: the noise that the states were made with, which is then their tau to the bit; None for states that
            were not made so.
    """

    index: int
    rows_S: torch.Tensor
    t_S: torch.Tensor
    x_SChw: torch.Tensor
    origin: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None
    solved_S: torch.Tensor | None
    noise_SChw: torch.Tensor | None = None


class Batch:
    """The rows of B trajectories: latents, conditioning, and the inverting denoiser's predictions."""

    def __init__(
        self,
        trajectories: Sequence[Trajectory],
        family: Family,
        inverting_denoiser: nn.Module,
        settings: InversionSettings,
    ) -> None:
        self.trajectories, self.family, self.settings = trajectories, family, settings
        self.noise_schedule = family.noise_schedule
        self._inverting_denoiser = inverting_denoiser
        self.device = next(inverting_denoiser.parameters()).device
        self.x0_RChw = self._latents()
        self.conditioning = self._condition(
            ["" if trajectory.dropped else trajectory.pair.prompt for trajectory in trajectories]
        )
        guided = settings.source in ("renoise", "truncated") and settings.guidance_scale != 1
        self._unconditional = self._condition([""] * len(trajectories)) if guided else None

    def _latents(self) -> torch.Tensor:
        """Return x0 of both images, rounded as it is stored, so that the trajectory begins at exactly the stored x0."""
        if self.settings.source in GENERATED:
            x0 = torch.from_numpy(np.concatenate([pair.latents_K2Chw[0] for pair in self.generated])).to(self.device)
        else:
            x0 = self._encode()
        return x0.to(STORAGE[self.settings.storage]).float()

    @property
    def generated(self) -> list[GeneratedPair]:
        """The sampler's latents of each trajectory's pair, for sources that use them."""
        return [trajectory.pair.generated for trajectory in self.trajectories if trajectory.pair.generated]

    def _encode(self) -> torch.Tensor:
        images = [
            trajectory.pair.pixels_2HW3[:, :, ::-1] if trajectory.flipped else trajectory.pair.pixels_2HW3
            for trajectory in self.trajectories
        ]
        pixels_R3HW = torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1
        mean, std = self.family.posterior(pixels_R3HW)
        if self.settings.vae_latent == "sample":
            shape = (2, *mean.shape[1:])
            noise = torch.cat([gaussian(trajectory.stream("vae"), shape) for trajectory in self.trajectories])
            mean = mean + std * noise.to(self.device)
        return mean

    def _condition(self, prompts: Sequence[str]) -> Conditioning:
        return self.family.condition(
            [prompt for prompt in prompts for _ in range(2)],
            [size for trajectory in self.trajectories for size in trajectory.size],
            [crop for trajectory in self.trajectories for crop in trajectory.crop],
        )

    def rows_at(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the rows that have an ``index``-th node (int64), and two timesteps for each: [S].

        The first is the node's, the second that at which the step to it evaluates the inverting denoiser.
        """
        active = [(row, trajectory.plan) for row, trajectory in self._rows() if index < len(trajectory.plan.nodes)]
        return (
            self._indices([row for row, _ in active]),
            self._timesteps([plan.nodes[index] for _, plan in active]),
            self._timesteps([plan.asked_at[index] for _, plan in active]),
        )

    def stored_at(self, index: int, rows_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the positions in ``rows_S`` that store their ``index``-th node, and the timestep each is used at."""
        by_row = dict(self._rows())
        kept = [
            (position, trajectory.plan.used_at[trajectory.plan.stored.index(index)])
            for position, trajectory in enumerate(by_row[row] for row in rows_S.tolist())
            if index in trajectory.plan.stored
        ]
        return self._indices([position for position, _ in kept]), self._timesteps([t for _, t in kept])

    def _rows(self) -> list[tuple[int, Trajectory]]:
        return [
            (2 * number + image, trajectory)
            for number, trajectory in enumerate(self.trajectories)
            for image in range(2)
        ]

    def _indices(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _timesteps(self, values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=self.noise_schedule.timestep_dtype, device=self.device)

    def most_nodes(self) -> int:
        """Return the largest number of nodes of a trajectory."""
        return max(len(trajectory.plan.nodes) for trajectory in self.trajectories)

    def sampled_at(self) -> list[torch.Tensor]:
        """Return the timesteps of all rows at each step of truncated sampling: [R] each."""
        steps = zip(*(trajectory.plan.sampled_at for _, trajectory in self._rows()), strict=True)
        return [self._timesteps(timesteps) for timesteps in steps]

    def predicted(self, x_SChw: torch.Tensor, t_S: torch.Tensor, rows_S: torch.Tensor) -> torch.Tensor:
        """Return the inverting denoiser's output at (x, t), with guidance (arXiv 2207.12598): [S, C, h, w]."""
        return guided_output(
            lambda conditioning: self.family.denoise(self._inverting_denoiser, x_SChw, t_S, conditioning),
            self.conditioning[rows_S],
            self._unconditional and self._unconditional[rows_S],
            self.settings.guidance_scale,
        )

    def predicted_direction(self, x_SChw: torch.Tensor, t_S: torch.Tensor, rows_S: torch.Tensor) -> torch.Tensor:
        """Return the direction of :meth:`predicted` at (x, t): [S, C, h, w]."""
        return self.noise_schedule.direction(self.predicted(x_SChw, t_S, rows_S), x_SChw, t_S)

    def noise_per_pair(self, purpose: str) -> torch.Tensor:
        """Draw one Gaussian noise per trajectory, the same for both images: [R, C, h, w]."""
        shape = (1, *self.x0_RChw.shape[1:])
        noise = [gaussian(trajectory.stream(purpose), shape).repeat(2, 1, 1, 1) for trajectory in self.trajectories]
        return torch.cat(noise).to(self.device)
