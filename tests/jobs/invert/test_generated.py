"""Noise-tracked pairs by command on the embedded world's flow model: from prompts to training, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from smpo_models.draws import image_noise
from smpo_pipeline.toy.create import ASSETS, MODELS
from smpo_schemas.generation.candidates import CANDIDATES_FILE, read_candidates
from smpo_schemas.manifest import read_manifest
from smpo_schemas.pairs import image_id
from smpo_schemas.rejects import read_rejects
from smpo_schemas.shards.reader import ShardDirectory
from tests.command import assert_one_line, run_command, run_here
from tests.tiny.flow import make_tiny_sd3
from tests.trainer.helpers import arguments, column, run_cli

pytestmark = pytest.mark.slow

MODEL = MODELS["sd3"]
PROMPTS = ["a small red circle", "a large blue square", "two green circles"]
STEPS = 4


@dataclass(frozen=True)
class World:
    """Two candidates a prompt, scored, and the pairs of them."""

    candidates: Path
    selected: Path

    def invert(self, *more: object, pairs: Path | None = None) -> list[object]:
        """Options given later replace earlier ones."""
        pairs = pairs or self.selected / "pairs.parquet"
        given = ("--pairs", pairs, "--scores", self.selected / "scores", "--model", MODEL)
        return ["smpo-pipeline", "invert", *given, "--device", "cpu", "--concurrency", 1, "--source", "tracked", *more]

    def rows(self) -> dict[str, dict]:
        return {row["pair_id"]: row for row in pq.read_table(self.selected / "pairs.parquet").to_pylist()}

    def with_rows(self, out: Path, change) -> Path:
        """The pairs with some values changed by ``change(number, row)``."""
        table = pq.read_table(self.selected / "pairs.parquet")
        rows = [row | change(number, row) for number, row in enumerate(table.to_pylist())]
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), out)
        return out


@pytest.fixture(scope="module")
def world(tmp_path_factory, on_ray) -> World:
    folder = tmp_path_factory.mktemp("world")
    made = World(folder / "candidates", folder / "selected")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    generate = ("--model", MODEL, "--prompts", folder / "prompts.txt", "--images-per-prompt", 2, "--steps", STEPS)
    kept = ("--guidance-scale", 1, "--keep", "states:2", "--prompts-per-file", 2, "--out", made.candidates)
    reward = f"pickscore={ASSETS / 'rewards/pickscore'}"
    score = ("--pairs", made.candidates, "--reward", reward, "--out", folder / "scores")
    select = ("--candidates", made.candidates, "--scores", folder / "scores", "--by", "extremes")
    on_cpu = ("--device", "cpu", "--concurrency", 1)
    for run, *command in (
        (on_ray, "generate", *generate, *kept, *on_cpu),
        (on_ray, "score", *score, *on_cpu[:2]),
        (run_command, "select", *select, "--out", made.selected),
    ):
        done = run("smpo-pipeline", *command)
        assert done.returncode == 0, done.stderr
    return made


@pytest.mark.parametrize("source", ["tracked", "sampled"])
def test_from_prompts_to_a_trained_model(world, source, tmp_path, here_on_ray, monkeypatch, capfd) -> None:
    shards, rows = tmp_path / "shards", world.rows()
    done = here_on_ray(*world.invert("--source", source, "--out", shards))
    assert done.returncode == 0, done.stderr
    assert f"latents of the images: {world.candidates}" in done.stdout
    manifest, made = read_manifest(shards), read_candidates(world.candidates)
    assert (manifest.totals.pairs, manifest.resolution) == (len(PROMPTS), made.resolution)
    assert (manifest.inversion.source, manifest.inversion.hflip) == (source, False)
    (sampling,) = manifest.samplings
    assert (sampling.sampler, sampling.steps, sampling.guidance_scale) == ("Euler", STEPS, 1.0)
    assert sampling.denoiser == manifest.model.reference == manifest.model.inverting_denoiser
    assert manifest.text is not None
    kept = {}
    for part in made.parts:
        kept |= load_file(world.candidates / part.kept.name)
    samples = list(ShardDirectory(shards).samples())
    assert {sample.meta.pair_id for sample in samples} == rows.keys()
    for sample in samples:
        row = rows[sample.meta.pair_id]
        for side in range(2):
            image = image_id(row[f"image_{side}"])
            assert torch.equal(sample.x0_2Chw[side], kept[image].half())
            if source == "tracked":
                index = row[f"noise_{side}"]["index"]
                noise = image_noise(0, row["prompt"], index, kept[image].shape).half()
                assert torch.equal(sample.noise_K2Chw[:, side], noise.expand_as(sample.noise_K2Chw[:, side]))
            else:
                assert sample.timestep_K.tolist() == pytest.approx(sorted(kept[f"{image}.timesteps"].tolist()))
    for name, more in {"full": {}, "lora": {"lora_rank": 2}}.items():
        options = {"max_steps": 2, "beta": 1000.0, "reward": "pickscore", **more}
        assert run_cli(monkeypatch, arguments(shards, MODEL, tmp_path / name, **options)) == 0
        assert column(tmp_path / name, "loss")[0] == pytest.approx(math.log(2), abs=1e-4)
    described = run_here(capfd, "smpo-pipeline", "inspect", shards, "--out", tmp_path / "sheet.png")
    words = {"tracked": "each image's own initial noise", "sampled": "2 of the sampler's own states"}
    for part in (words[source], "generated, 4 Euler steps, guidance scale 1"):
        assert part in " ".join(described.stdout.split())


def test_pairs_without_noise_or_latents_are_rejected(world, tmp_path, here_on_ray) -> None:
    """By the candidates' new folder, which the selection does not know."""
    moved = shutil.copytree(world.candidates, tmp_path / "moved")
    changes = [{"noise_1": None}, {"latents_0": "latents-000009.safetensors"}, {}]
    pairs = world.with_rows(tmp_path / "pairs.parquet", lambda number, _: changes[number])
    more = ("--candidates", moved, "--max-reject-rate", 1, "--out", tmp_path / "out")
    command = world.invert(*more, pairs=pairs)
    done = here_on_ray(*command)
    assert done.returncode == 0, done.stderr
    reasons = [reject.reason for reject in read_rejects(tmp_path / "out" / "rejected.parquet")]
    assert reasons[0] == "no noise: noise_1 is empty"
    assert reasons[1].startswith("no latents: of image_0; no folder of --candidates has them in latents-000009")
    assert read_manifest(tmp_path / "out").totals.pairs == 1
    # Other candidates are other settings.
    info = json.loads((moved / CANDIDATES_FILE).read_text())
    (moved / CANDIDATES_FILE).write_text(json.dumps(info | {"guidance_scale": 2.0}))
    done = here_on_ray(*command)
    assert_one_line(done, "finished run with other settings", "samplings")


