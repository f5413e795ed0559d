"""``smpo-pipeline generate`` through the command line, on Ray, against stock diffusers and the evaluation's images."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from smpo_models.draws import image_noise
from smpo_models.fingerprint import fingerprint_module
from smpo_models.loading import load_family
from smpo_pipeline.generation.generator import state_nodes
from smpo_pipeline.jobs.generate.models import choose_settings, content_of, describe_generator, load, origin_of
from smpo_pipeline.jobs.generate.options import GenerateOptions
from smpo_pipeline.jobs.record.run_record import Run, UnitRecord, read_identity
from smpo_pipeline.jobs.record.status import read_status
from smpo_schemas.generation.candidates import CANDIDATES_FILE, CANDIDATES_SCHEMA, read_candidates
from smpo_schemas.pairs import image_id
from smpo_schemas.rejects import read_rejects
from smpo_schemas.scoring.scores import read_scores, read_scores_info
from tests.command import assert_one_line, run_here
from tests.tiny.stable_diffusion import make_tiny_clip, make_tiny_model, put_scheduler

pytestmark = pytest.mark.slow

ROWS = [
    {"prompt": "a cat", "category": "one", "rank": 1, "label": "x"},
    {"prompt": "cat and cat", "category": "two", "rank": 2, "label": None},
    {"prompt": " a cat ", "category": "again", "rank": 3, "label": None},
    {"prompt": "", "category": "none", "rank": 4, "label": None},
    {"prompt": "a dog", "category": "bad", "rank": 5, "label": None},
    {"prompt": "Größe 猫", "category": "five", "rank": 6, "label": None},
]
"""The model gives non-finite latents for dogs."""

MADE = ["a cat", "cat and cat", "Größe 猫"]
STEPS, GUIDANCE, IMAGES = 3, 3.0, 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("world")
    model = put_scheduler(make_tiny_model(folder / "model"), PNDMScheduler, skip_prk_steps=True)
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    (dog,) = pipeline.tokenizer("dog", add_special_tokens=False).input_ids
    with torch.no_grad():
        pipeline.text_encoder.get_input_embeddings().weight[dog] = torch.nan
    pipeline.text_encoder.save_pretrained(model / "text_encoder")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, ROWS)))
    return {"model": model, "prompts": prompts, "pickscore": make_tiny_clip(folder / "pickscore")}


def command(world: dict[str, Path], out: Path, *more: object) -> list[object]:
    """Options given later replace earlier ones."""
    fixed = ("--model", world["model"], "--prompts", world["prompts"], "--out", out, "--device", "cpu")
    fixed += ("--sampler", "ddim", "--steps", STEPS, "--guidance-scale", GUIDANCE, "--images-per-prompt", IMAGES)
    fixed += ("--prompts-per-file", 2, "--batch-size", 3, "--concurrency", 1)
    return ["smpo-pipeline", "generate", *fixed, *more]


@pytest.fixture(scope="module")
def candidates(world, tmp_path_factory, on_ray) -> Path:
    out = tmp_path_factory.mktemp("candidates") / "out"
    done = on_ray(*command(world, out, "--keep", "states:2"))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "not carried through: label" in done.stdout
    return out


def rows_of(out: Path) -> list[dict]:
    return [row for part in read_candidates(out).parts for row in pq.read_table(out / part.name).to_pylist()]


def images_of(out: Path) -> dict[tuple[str, int], bytes]:
    rows = rows_of(out)
    return {(row["prompt"], row[f"noise_{side}"]["index"]): row[f"image_{side}"] for row in rows for side in range(2)}


def pixels(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)), int)


def largest_difference(ours: dict[tuple[str, int], bytes], theirs: dict[tuple[str, int], bytes]) -> int:
    """Of the images that both have, in grey levels."""
    common = ours.keys() & theirs.keys()
    assert common
    return max(np.abs(pixels(ours[key]) - pixels(theirs[key])).max() for key in common)


def test_every_prompt_has_its_images_or_a_reason(world, candidates):
    made = read_candidates(candidates)
    assert (made.prompts_in, made.prompts, made.images, made.rejected) == (5, 3, 12, 2)
    assert made.rejected_reasons == {"no prompt": 1, "not finite": 1}
    rejects = read_rejects(candidates / "rejected.parquet")
    assert [(Path(reject.source).name, reject.stage) for reject in rejects] == [
        ("prompts.jsonl:3", "generate"),
        ("prompts.jsonl:4", "generate"),
    ]
    assert rejects[1].reason == "not finite: latents of image 0"
    unet = UNet2DConditionModel.from_pretrained(world["model"], subfolder="unet")
    model = fingerprint_module(unet)
    rows = rows_of(candidates)
    assert [row["prompt"] for row in rows] == [prompt for prompt in MADE for _ in range(IMAGES // 2)]
    for number, row in enumerate(rows):
        j = number % 2
        assert (row["model"], row["label"]) == (model, None)
        for side in range(2):
            assert row[f"noise_{side}"] == {"seed": 0, "index": 2 * j + side, "shape": [4, 8, 8]}
            assert image_id(row[f"image_{side}"]) in load_file(candidates / row[f"latents_{side}"])
    assert [row["category"] for row in rows[::2]] == ["one", "two", "five"]
    assert [row["rank"] for row in rows[::2]] == [1, 2, 6]
    for part in made.parts:
        assert pq.read_schema(candidates / part.name).names == [*CANDIDATES_SCHEMA.names, "category", "rank"]
        assert hashlib.sha256((candidates / part.name).read_bytes()).hexdigest() == part.sha256
    status = read_status(candidates)
    assert (status.job, status.finished, status.units, status.pairs_in, status.rejected) == ("generate", True, 3, 5, 2)


def test_images_latents_and_states_are_the_stock_pipelines(world, candidates):
    """The loop of the paper's DDIM with diffusers' own parts, one image at a time."""
    pipeline = StableDiffusionPipeline.from_pretrained(world["model"])
    scheduler = pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    made, kept = read_candidates(candidates), {}
    assert (made.sampler, made.steps) == ("DDIM", STEPS)
    for part in made.parts:
        assert part.kept is not None
        kept |= load_file(candidates / part.kept.name)
    drawn = set()
    images = images_of(candidates)
    for prompt, index in images:
        noise = image_noise(0, prompt, index, (4, 8, 8))[None]
        inputs = [noise[0]]

        def record(_pipeline, _step, _time, values, inputs=inputs):
            inputs.append(values["latents"][0])
            return values

        options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "callback_on_step_end": record}
        image = pipeline(prompt, latents=noise, height=32, width=32, **options).images[0]
        name = image_id(images[prompt, index])
        assert np.abs(pixels(images[prompt, index]) - np.asarray(image, int)).max() <= 1
        torch.testing.assert_close(kept[name], inputs[-1], atol=1e-4, rtol=1e-4)
        nodes = state_nodes(made, prompt)
        drawn.add(tuple(nodes))
        assert kept[f"{name}.timesteps"].tolist() == scheduler.timesteps[nodes].tolist()
        expected = torch.stack([inputs[node] for node in nodes])
        torch.testing.assert_close(kept[f"{name}.states"], expected, atol=1e-4, rtol=1e-4)
    assert len(drawn) > 1
    assert all(len(set(nodes)) == 2 and set(nodes) <= set(range(STEPS)) for nodes in drawn)


def test_an_evaluation_on_a_cluster_has_the_same_images(world, candidates, tmp_path, here_on_ray):
    """Also of a part of the prompts, in another order, and of fewer images."""
    prompts, numbers = MADE[:0:-1], range(3)
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    settings = ("--sampler", "ddim", "--steps", STEPS, "--guidance-scale", GUIDANCE, "--images-per-prompt", 3)
    arguments = ("--prompts", tmp_path / "prompts.txt", "--reward", f"pickscore={world['pickscore']}", *settings)
    running = ("--device", "cpu", "--concurrency", 2, "--batch-size", 2, "--out", tmp_path / "out")
    done = here_on_ray("smpo-pipeline", "evaluate", "--model", f"m={world['model']}", *arguments, *running)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / "images" / "m"
    files = {
        (prompt, index): f"{place:05d}-{index:02d}.png" for place, prompt in enumerate(prompts) for index in numbers
    }
    assert sorted(path.name for path in folder.iterdir()) == sorted([*files.values(), "made_from.json"])
    images = {key: (folder / file).read_bytes() for key, file in files.items()}
    assert largest_difference(images, images_of(candidates)) <= 1


def test_fewer_images_other_batches_and_files_make_the_same_images(world, candidates, tmp_path, here_on_ray):
    images = images_of(candidates)
    more = ("--images-per-prompt", 2, "--batch-size", 5, "--prompts-per-file", 3, "--concurrency", 2)
    done = here_on_ray(*command(world, tmp_path / "few", *more))
    assert done.returncode == 0, done.stderr
    few = images_of(tmp_path / "few")
    assert {row["pair_id"] for row in rows_of(tmp_path / "few")} < {row["pair_id"] for row in rows_of(candidates)}
    assert few.keys() == {(prompt, index) for prompt in MADE for index in range(2)}
    assert largest_difference(few, images) <= 1
    assert not list((tmp_path / "few").glob("latents-*"))


def test_a_denoiser_equal_to_the_models_and_another_format(world, candidates, tmp_path, here_on_ray):
    """WebP holds the pixels of the PNG; a tuned denoiser with the base's weights makes the base's images."""
    unet = tmp_path / "run" / "unet"
    shutil.copytree(world["model"] / "unet", unet)
    more = ("--unet", unet.parent, "--image-format", "webp")
    done = here_on_ray(*command(world, tmp_path / "out", *more))
    assert done.returncode == 0, done.stderr
    ours, theirs = rows_of(tmp_path / "out"), rows_of(candidates)
    for our, their in zip(ours, theirs, strict=True):
        assert our["pair_id"] != their["pair_id"]  # `score` takes a pair of other files for another pair
        for side in range(2):
            assert our[f"image_{side}"][8:12] == b"WEBP"
            np.testing.assert_array_equal(pixels(our[f"image_{side}"]), pixels(their[f"image_{side}"]))
    assert read_candidates(tmp_path / "out").model.unet == str(unet.parent)


def test_a_run_is_resumed_where_its_files_are_whole(world, candidates, tmp_path, here_on_ray):
    """One unit is committed, one has lost its latents, one was not made."""
    out = tmp_path / "out"
    shutil.copytree(candidates, out)
    made = read_candidates(out)
    run = Run(out, CANDIDATES_FILE, read_identity(out) or {})
    (out / CANDIDATES_FILE).unlink()
    for unit, part in zip((0, 2), made.parts, strict=True):
        run.commit(UnitRecord(unit=unit, pairs_in=2, pairs=2, rejects=[], entry=part.model_dump()))
    assert read_status(out).units_done == 2
    assert not read_status(out).finished
    damaged = out / made.parts[1].kept.name
    damaged.write_bytes(damaged.read_bytes()[:-1])
    before = (out / made.parts[0].name).stat().st_mtime_ns
    done = here_on_ray(*command(world, out, "--keep", "states:2", "--batch-size", 3))
    assert done.returncode == 0, done.stderr
    assert (out / made.parts[0].name).stat().st_mtime_ns == before
    assert read_candidates(out) == made
    for path in candidates.iterdir():
        if path.name != "config.yaml":
            assert (out / path.name).read_bytes() == path.read_bytes()
    assert not (out / ".units").exists()


def test_scored_and_inspected(world, candidates, tmp_path, here_on_ray, capfd):
    reward = f"pickscore={world['pickscore']}"
    score = ("smpo-pipeline", "score", "--pairs", candidates, "--reward", reward, "--device", "cpu")
    assert here_on_ray(*score, "--out", tmp_path / "scores").returncode == 0
    table = read_scores(tmp_path / "scores", read_scores_info(tmp_path / "scores"))
    assert table["pair_id"].to_pylist() == [row["pair_id"] for row in rows_of(candidates)]
    for what in (candidates, candidates / CANDIDATES_FILE, tmp_path / "scores"):
        more = ("--out", tmp_path / "sheet.png") if what != tmp_path / "scores" else ()
        done = run_here(capfd, "smpo-pipeline", "inspect", what, *more)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "sheet.png").is_file()
    unfinished = shutil.copytree(candidates, tmp_path / "unfinished")
    (unfinished / CANDIDATES_FILE).unlink()
    done = run_here(capfd, *score[:3], unfinished, *score[4:], "--out", tmp_path / "none")
    assert_one_line(done, str(unfinished), "unfinished run of `generate`")


def test_mistakes_are_one_line(world, candidates, tmp_path, capfd):
    run = partial(run_here, capfd)
    odd = run(*command(world, tmp_path, "--images-per-prompt", 3))
    assert_one_line(odd, "--images-per-prompt 3", "even")
    assert_one_line(run(*command(world, tmp_path, "--keep", "states:0")), "--keep states:0", "states:M")
    assert_one_line(run(*command(world, tmp_path, "--keep", "states:4")), "--keep states:4", "3 steps")
    pndm = run(*command(world, tmp_path, "--keep", "states:2", "--sampler", "model"))
    assert_one_line(pndm, "--keep states:2", "PNDMScheduler", "--sampler ddim")
    both = ("--unet", world["model"] / "unet", "--lora", world["model"])
    assert_one_line(run(*command(world, tmp_path, *both)), "--unet", "--lora", "only one")
    assert_one_line(run(*command(world, tmp_path, "--prompts", tmp_path / "none.txt")), "--prompts", "does not exist")
    (tmp_path / "empty").mkdir()
    wrong = run(*command(world, tmp_path, "--unet", tmp_path / "empty"))
    assert_one_line(wrong, str(tmp_path / "empty"), "holds no denoiser")
    unguided = run(*command(world, tmp_path, "--negative", world["model"], "--guidance-scale", 1))
    assert_one_line(unguided, "--negative", "--guidance-scale 1")
    seed = run(*command(world, candidates, "--seed", 1, "--keep", "states:2"))
    assert_one_line(seed, "finished run", "generation.seed: 0 there, 1 here")
    sampler = run(*command(world, candidates, "--sampler", "model"))
    assert_one_line(sampler, "finished run", "generation.sampler: DDIM there, PNDMScheduler here")


def test_pairs_of_different_images_have_different_ids(world, tmp_path):
    """Whatever decides the pixels is in the id. The denoiser's fingerprint stays that of the model."""
    unet = make_tiny_model(tmp_path / "other", seed=3)
    options = GenerateOptions(model=str(world["model"]), prompts=world["prompts"], out=tmp_path)
    options = options.replace(device="cpu")
    described = []
    for negative in (None, unet):
        some = options.replace(negative=negative)
        described.append(describe_generator(some, load(some.loading, "cpu", "fp32"), "fp32"))
    plain, guided = described
    assert plain.denoiser == guided.denoiser
    assert plain.parts["unet"] != guided.parts["unet"]
    assert guided.negative == str(unet)
    changes = [{}, *({name: value} for name, value in OTHERS.items())]
    origins = [origin_of(plain, choose_settings(options.replace(**change))[1]) for change in changes]
    origins += [origin_of(guided, choose_settings(options)[1])]
    assert len(set(origins)) == len(origins)
    more = options.replace(images_per_prompt=4, keep="latents", batch_size=2)
    assert origin_of(plain, choose_settings(more)[1]) == origins[0]


