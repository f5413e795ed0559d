"""Check the settings of an evaluation before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from smpo_common.errors import UserError
from smpo_common.files import sha256_json
from smpo_common.same_settings import require_same_settings
from smpo_pipeline.evaluation.image_folders import ImageFolder, read_image_folder
from smpo_pipeline.evaluation.model_sources import (
    choose_base,
    identity,
    parse_models,
    parse_names,
    reward_identity,
)
from smpo_pipeline.evaluation.options import EvaluateOptions
from smpo_pipeline.evaluation.picture_files import PictureFiles
from smpo_pipeline.evaluation.results import Results, Settings, read_results
from smpo_pipeline.generation.source import Loading, ModelSource
from smpo_schemas.choices import Dtype, SamplerChoice
from smpo_schemas.generation.candidates import GenerationSettings

if TYPE_CHECKING:
    from smpo_models.family import Family

IMAGES_FOLDER = "images"


@dataclass(frozen=True)
class Evaluation:
    """A checked evaluation.

    Attributes:
        out: the output folder.
        models: that sample images.
        folders: of images that were made elsewhere.
        families: the models' configs, by their names.
        base: folder or hub id of the whole model that completes outputs of smpo-train; None without such outputs.
        settings: everything that affects the results.
        sampler: as ``--sampler`` names it.
        batch_size: images at once.
        repeated: number of rows of the prompts that repeat an earlier one.
        metadata: of GenEval: each prompt's row of its file, which its scorer reads.
        device: ``cpu`` or ``cuda``; None is ``cuda`` if available.
        concurrency: most models at once; None: one per GPU.
        ray_address: of a cluster to sample on.
    """

    out: Path
    models: list[ModelSource]
    folders: list[ImageFolder]
    families: dict[str, Family]
    base: str | None
    settings: Settings
    sampler: SamplerChoice
    batch_size: int
    repeated: int
    metadata: list[dict[str, Any]] | None
    device: str | None
    concurrency: int | None
    ray_address: str | None

    @property
    def names(self) -> list[str]:
        """Names of the models, and of the folders of images; the first is the baseline."""
        return [model.name for model in self.models] + [folder.name for folder in self.folders]

    def files(self, name: str) -> list[Path]:
        """List the image files of a model or a folder, prompt by prompt."""
        for folder in self.folders:
            if folder.name == name:
                return list(folder.files)
        settings = self.settings
        return [
            self.file(name, number, index)
            for number in range(len(settings.prompts))
            for index in range(settings.images_per_prompt)
        ]

    def folder(self, model: str) -> Path:
        """Return the folder of a model's images."""
        return self.out / IMAGES_FOLDER / model

    def pictures(self, model: str) -> PictureFiles:
        """Return the files of a model's images."""
        return PictureFiles(self.folder(model), nested=self.metadata is not None)

    def file(self, model: str, prompt_number: int, index: int) -> Path:
        """Return the file of one sampled image."""
        return self.pictures(model).path(prompt_number, index)

    def lacking(self, model: str) -> list[int]:
        """Number the prompts that lack an image of a model."""
        indices = range(self.settings.images_per_prompt)
        return [
            number
            for number in range(len(self.settings.prompts))
            if not all(self.file(model, number, index).is_file() for index in indices)
        ]

    def generation(self) -> GenerationSettings:
        """Return the settings of the images as ``generate`` has them."""
        settings = self.settings
        return GenerationSettings(
            sampler=settings.sampler,
            steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            seed=settings.seed,
            dtype=cast("Dtype", settings.dtype),
            resolution=settings.resolution or self.families[self.models[0].name].resolution(),
            images_per_prompt=settings.images_per_prompt,
            image_format="png",
            keep=None,
        )

    def loading(self, model: ModelSource) -> Loading:
        """Return what a model is loaded from."""
        return Loading(model, self.base, self.settings.variant, self.sampler)

    def origin(self, model: str) -> str:
        """Hash everything that affects the content of a model's images, though not their number."""
        others = {"models", "rewards", "images_per_prompt", "categories", "suite", "reward_dtype"}
        values = self.settings.model_dump(exclude=others, exclude_defaults=True)
        return sha256_json({**values, "model": self.settings.models[model]})


