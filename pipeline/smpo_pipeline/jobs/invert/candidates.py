"""The outputs of ``generate --keep`` that ``--source tracked`` and ``sampled`` take latents from."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn

from smpo_common.errors import UserError
from smpo_common.files import read_all, sha256_file
from smpo_common.store_path import AnyPath, parse_path
from smpo_models.family import Family
from smpo_models.fingerprint import fingerprint_module
from smpo_models.weights import DTYPES
from smpo_pipeline.inversion.generated import COLUMNS, KeptSource
from smpo_pipeline.jobs.invert.models import ModelIdentity
from smpo_pipeline.jobs.invert.options import InversionOptions
from smpo_schemas.generation.candidates import CANDIDATES_FILE, Candidates, read_candidates
from smpo_schemas.generation.kept_latents import CandidateFolder
from smpo_schemas.generation.selection import SELECTION_FILE, read_selection
from smpo_schemas.inversion_settings import GENERATED
from smpo_schemas.manifest import ImageSampling
from smpo_schemas.pairs import PairFile, column_names

AnyOptions = TypeVar("AnyOptions", bound=InversionOptions)
Found = Mapping[AnyPath, Candidates]
"""Folders of candidates."""


def find_candidates(options: AnyOptions, files: Sequence[PairFile]) -> tuple[AnyOptions, Found]:
    """Find the candidates that the pairs are from; for other sources there are none.

    Args:
        options: of the command.
        files: of the pairs.

    Returns:
        The options with the candidates' resolution and number of states, and the folders.

    Raises:
        UserError: they cannot be found or read, lack what the source needs, or differ among themselves.
    """
    source = options.trajectory.source
    if source not in GENERATED:
        return options, {}
    _check_columns(files, options)
    found = {folder: read_candidates(folder) for folder in options.trajectory.candidates or _recorded(options)}
    resolution = options.models.resolution or next(iter(found.values())).resolution
    for folder, candidates in found.items():
        if not (candidates.num_states if source == "sampled" else candidates.keep):
            needed = "states:M" if source == "sampled" else "latents"
            raise UserError(f"--source {source}: the images in {folder} were generated without --keep {needed}")
        if candidates.resolution != resolution:
            raise UserError(
                f"--source {source}: the images in {folder} have {candidates.resolution} pixels a side, not "
                f"{resolution}; latents cannot be resized"
            )
    options = options.replace(resolution=resolution)
    if source == "sampled":
        options = options.replace(steps=max(candidates.num_states for candidates in found.values()))
    return options, found


def _check_columns(files: Sequence[PairFile], options: InversionOptions) -> None:
    """Check that the pairs' rows tell the noise and the latents of each image.

    Raises:
        UserError: a file lacks a column, or its rows do not say which image is image_0.
    """
    source = f"--source {options.trajectory.source}"
    if options.columns.chosen_column:
        raise UserError(
            f"--chosen-column {options.columns.chosen_column}: {source} needs image_0 and image_1, which noise_0 and "
            "noise_1 belong to"
        )
    paths = [file.path for file in files]
    for path, names in zip(paths, read_all(column_names, paths), strict=True):
        if missing := [name for name in COLUMNS if name not in names]:
            raise UserError(
                f"{source}: {path} has no column {missing[0]}; it takes pairs that `generate --keep` or `select` wrote"
            )


def _recorded(options: InversionOptions) -> list[AnyPath]:
    """Return the folders of candidates: where the pairs lie, or those that the selection beside them was made from."""
    folders: dict[AnyPath, None] = {}
    for path in options.pairs:
        folder = path if path.is_dir() else path.parent
        if (folder / CANDIDATES_FILE).is_file():
            folders[folder] = None
        elif (folder / SELECTION_FILE).is_file():
            folders |= dict.fromkeys(parse_path(each.path).parent for each in read_selection(folder).candidates)
        else:
            raise UserError(
                f"--source {options.trajectory.source}: {path} is neither from `generate` nor from `select`; name the "
                "folder that `generate --keep` wrote with --candidates"
            )
    for folder in folders:
        if not (folder / CANDIDATES_FILE).is_file():
            raise UserError(
                f"{folder}, which the pairs were selected from, has no {CANDIDATES_FILE}; if it was moved, name the "
                "new folder with --candidates"
            )
    return list(folders)


def check_configs(found: Found, family: Family, model: str) -> None:
    """Compare the model that made the candidates with the configs of ``--model``.

    Raises:
        UserError: it is of another family or noise schedule.
    """
    for folder, candidates in found.items():
        theirs, ours = candidates.model, {"kind": family.kind, "scheduler": family.noise_schedule.fingerprint()}
        if theirs.kind != ours["kind"]:
            raise UserError(f"--model {model} is {ours['kind']}, the images in {folder} were made by {theirs.kind}")
        if theirs.scheduler != ours["scheduler"]:
            raise UserError(f"--model {model} has another noise schedule than {theirs.id}, which made {folder}")


def check_weights(found: Found, family: Family, model: ModelIdentity) -> None:
    """Compare the model that made the candidates with the loaded one.

    Raises:
        UserError: its denoiser is not the inverting one (by default the reference), or its VAE is another.
    """
    for folder, candidates in found.items():
        if candidates.model.denoiser != model.inverting_denoiser:
            raise UserError(
                f"the images in {folder} were made by another denoiser than that of --model {model.id}; name it with "
                "--unet, or with --inverting-unet if the reference is another"
            )
        # The candidates' fingerprint is of weights in the dtype of sampling. Not diffusers' own `to`, which warns.
        vae = nn.Module.to(copy.deepcopy(family.vae), DTYPES[candidates.dtype])
        if candidates.model.parts["vae"] != fingerprint_module(vae):
            raise UserError(
                f"the images in {folder} were made with another VAE than that of --model {model.id} (--vae)"
            )


def kept_source(found: Found, options: InversionOptions) -> KeptSource | None:
    """Return where the pairs' latents are; None for sources that take images."""
    if not found:
        return None
    folders = tuple(CandidateFolder.of(folder, candidates) for folder, candidates in found.items())
    side = next(iter(found.values())).resolution
    return KeptSource(folders, side, states=options.trajectory.source == "sampled")


def samplings(found: Found) -> list[ImageSampling]:
    """Describe, for the manifest, how the images were sampled."""
    return [
        ImageSampling(
            candidates_sha256=sha256_file(folder / CANDIDATES_FILE),
            denoiser=candidates.model.denoiser,
            negative=candidates.model.negative,
            sampler=candidates.sampler,
            steps=candidates.steps,
            guidance_scale=candidates.guidance_scale,
            seed=candidates.seed,
            dtype=candidates.dtype,
        )
        for folder, candidates in found.items()
    ]
