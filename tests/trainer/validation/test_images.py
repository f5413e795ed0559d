"""Images of fixed prompts and noise, drawn during a run."""

from __future__ import annotations

import json
import shutil
from functools import wraps
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import Decoder
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import CLIPTextModel

from smpo_models.draws import gaussian, named_stream
from smpo_trainer.validation import images as validation_images
from tests.tiny.stable_diffusion import IMAGE_SIDE, LATENT_SHAPE
from tests.trainer.conftest import Train
from tests.trainer.helpers import arguments, column, make_shards, metrics, run_cli

PROMPTS = ("a cat", "a dog and a cat", "ünïcödé 猫")
CLOCK = ("states_per_second", "data_wait_percent", "memory_gib")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture(scope="module", params=[torch.float16, torch.float32, torch.bfloat16], ids=str)
def stored(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder in each dtype in which models are published, and its shards."""
    folder = tmp_path_factory.mktemp("stored")
    StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32).to(request.param).save_pretrained(folder / "m")
    return folder / "m", make_shards(folder / "shards", folder / "m", num_pairs=2)


def drawn(out: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted((out / "validation").iterdir())}


def count_made(monkeypatch: pytest.MonkeyPatch, kind: type) -> list[None]:
    """A list that gets an entry for each new object of this class."""
    made: list[None] = []
    make = kind.__init__

    @wraps(make)
    def count(self: object, *args: object, **kwargs: object) -> None:
        made.append(None)
        make(self, *args, **kwargs)

    monkeypatch.setattr(kind, "__init__", count)
    return made


def by_a_stock_pipeline(model: Path, unet: Path, guidance: float) -> list[np.ndarray]:
    denoiser = UNet2DConditionModel.from_pretrained(unet, dtype=torch.float32)
    pipeline = StableDiffusionPipeline.from_pretrained(model, unet=denoiser, dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    images = []
    for number, prompt in enumerate(PROMPTS):
        latents = gaussian(named_stream(f"validation\n0\n{number}"), LATENT_SHAPE)[None]
        output = pipeline(prompt, latents=latents, num_inference_steps=4, guidance_scale=guidance, output_type="np")
        images.append(output.images[0])
    return images


@pytest.mark.slow
@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_images_equal_those_of_a_stock_pipeline(
    train: Train, model: Path, prompts: Path, ema_decay: float | None
) -> None:
    """The last images with the saved weights, the first ones with the base model."""
    out = train(
        image_prompts=prompts, image_every=2, image_sampling_steps=4, image_guidance_scale=3,
        max_steps=3, ema_decay=ema_decay, lr=1e-2,
    )  # fmt: skip
    grids = drawn(out)
    assert list(grids) == ["step-000000.png", "step-000002.png", "step-000003.png"]
    for name, unet in (("step-000000.png", model / "unet"), ("step-000003.png", out / "unet")):
        grid = grids[name]
        assert grid.shape == (2 * IMAGE_SIDE, 2 * IMAGE_SIDE, 3)
        wanted = by_a_stock_pipeline(model, unet, 3.0)
        for number, image in enumerate(wanted):
            top, left = IMAGE_SIDE * (number // 2), IMAGE_SIDE * (number % 2)
            ours = grid[top : top + IMAGE_SIDE, left : left + IMAGE_SIDE]
            assert np.abs(ours - 255.0 * image).max() <= 1.5
        assert not grid[IMAGE_SIDE:, IMAGE_SIDE:].any()
    assert not np.array_equal(grids["step-000000.png"], grids["step-000003.png"])
    board = EventAccumulator(str(out / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in board.Images("validation")] == [0, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [None, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_models_stored_precision_does_not_matter(
    train: Train, stored: tuple[Path, Path], prompts: Path, dtype: str, lora_rank: int | None
) -> None:
    model, shards = stored
    out = train(
        on=shards, base=model, dtype=dtype, lora_rank=lora_rank, max_steps=1,
        image_prompts=prompts, image_sampling_steps=4, image_guidance_scale=3,
    )  # fmt: skip
    grid = drawn(out)["step-000000.png"].astype(float)
    wanted = by_a_stock_pipeline(model, model / "unet", 3.0)
    difference = np.abs(grid[:IMAGE_SIDE] - 255 * np.concatenate(wanted[:2], axis=1))
    assert difference.max() <= 1.5 if dtype == "fp32" else difference.mean() <= 3


@pytest.mark.slow
def test_a_folder_with_one_variant_and_no_size_draws_the_same(
    train: Train, shards: Path, model: Path, prompts: Path, tmp_path: Path
) -> None:
    """Images have the size of the shards."""
    odd = shutil.copytree(model, tmp_path / "odd")
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (odd / part).glob("*.safetensors")
        file.rename(file.with_name(f"{file.stem}.fp32.safetensors"))
    config = odd / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": None}))
    options = {"max_steps": 1, "image_prompts": prompts, "image_sampling_steps": 2}
    grids = [
        drawn(train(str(number), base=base, **options))["step-000000.png"] for number, base in enumerate((model, odd))
    ]
    assert np.array_equal(*grids)


def test_images_use_the_text_encoders_of_the_training(
    train: Train, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stored text each drawing loads them: :mod:`tests.trainer.shards.test_text`."""
    made = count_made(monkeypatch, CLIPTextModel)
    train(max_steps=1, image_prompts=prompts, image_sampling_steps=1)
    assert len(made) == 1


def test_images_are_decoded_one_by_one_and_in_tiles_if_memory_runs_out(
    train: Train, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Decoder.forward
    sizes: list[tuple[int, int]] = []

    def no_memory(self: Decoder, latents: torch.Tensor, *more: object) -> torch.Tensor:
        sizes.append((len(latents), latents.shape[-1]))
        if latents.shape[-1] > LATENT_SHAPE[-1] // 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return decode(self, latents, *more)

    monkeypatch.setattr(Decoder, "forward", no_memory)
    monkeypatch.setattr(validation_images, "_SMALLEST_TILE", 2)
    options = {"max_steps": 1, "image_prompts": prompts, "image_sampling_steps": 1, "batch_size": 3}
    (_, grid), _ = drawn(train(**options)).items()
    assert sizes[:2] == [(1, 8), (1, 4)]
    assert {size for size in sizes if size[1] <= 4} <= {(1, 4), (1, 3), (1, 2), (1, 1)}
    assert sizes.count((1, 8)) == 2  # once per drawing
    tiles = grid.reshape(2, IMAGE_SIDE, 2, IMAGE_SIDE, 3).swapaxes(1, 2).reshape(4, -1).std(axis=1)
    assert (tiles > 0).tolist() == [True, True, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}, {"dtype": "bf16"}])