def prepare_evaluation(options: EvaluateOptions) -> Evaluation:
    """Check the settings and hash the files that they name.

    Raises:
        UserError: a setting is wrong.
    """
    sources = parse_models(options.model, options.negative)
    whole = choose_base(sources, options.base)
    folders = parse_names("--images", options.images, [model.name for model in sources])
    if not sources and not folders:
        raise UserError("name at least one model with --model NAME=DIR, or a folder of images with --images NAME=DIR")
    if not options.reward:
        raise UserError("name at least one reward with --reward NAME[=MODEL]")
    if len(set(options.reward)) != len(options.reward):
        raise UserError("--reward names the same reward twice")
    running, per_prompt = options.running, options.sampling.images_per_prompt
    prompts = options.prompts.read(running.limit, running.category_column)
    rewards = {spec: reward_identity(spec) for spec in options.reward}
    limited = running.limit is not None
    made = [
        read_image_folder(name, source, prompts.texts, per_prompt, more_prompts=limited)
        for name, source in folders.items()
    ]
    from smpo_pipeline.generation.generator import check_sampling, read_configs  # noqa: PLC0415  (torch: not for --help)

    families = {model.name: read_configs(model, whole) for model in sources}
    settings = Settings(
        models={model.name: identity(model, whole) for model in sources} | {each.name: each.identity for each in made},
        rewards=rewards,
        prompts=prompts.texts,
        images_per_prompt=per_prompt,
        seed=options.sampling.seed,
        categories=prompts.categories,
        suite=options.prompts.suite,
        reward_dtype=running.reward_dtype,
        **_sampling(options, next(iter(families.values()), None)),
    )
    if families:
        named = {f"--model {name}": family for name, family in families.items()}
        check_sampling(named, settings, options.sampling.sampler, negative=bool(options.negative))
    return Evaluation(
        out=options.out,
        models=sources,
        folders=made,
        families=families,
        base=whole,
        settings=settings,
        sampler=options.sampling.sampler,
        batch_size=running.batch_size,
        repeated=prompts.repeated,
        metadata=options.prompts.geneval_rows(prompts),
        device=running.device,
        concurrency=running.concurrency,
        ray_address=running.ray_address,
    )


def _sampling(options: EvaluateOptions, family: Family | None) -> dict[str, Any]:
    """Choose how images are sampled, as the models' family usually is; nothing without models."""
    sampling, running = options.sampling, options.running
    if family is None:
        return {"steps": 0, "guidance_scale": None, "dtype": "", "sampler": ""}
    return {
        "steps": sampling.steps or family.sampler_steps,
        "guidance_scale": family.usual_guidance if sampling.guidance_scale is None else sampling.guidance_scale,
        "dtype": running.dtype or _default_dtype(running.device),
        "resolution": sampling.resolution,
        "variant": sampling.variant,
        "sampler": family.samplers[sampling.sampler],
    }


def _default_dtype(device: str | None) -> Dtype:
    from smpo_models.devices import choose_device, default_dtype  # noqa: PLC0415  (imports torch: only if needed)

    return default_dtype(device or choose_device(None))


def finished_results(evaluation: Evaluation, *, overwrite: bool) -> Results | None:
    """Return the results if this evaluation is finished; None if it must run, as always with ``overwrite``.

    A change in the code of a user's own reward is not noticed.

    Raises:
        UserError: without ``overwrite``, the folder holds results or images of other settings; or it holds files that
            no evaluation wrote.
    """
    results = None if overwrite else read_results(evaluation.out)
    if results is not None:
        if results.digest == evaluation.settings.digest():
            return results
        stored, current = results.settings.identity(), evaluation.settings.identity()
        require_same_settings(f"--out {evaluation.out}", "an evaluation", stored, current)
    for model in evaluation.models:
        _check_images(evaluation, model.name, overwrite=overwrite)
    return None


def _check_images(evaluation: Evaluation, model: str, *, overwrite: bool) -> None:
    folder = evaluation.folder(model)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    origin = evaluation.pictures(model).origin()
    if origin is None:
        raise UserError(f"{folder} holds files that were not written by evaluate; choose another --out")
    if origin.get("origin") != evaluation.origin(model) and not overwrite:
        raise UserError(
            f"--out {evaluation.out} holds an unfinished evaluation of {model!r} with other settings; "
            "choose another --out, or replace it with --overwrite"
        )