OTHERS = {
    "sampler": "ddim",
    "steps": 7,
    "guidance_scale": 2.0,
    "seed": 1,
    "dtype": "bf16",
    "resolution": 64,
    "image_format": "jpeg",
}


@pytest.mark.long
def test_killed_at_random_moments_and_run_again_gives_the_same(world, candidates, tmp_path, here_on_ray):
    out = tmp_path / "out"
    code = "import sys; sys.argv[0] = 'smpo-pipeline'; from smpo_pipeline.cli import main; main()"
    arguments = command(world, out, "--keep", "states:2")[1:]
    rng = np.random.default_rng(0)
    for attempt in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            before = len(list((out / ".units").glob("*.json"))) if out.exists() else 0
            if attempt < 2:  # in the middle of units, whenever that is
                while process.poll() is None and len(list((out / ".units").glob("*.json"))) <= before:
                    time.sleep(0.01)
            else:
                time.sleep(rng.uniform(5, 25))
            process.kill()
    done = here_on_ray(*command(world, out, "--keep", "states:2"))
    assert done.returncode == 0, done.stderr
    names = {path.name for path in candidates.iterdir()}
    assert {path.name for path in out.iterdir()} == names
    for name in names - {"config.yaml"}:
        assert (out / name).read_bytes() == (candidates / name).read_bytes()


def test_the_model_is_known_by_its_fingerprint_in_float32(world):
    """Also where it is sampled in half precision: as the manifests of shards name it."""
    options = GenerateOptions(model=str(world["model"]), prompts=world["prompts"], out=world["model"].parent / "no")
    half = load(options.loading, "cpu", "bf16")
    described = describe_generator(options, half, "bf16")
    denoiser = load_family(str(world["model"]), ("denoiser",)).denoiser
    assert described.denoiser == fingerprint_module(denoiser) != described.parts["unet"]
    assert described.content == content_of(half)
    assert described.content != content_of(load(options.loading, "cpu", "fp32"))
