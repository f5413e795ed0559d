"""Which files of a training run's folder are shared, and the model card that describes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from smpo_common.errors import UserError
from smpo_common.files import read_json
from smpo_models.sharing.card import SMPO_CITATION, compose, shared_name, table
from smpo_schemas.trained_model import (
    DENOISER_FOLDERS,
    EXTRA_LORA_FILES,
    LORA_FILE,
    METRICS_FILE,
    TRAINING_FILE,
    VALIDATION_FOLDER,
)

_HUB_DATA = "hf://datasets/"


def shared_files(folder: Path) -> dict[str, Path]:
    """List the trained weights, ``training.json``, metrics and the result's validation images, by path in ``folder``.

    Not shared are checkpoints, ``config.yaml`` and TensorBoard's files, which name local folders and the machine.

    Raises:
        UserError: the folder is not a finished output of smpo-train, or its ``training.json`` is damaged.
    """
    if not (folder / TRAINING_FILE).is_file():
        raise UserError(f"{folder} has no {TRAINING_FILE}: it is not the output of `smpo-train`, or unfinished")
    weights = [path for name in DENOISER_FOLDERS for path in sorted((folder / name).rglob("*")) if path.is_file()] + [
        folder / name for name in (LORA_FILE, *EXTRA_LORA_FILES.values())
    ]
    if not any(path.is_file() for path in weights):
        raise UserError(f"{folder} holds no trained weights ({', '.join(DENOISER_FOLDERS)} or {LORA_FILE})")
    with _reading(folder / TRAINING_FILE) as record:
        images = _images(folder, record)
    others = [folder / TRAINING_FILE, folder / METRICS_FILE, *images]
    return {str(path.relative_to(folder)): path for path in (*weights, *others) if path.is_file()}


def _images(folder: Path, record: Mapping[str, Any]) -> list[Path]:
    """Return the validation images of the result; the last ones, if they are missing."""
    drawn = sorted((folder / VALIDATION_FOLDER).glob("step-*.png"))
    best = record.get("best")
    return [path for path in drawn if best and path.stem == f"step-{best['step']:06d}"] or drawn[-1:]


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """Yield the content of ``training.json``.

    Raises:
        UserError: it is damaged or of another version.
    """
    record = read_json(path)
    try:
        yield record
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is damaged, or of another version of smpo-train ({reason}); train again") from None


def model_metadata(model: str, objective: str, *, lora: bool, shards: list[str], license_: str | None) -> ModelCardData:
    """Return the metadata by which the hub finds and shows a model.

    Args:
        model: the base model; left out if it is a local folder.
        objective: name of the loss.
        lora: whether the result is an adapter.
        shards: as given to ``--shards``; only data sets on the hub are named.
        license_: of the result, an identifier of the hub.
    """
    base = model if _is_hub_id(model) else None
    return ModelCardData(
        license=license_,
        base_model=base,
        base_model_relation=("adapter" if lora else "finetune") if base else None,
        datasets=["/".join(name.removeprefix(_HUB_DATA).split("/")[:2]) for name in shards if _HUB_DATA in name]
        or None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["smpo-diffusion", "preference-optimization", objective.lower(), *(["lora"] if lora else [])],
    )


def _is_hub_id(model: str) -> bool:
    path = Path(model)
    return not path.is_absolute() and not path.exists() and model.count("/") == 1


def model_card(folder: Path, name: str, license_: str | None = None, evaluation: str = "", samples: str = "") -> str:
    """Describe a trained model.

    Args:
        folder: finished output of smpo-train.
        name: the model's id on the hub, or of its folder.
        license_: of the model, an identifier of the hub.
        evaluation: Markdown with an evaluation's results.
        samples: Markdown with images; by default the result's validation images.

    Raises:
        UserError: the folder's ``training.json`` is damaged or of another version.
    """
    with _reading(folder / TRAINING_FILE) as record:
        return describe_model(folder, record, name, license_, evaluation, samples)


def describe_model(
    folder: Path,
    record: Mapping[str, Any],
    name: str,
    license_: str | None = None,
    evaluation: str = "",
    samples: str = "",
) -> str:
    """Describe a trained model like :func:`model_card`, given the content of ``training.json``.

    A training run needs its card before it writes that file, which it does last.
    """
    lora = (folder / LORA_FILE).is_file()
    shards = [shard["path"] for shard in record["shards"]]
    data = model_metadata(record["model"], record["objective"], lora=lora, shards=shards, license_=license_)
    base_id = str(record["model"]) if data.base_model else None
    base = f"[{base_id}](https://huggingface.co/{base_id})" if base_id else "a model in a folder"
    what = "A LoRA for" if lora else f"The denoiser (`{_denoiser_folder(folder)}/`) of"
    images = "".join(f"![Validation images]({VALIDATION_FOLDER}/{path.name})" for path in _images(folder, record))
    rest = f"\n\nEvery setting is in `{TRAINING_FILE}`, every step in `{METRICS_FILE}`."
    sections = {
        "Use": _usage(folder, base_id or "BASE_MODEL", name, lora=lora),
        "Training": table(("", ""), list(_facts(record))) + rest,
        "Evaluation": evaluation or "None was pushed with this model.",
        "Samples": samples or images,
        "License": f"`{license_}`" if license_ else "None was named; see those of the base model and of the data.",
        "Citation": SMPO_CITATION if record["objective"] == "smpo" else "",
    }
    version = record["versions"]["smpo-diffusion"]
    introduction = f"{what} {base}, trained on preferences between images by smpo-diffusion {version}."
    return compose(data, name.rpartition("/")[2], introduction, sections)


def _denoiser_folder(folder: Path) -> str:
    return next(name for name in DENOISER_FOLDERS if (folder / name).is_dir())


def _usage(folder: Path, base: str, name: str, *, lora: bool) -> str:
    """Write the code that loads the model."""
    if lora:
        imports, load = "DiffusionPipeline", f'pipe = DiffusionPipeline.from_pretrained("{base}")'
        lines = [load, f'pipe.load_lora_weights("{name}")']
    else:
        part = _denoiser_folder(folder)
        kind = str(read_json(folder / part / "config.json")["_class_name"])
        imports = ", ".join(sorted(("DiffusionPipeline", kind)))
        lines = [
            f'{part} = {kind}.from_pretrained("{name}", subfolder="{part}")',
            f'pipe = DiffusionPipeline.from_pretrained("{base}", {part}={part})',
        ]
    code = "\n".join([f"from diffusers import {imports}\n", *lines, 'pipe("a red circle").images[0].save("image.png")'])
    return f"```python\n{code}\n```"


def _facts(record: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield what decided the result: name and value."""
    settings = record["settings"]
    yield "objective", record["objective"]
    for name in ("beta", "gamma"):
        yield name, f"{settings[name]:g}"
    for name, reward in record["rewards"].items():
        yield (
            f"reward {name}",
            f"weight {reward['weight']:g}, differences / {reward['scale']:.4g}; {shared_name(reward['model'])}",
        )
    if not record["rewards"]:
        yield "learns from", "labels"
    for shard in record["shards"]:
        yield "shards", f"{shared_name(shard['path'])} (manifest.json has SHA-256 {shard['manifest_sha256'][:16]}...)"
    best = f"; this is the best by validation images, after step {record['best']['step']}" if record.get("best") else ""
    yield "steps", f"{record['steps']} of {record['states_per_step']} states; {record['epochs']:.3g} epochs{best}"
    for name in ("optimizer", "lr", "lora_rank", "quantize", "dtype", "seed"):
        if settings.get(name) is not None:
            yield name, settings[name]
    for warning in record["warnings"]:
        yield "warning", warning
    yield "versions", ", ".join(f"{package} {version}" for package, version in record["versions"].items())