def test_drawing_does_not_change_the_training(
    train: Train, prompts: Path, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"ema_decay": 0.5, "workers": 1, **options}
    made = count_made(monkeypatch, AutoencoderKL)
    without = train("without", **common)
    assert not made
    drawing = {"image_prompts": prompts, "image_every": 1, "image_sampling_steps": 2}
    with_images = train("with", **common, **drawing)
    assert len(made) == len(drawn(with_images)) == 5
    for ours, theirs in zip(metrics(with_images), metrics(without), strict=True):
        assert {k: v for k, v in ours.items() if k not in CLOCK} == {k: v for k, v in theirs.items() if k not in CLOCK}


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), ("\n \n", "has no prompt")])
def test_a_file_without_prompts_is_one_line(
    shards: Path,
    model: Path,
    tmp_path: Path,
    content: str | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_text(content)
    assert run_cli(monkeypatch, arguments(shards, model, tmp_path / "run", image_prompts=file)) == 2
    error = capsys.readouterr().err.strip()
    assert f"--image-prompts {file} {message}" in error
    assert error.count("\n") == 0


@pytest.mark.slow
def test_overwriting_removes_the_images_of_another_run(train: Train, prompts: Path) -> None:
    out = train(image_prompts=prompts, image_sampling_steps=1, max_steps=2)
    assert len(drawn(out)) == 2
    train(max_steps=2, overwrite=True)
    assert not (out / "validation").exists()
    assert len(column(out, "loss")) == 2