def test_mistakes_are_one_line(world, tmp_path, capfd) -> None:
    run = partial(run_here, capfd)
    out = ("--out", tmp_path / "out")
    for flags in (("--hflip",), ("--buckets",), ("--eta", 0.1), ("--vae-latent", "mode"), ("--guidance-scale", 2)):
        assert_one_line(run(*world.invert(*flags, *out)), flags[0], "--source tracked does not use it")
    assert_one_line(run(*world.invert("--source", "sampled", "--steps", 3, *out)), "--steps: --source sampled")
    assert_one_line(run(*world.invert("--source", "forward", "--candidates", tmp_path, *out)), "--candidates: --source")
    assert_one_line(run(*world.invert("--candidates", tmp_path, *out)), f"{tmp_path} holds no candidates.json")
    side = read_candidates(world.candidates).resolution
    assert_one_line(run(*world.invert("--resolution", 2 * side, *out)), f"have {side} pixels a side, not {2 * side}")
    pairs = world.selected / "pairs.parquet"
    pq.write_table(pq.read_table(pairs).drop_columns(["noise_0"]), tmp_path / "pairs.parquet")
    assert_one_line(run(*world.invert(*out, pairs=tmp_path / "pairs.parquet")), "no column noise_0")
    copied = shutil.copy(pairs, tmp_path / "pairs.parquet")
    assert_one_line(run(*world.invert(*out, pairs=copied)), "neither from `generate` nor from `select`")
    other = make_tiny_sd3(tmp_path / "model", shift=2.0)
    assert_one_line(run(*world.invert("--model", other, *out)), "noise schedule")
    moved = shutil.copytree(world.candidates, tmp_path / "moved")
    info = json.loads((moved / CANDIDATES_FILE).read_text())
    for change, *words in (
        ({"keep": None}, "without --keep latents"),
        ({"model": info["model"] | {"denoiser": "other"}}, "another denoiser", "--inverting-unet"),
        ({"model": info["model"] | {"parts": {"vae": "other"}}}, "another VAE"),
    ):
        (moved / CANDIDATES_FILE).write_text(json.dumps(info | change))
        assert_one_line(run(*world.invert("--candidates", moved, *out)), str(moved), *words)


def test_a_plan_counts_one_forward_a_state(world, tmp_path, capfd) -> None:
    plan = [*world.invert("--json", tmp_path / "plan.json", "--seconds", 0.1, "--steps", 3, "--batch-size", 2)]
    plan[1] = "plan"
    done = run_here(capfd, *plan)
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "plan.json").read_text())
    assert (measured["forwards_a_trajectory"], measured["sampled"], measured["usable"]) == (6, len(PROMPTS), 1)
