"""Run out of memory: batch sizes are found, no pair is rejected, and the libraries' messages are recognised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.acceptance.checks.inverting import make_inverter
from benchmarks.acceptance.runner import Report
from benchmarks.acceptance.world import GIB, World, random_pair
from smpo_models.memory import is_out_of_memory
from smpo_pipeline.batch_size import largest_that_fits
from smpo_pipeline.isolation import FAILURES, Failure, Outcome, run_isolated
from smpo_pipeline.rewards import load_reward

SPARE = 6 * GIB
"""Memory for activations: the VAE takes about 4 GiB at any batch size, the denoiser about 8 for 64 trajectories."""


def check_memory(world: World, report: Report) -> None:
    """Invert with SD 1.5, then score images, in less memory than the whole batch takes."""
    words = _Words()
    _invert(world, report, words)
    world.device.clean()
    _score(world, report, words)
    report.judge("kinds of memory errors", len(words.said), least=1)
    report.judge("of them not recognised", sum(not known for known in words.said.values()), most=0)
    report.note(words=list(words.said))


def _invert(world: World, report: Report, words: _Words) -> None:
    device, many, side = world.device, world.size.many, world.pixels("sd15")
    inverter = make_inverter(world, world.load("sd15"), "bf16", steps=1)
    pairs = [(random_pair(number, side, side), 0) for number in range(many)]
    baseline = device.allocated()
    with device.short_of_memory(SPARE, many // 2) as short:
        invert = words.heard(short(inverter.invert))
        outcome = run_isolated(invert, pairs, device.name)
        largest = largest_that_fits(lambda count: invert(pairs[:count]), many)
    device.clean()
    report.judge("memory after over before", device.allocated() / baseline, most=1.01, on_cpu=False)
    _judge(report, "trajectories", outcome, many)
    samples = [sample for _, (made, _) in outcome.results for sample in made]
    report.judge("trajectories that cannot be stored", sum(isinstance(each, Failure) for each in samples), most=0)
    report.judge("largest batch of trajectories that fits", largest, least=1, most=many - 1)


def _score(world: World, report: Report, words: _Words) -> None:
    """Run the reward's image tower on ready pixels; resizing images is the CPU's work."""
    device, many = world.device, 64 * world.size.many
    clip = load_reward(f"pickscore={world.model('clip')}", device.name)._clip  # noqa: SLF001
    side = clip.config.vision_config.image_size
    pixels = torch.randn(1, 3, side, side, device=device.name)

    @torch.inference_mode()
    def tower(images: Sequence[int]) -> torch.Tensor:
        with torch.autocast(device.name, torch.bfloat16):
            return clip.get_image_features(pixel_values=pixels.expand(len(images), -1, -1, -1)).pooler_output

    with device.short_of_memory(SPARE, many // 2) as short:
        _judge(report, "images", run_isolated(words.heard(short(tower)), range(many), device.name), many)


def _judge(report: Report, name: str, outcome: Outcome[Any], count: int) -> None:
    report.judge(f"{name} rejected", len(outcome.failed), most=0)
    report.judge(f"{name} made", sum(len(positions) for positions, _ in outcome.results), least=count)
    report.judge(f"{name}: size found", outcome.largest_batch, least=1, most=count - 1)


class _Words:
    """Records the messages of out-of-memory errors.

    Attributes:
        said: the beginning of each message, and whether it is recognised.
    """

    def __init__(self) -> None:
        self.said: dict[str, bool] = {}

    def heard(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function and record its errors."""
        return partial(self._call, work)

    def _call(self, work: Callable[..., Any], items: Sequence[Any]) -> Any:  # noqa: ANN401
        try:
            return work(items)
        except FAILURES as error:
            words = f"{type(error).__name__}: {' '.join(str(error).split())[:90]}"
            self.said[words.partition("Tried")[0]] = is_out_of_memory(error)
            raise
