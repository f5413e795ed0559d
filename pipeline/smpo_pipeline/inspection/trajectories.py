"""Draw the contact sheet of shards: decoded states along a few trajectories.

Shape suffixes: K states, 2 images, C h w a latent, H W an image.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from smpo_common.errors import UserError
from smpo_models.family import Family
from smpo_models.fingerprint import fingerprint_module
from smpo_models.loading import load_family
from smpo_pipeline.inspection import sheet
from smpo_schemas.manifest import Manifest
from smpo_schemas.shards.samples import Sample

_TILE = 104
_MAX_STATES = 9  # per row; longer trajectories show this number of states, evenly spaced
_NOISE_SPAN = 2.5
"""The colour range of noise ends at plus and minus this many rms values."""


def load_decoder(manifest: Manifest, model: str | None, vae: str | None, device: str) -> Family:
    """Load the VAE and the noise schedule that the shards were made with.

    Args:
        manifest: of the shards.
        model: hub id or folder; None: the manifest's.
        vae: as ``--vae`` of invert.
        device: to decode on.

    Raises:
        UserError: the model cannot be loaded, or has another VAE or noise schedule.
    """
    source = model or manifest.model.id
    try:
        family = load_family(source, ("vae",), vae=vae, device=device)
    except UserError as error:
        raise UserError(f"no contact sheet: {error}; name the model that made these shards with --model") from error
    if family.vae is None or fingerprint_module(family.vae) != manifest.model.vae:
        raise UserError(
            f"no contact sheet: {vae or source} has another VAE than these shards: "
            "name the right one with --model or --vae"
        )
    if family.noise_schedule.fingerprint() != manifest.model.scheduler:
        raise UserError(
            f"no contact sheet: {source} has another noise schedule than these shards; name the right one with --model"
        )
    return family


def draw_shards(samples: list[Sample], manifest: Manifest, family: Family, path: Path) -> Image.Image:
    """Draw, for each trajectory and image, x0 and the states x_t, decoded, and below them the stored noise tau."""
    cards = [_card(sample, family) for sample in samples]
    subtitle = (
        f"{len(cards)} of {manifest.totals.samples} trajectories, evenly spaced. "
        "For each image: the states x_t, decoded; below them the stored noise tau (three channels, divided by its rms)"
    )
    return sheet.page(f"Trajectories: {path.resolve().name}", subtitle, cards, columns=1)


def _card(sample: Sample, family: Family) -> Image.Image:
    drawn = np.unique(np.linspace(0, len(sample.timestep_K) - 1, _MAX_STATES).round().astype(int))
    x0_2Chw, noise_K2Chw, t_K = sample.x0_2Chw.float(), sample.noise_K2Chw[drawn].float(), sample.timestep_K[drawn]
    titles = ["x0", *(f"t = {int(t)}" for t in t_K)]
    rows = [sheet.row([sheet.text_block(title, _TILE, size=12, bold=True, lines=1) for title in titles])]
    for number in (0, 1):
        noise_KChw = noise_K2Chw[:, number]
        x0_KChw = x0_2Chw[number].expand_as(noise_KChw)
        states_KChw = family.noise_schedule.noised(x0_KChw, noise_KChw, t_K)
        decoded = _decode(family, torch.cat([x0_2Chw[number : number + 1], states_KChw]))
        rows.append(sheet.row([sheet.tile(image, _TILE) for image in decoded]))
        scores = [f"{name} {values[number]:.3g}" for name, values in sample.meta.scores.items()]
        lines = [f"image_{number}", *scores]
        caption = sheet.column([sheet.text_block(line, _TILE, size=11, colour=sheet.SOFT) for line in lines])
        rows.append(sheet.row([caption, *(_noise_tile(noise_Chw) for noise_Chw in noise_KChw)]))
    width = rows[0].width
    meta = sample.meta
    words = [
        f"pair {meta.pair_id}, trajectory {meta.trajectory}",
        "no label" if meta.label is None else f"label {meta.label:g}",
        *(["flipped"] if meta.flipped else []),
        *(["inverted under the empty prompt"] if meta.prompt_dropped else []),
    ]
    heading = [
        sheet.text_block(meta.prompt or "(empty prompt)", width, size=14, bold=True, lines=2),
        sheet.text_block(", ".join(words), width, size=12, colour=sheet.SOFT, lines=1),
    ]
    return sheet.column([*heading, *rows], padding=14)


def _decode(family: Family, latents_KChw: torch.Tensor) -> list[Image.Image]:
    """Decode latents to images."""
    images = []
    for latent_Chw in latents_KChw:  # one at a time: a whole trajectory of large images would not fit in memory
        pixels_3HW = family.decode(latent_Chw[None])[0]
        values_HW3 = ((pixels_3HW + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        images.append(Image.fromarray(values_HW3))
    return images


def _noise_tile(noise_Chw: torch.Tensor) -> Image.Image:
    """Draw the first three channels as colours around grey, with the rms below."""
    values = noise_Chw.numpy()
    rms = float(np.sqrt(np.mean(values.astype(np.float64) ** 2)))
    shown = values[:3] if len(values) >= 3 else np.repeat(values[:1], 3, axis=0)  # noqa: PLR2004  (red, green, blue)
    scaled = np.clip(0.5 + shown / (2 * _NOISE_SPAN * max(rms, 1e-6)), 0, 1)
    image = Image.fromarray(np.rint(scaled.transpose(1, 2, 0) * 255).astype(np.uint8))
    label = sheet.text_block(f"rms {rms:.2f}", _TILE, size=11, colour=sheet.SOFT, lines=1)
    return sheet.column([sheet.tile(image, _TILE), label], gap=2)
