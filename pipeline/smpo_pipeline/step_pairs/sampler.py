"""Draw pairs from the sampler's own steps (TailorPO, arXiv 2502.01667).

At a trained step several x_s are drawn from one x_t. The reward of a draw is that of the image which the model expects
from it: its estimate of x0 at x_s (Tweedie's), decoded. The best and the worst draw are a pair, and the trajectory goes
on from the best one, or from a random one. Each image of a pair is stored as a state at x_t: the x0 and the noise for
which the step's mean would be its draw.

Shape suffixes: B trajectories, N candidates of a step, C h w a latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import nn

from smpo_models.draws import gaussian, image_noise, named_stream
from smpo_models.family import Conditioning, Family
from smpo_models.noise_schedules.transition import StochasticSteps, Transition
from smpo_pipeline.generation.generator import Wanted
from smpo_pipeline.inversion.denoisers import Denoisers, guided_output
from smpo_pipeline.isolation import Failure
from smpo_pipeline.rewards import Reward, checked_scores
from smpo_pipeline.step_pairs.gradient import step_sizes
from smpo_pipeline.step_pairs.pairs import best_and_worst, describe_pair
from smpo_schemas.inversion_settings import InversionSettings
from smpo_schemas.manifest import StepSettings
from smpo_schemas.reject_kinds import RejectKind
from smpo_schemas.shards.samples import STORAGE, Sample


@dataclass(frozen=True)
class _Trajectories:
    """B trajectories in the making.

    Attributes:
        wanted: prompt and number of each.
        conditioning, unconditional: of the denoisers; the second is None without guidance.
        x_BChw: their current latents.
        output_BChw: the denoiser's output at these; None if it is not computed yet.
    """

    wanted: Sequence[Wanted]
    conditioning: Conditioning
    unconditional: Conditioning | None
    x_BChw: torch.Tensor
    output_BChw: torch.Tensor | None


@dataclass(frozen=True)
class _Candidates:
    """The draws of a step.

    Attributes:
        x_BNChw: the draws.
        output_BNChw: the denoiser's outputs at the draws; None at the sampler's end.
        scores_BN: their rewards, NaN for draws without a score.
        reasons: why a draw has no score, by its index among the B N draws.
    """

    x_BNChw: torch.Tensor
    output_BNChw: torch.Tensor | None
    scores_BN: np.ndarray
    reasons: Mapping[int, str]

    def missing(self, row: int, places: Sequence[int], name: str) -> str:
        """Return why a draw of a trajectory has no score of this reward."""
        place = next(place for place in places if not np.isfinite(self.scores_BN[row, place]))
        unknown = f"{RejectKind.NO_SCORE}: {name} gives draw {place} none"
        return self.reasons.get(row * self.scores_BN.shape[1] + place, unknown)


def _best(scores_BN: np.ndarray) -> list[int]:
    """Return the best draw of each trajectory, the first of equal ones."""
    return np.nan_to_num(scores_BN, nan=-np.inf).argmax(axis=1).tolist()


class StepSampler:
    """Samples trajectories and makes pairs, each from the seed, its prompt, its number and its step alone."""

    def __init__(
        self,
        family: Family,
        sampling_denoiser: nn.Module | None,
        settings: InversionSettings,
        steps: StepSettings,
        reward: Reward,
        *,
        seed: int,
        side: int,
        device: str = "cpu",
    ) -> None:
        """Take a loaded model, all parts, on the CPU; cast its weights as the settings say, and move it to a device.

        Args:
            family: the model; its denoiser is the reference.
            sampling_denoiser: samples the trajectories, with guidance; None: the reference.
            settings: with the source ``steps``.
            steps: of the sampler.
            reward: on the device.
            seed: of all draws.
            side: of the images in pixels.
            device: cpu or cuda.
        """
        self._family, self._settings, self._steps, self._reward = family, settings, steps, reward
        self._schedule, self._device, self._seed, self._side = family.noise_schedule, device, seed, side
        self._sampler = StochasticSteps(tuple(steps.grid), settings.eta)
        self._denoisers = Denoisers(family, sampling_denoiser, settings.dtype, device)

    @torch.no_grad()
    def sample(self, wanted: Sequence[Wanted], *, most_steps: int | None = None) -> list[list[Sample | Failure]]:
        """Sample trajectories down to the last trained step.

        Args:
            wanted: prompt, and number among its prompt's trajectories, of each.
            most_steps: stop after this many steps, to try out batch sizes.

        Returns:
            For each trajectory the pairs of the trained steps, the noisiest first, or why there are none.
        """
        now = self._begin(wanted)
        pairs: list[list[Sample | Failure]] = [[] for _ in wanted]
        last = max(min(self._steps.trained), len(self._steps.grid) + 1 - (most_steps or len(self._steps.grid)))
        for step in range(len(self._steps.grid), last - 1, -1):
            t_B = torch.tensor([self._steps.grid[step - 1]] * len(wanted), device=self._device)
            t_B = t_B.to(self._schedule.timestep_dtype)
            transition = self._sampler.transition(self._schedule, t_B, now.x_BChw)
            output = self._predict(now, now.x_BChw, t_B) if now.output_BChw is None else now.output_BChw
            mean = transition.mean(now.x_BChw, self._schedule.x0_in(output, now.x_BChw, t_B))
            if step in self._steps.trained:
                found = self._candidates(
                    now, step, t_B, self._draw(now, step, mean, transition, self._steps.candidates)
                )
                if self._steps.gradient_delta is not None:
                    found = self._improve(now, step, t_B, found)
                for made, pair in zip(pairs, self._store(now, step, t_B, transition, found), strict=True):
                    made.append(pair)
                now = self._go_on(now, step, found)
            else:
                x_BChw = self._draw(now, step, mean, transition, 1)[:, 0]
                now = _Trajectories(now.wanted, now.conditioning, now.unconditional, x_BChw, None)
        return pairs

    def _begin(self, wanted: Sequence[Wanted]) -> _Trajectories:
        shape, count = self._family.latent_shape(self._side, self._side), len(wanted)
        noise = torch.stack([image_noise(self._seed, prompt, number, shape) for prompt, number in wanted])

        def condition(prompts: list[str]) -> Conditioning:
            return self._family.condition(prompts, [(self._side, self._side)] * count, [(0, 0)] * count)

        guided = self._settings.guidance_scale != 1
        return _Trajectories(
            wanted,
            condition([prompt for prompt, _ in wanted]),
            condition([""] * count) if guided else None,
            noise.to(self._device),
            None,
        )

    def _predict(self, now: _Trajectories, x_SChw: torch.Tensor, t_S: torch.Tensor) -> torch.Tensor:
        """Return the sampling denoiser's output at S = B N states, N of each trajectory, with guidance."""
        rows = torch.arange(len(now.wanted), device=self._device).repeat_interleave(len(x_SChw) // len(now.wanted))
        return guided_output(
            lambda conditioning: self._family.denoise(self._denoisers.inverting, x_SChw, t_S, conditioning),
            now.conditioning[rows],
            now.unconditional and now.unconditional[rows],
            self._settings.guidance_scale,
        )

    def _draw(
        self, now: _Trajectories, step: int, mean: torch.Tensor, transition: Transition, count: int
    ) -> torch.Tensor:
        """Draw ``count`` x_s of each trajectory: [B, N, C, h, w]."""
        noise = [
            torch.stack([gaussian(self._stream(each, step, str(index)), mean.shape[1:]) for index in range(count)])
            for each in now.wanted
        ]
        return mean[:, None] + transition.std[:, None] * torch.stack(noise).to(self._device)

    def _stream(self, wanted: Wanted, step: int, purpose: str) -> np.random.Generator:
        prompt, number = wanted
        return named_stream(f"{self._seed}/step/{step}/{number}/{purpose}\n{prompt}")

    def _candidates(self, now: _Trajectories, step: int, t_B: torch.Tensor, x_BNChw: torch.Tensor) -> _Candidates:
        """Score draws by the model's expectation of the image."""
        count, x_SChw = x_BNChw.shape[1], x_BNChw.flatten(0, 1)
        # At the sampler's end a draw is the image.
        x0_SChw, output_BNChw = x_SChw, None
        if step > 1:
            s_S = self._sampler.below(t_B).repeat_interleave(count)
            output = self._predict(now, x_SChw, s_S)
            x0_SChw, output_BNChw = self._schedule.x0_in(output, x_SChw, s_S), output.unflatten(0, (-1, count))
        prompts = [prompt for prompt, _ in now.wanted for _ in range(count)]
        scored = checked_scores(self._reward, self._images(x0_SChw), prompts)
        return _Candidates(x_BNChw, output_BNChw, scored.values.reshape(-1, count), scored.reasons)

    def _improve(self, now: _Trajectories, step: int, t_B: torch.Tensor, found: _Candidates) -> _Candidates:
        """Move the best draw of each trajectory along the gradient of its reward, where that raises the reward."""
        rows, best_B = torch.arange(len(now.wanted), device=self._device), _best(found.scores_BN)
        x_BChw = found.x_BNChw[rows, best_B]
        gradient = torch.cat([self._gradient(now, row, step, t_B, x_BChw) for row in range(len(now.wanted))])
        last, delta = self._schedule.num_train_timesteps, self._steps.gradient_delta or 0.0
        size_B = step_sizes(t_B, last, delta, self._reward.unit)
        moved_BNChw = (x_BChw + size_B.to(x_BChw).reshape(-1, 1, 1, 1) * gradient)[:, None]
        moved = self._candidates(now, step, t_B, moved_BNChw)
        scores_BN, x_BNChw = found.scores_BN.copy(), found.x_BNChw.clone()
        output_BNChw = None if found.output_BNChw is None else found.output_BNChw.clone()
        for row, best in enumerate(best_B):
            if moved.scores_BN[row, 0] > scores_BN[row, best]:
                scores_BN[row, best], x_BNChw[row, best] = moved.scores_BN[row, 0], moved.x_BNChw[row, 0]
                if output_BNChw is not None and moved.output_BNChw is not None:
                    output_BNChw[row, best] = moved.output_BNChw[row, 0]
        return _Candidates(x_BNChw, output_BNChw, scores_BN, found.reasons)

    def _gradient(
        self, now: _Trajectories, row: int, step: int, t_B: torch.Tensor, x_BChw: torch.Tensor
    ) -> torch.Tensor:
        """Return the reward's gradient by one trajectory's draw, through VAE and denoiser: [1, C, h, w]."""
        one = slice(row, row + 1)
        alone = replace(
            now,
            wanted=now.wanted[one],
            conditioning=now.conditioning[one],
            unconditional=now.unconditional and now.unconditional[one],
        )
        with torch.enable_grad():
            x = x_BChw[one].clone().requires_grad_()
            x0 = x
            if step > 1:
                s_1 = self._sampler.below(t_B[one])
                x0 = self._schedule.x0_in(self._predict(alone, x, s_1), x, s_1)
            images = (self._family.decode(x0) + 1) / 2
            score = self._reward.score_tensor(images, [prompt for prompt, _ in alone.wanted]).sum()
            return torch.autograd.grad(score, x)[0]

    def _images(self, x0_SChw: torch.Tensor) -> list[Image.Image]:
        images = []
        for x0_Chw in x0_SChw:  # one at a time: a VAE needs more memory than the denoiser
            pixels_3HW = (self._family.decode(x0_Chw[None])[0] + 1) * 127.5
            # Latents that are not finite may give any image: their pair is rejected.
            values_HW3 = pixels_3HW.nan_to_num(0.0).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
            images.append(Image.fromarray(values_HW3))
        return images

    def _go_on(self, now: _Trajectories, step: int, found: _Candidates) -> _Trajectories:
        """Go on from the best draw of each trajectory, or a random one; its output is known."""
        rows = torch.arange(len(now.wanted), device=self._device)
        if self._steps.continue_from == "winner":
            chosen = _best(found.scores_BN)
        else:
            count = found.scores_BN.shape[1]
            chosen = [int(self._stream(each, step, "continue").integers(count)) for each in now.wanted]
        output = None if found.output_BNChw is None else found.output_BNChw[rows, chosen]
        return _Trajectories(now.wanted, now.conditioning, now.unconditional, found.x_BNChw[rows, chosen], output)

    def _store(
        self, now: _Trajectories, step: int, t_B: torch.Tensor, transition: Transition, found: _Candidates
    ) -> list[Sample | Failure]:
        """Make the pair of each trajectory, with the reference's errors at what is stored of it."""
        places_B2 = [best_and_worst(scores_N) for scores_N in found.scores_BN]
        rows, images = torch.arange(len(now.wanted), device=self._device), []
        a, s = self._schedule.levels(t_B, now.x_BChw)
        for image in range(2):
            x_s = found.x_BNChw[rows, [places[image] for places in places_B2]]
            x0 = transition.x0_of(x_s, now.x_BChw).to(STORAGE[self._settings.storage])
            # By the stored x0, so that its rounding does not move the state.
            noise = ((now.x_BChw - a * x0.float()) / s).to(x0.dtype)
            measured = self._denoisers.measure(x0, noise, t_B, now.conditioning)
            images.append((x0, noise, measured.error_S, measured.norm_S))
        x0_B2, noise_B2, error_B2, norm_B2 = (torch.stack(column, 1).cpu() for column in zip(*images, strict=True))
        pairs: list[Sample | Failure] = []
        for row, (each, places) in enumerate(zip(now.wanted, places_B2, strict=True)):
            tensors = {
                "x0_2Chw": x0_B2[row],
                "noise_K2Chw": noise_B2[row][None],
                "timestep_K": t_B[row : row + 1].cpu(),
                "ref_error_K2": error_B2[row][None],
                "residual_K2": torch.full((1, 2), torch.nan),
                "ref_norm_K2": norm_B2[row][None],
            }
            scores_2 = found.scores_BN[row][list(places)]
            finite = all(tensors[name].isfinite().all() for name in ("x0_2Chw", "noise_K2Chw", "ref_error_K2"))
            if not finite:
                pairs.append(Failure(f"{RejectKind.NOT_FINITE}: draws of step {step}, or the reference's error there"))
            elif not np.isfinite(scores_2).all():
                pairs.append(Failure(found.missing(row, places, self._reward.name)))
            else:
                name, gap = self._reward.name, self._steps.gap
                meta = describe_pair(each, step, scores_2, name, gap=gap, side=self._side)
                pairs.append(Sample(meta=meta, **tensors))
        return pairs
