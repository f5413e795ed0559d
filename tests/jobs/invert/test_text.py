"""``invert --text stored`` through the command line: what is stored, where it comes from, and what it replaces."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from smpo_common.errors import UserError
from smpo_models.loading import load_family
from smpo_pipeline.jobs.invert import job
from smpo_pipeline.jobs.invert import text as text_stage
from smpo_pipeline.jobs.invert.prompts import encode_batches
from smpo_schemas.manifest import read_manifest
from smpo_schemas.pairs import image_id
from smpo_schemas.shards.text import StoredText
from tests.calibration.helpers import write_scores
from tests.command import assert_one_line, run_command, run_here
from tests.pictures import encode, picture
from tests.tiny.flow import make_tiny_flux, make_tiny_sd3
from tests.tiny.stable_diffusion import make_tiny_model
from tests.tiny.transformers import make_tiny_sana

pytestmark = pytest.mark.slow

PROMPTS = ["a cat", "dog " * 300, "Größe 東京", "a cat", "cat and dog"]
MODELS = {"sd15": make_tiny_model, "sd35": make_tiny_sd3, "sana": make_tiny_sana}
"""With one tensor, several, and texts of different lengths."""


def make_inputs(folder: Path, prompts: list[str]) -> Path:
    """A pair for each prompt, and their scores."""
    rows = [
        {
            "jpg_0": encode(picture(64, 64, seed=number)),
            "jpg_1": encode(picture(64, 64, seed=number + 50)),
            "caption": prompt,
            "label_0": float(number % 2),
            "ranking_id": number,
        }
        for number, prompt in enumerate(prompts)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet", row_group_size=4)
    images = [(image_id(row["jpg_0"]), image_id(row["jpg_1"])) for row in rows]
    ids, labels = [str(row["ranking_id"]) for row in rows], [row["label_0"] for row in rows]
    made_up = {"clipscore": np.random.default_rng(0).random((len(rows), 2))}
    write_scores(folder / "scores", made_up, labels, prompts, images=images, pair_ids=ids)
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Ten pairs of four distinct prompts."""
    return make_inputs(tmp_path_factory.mktemp("inputs"), [*PROMPTS, *PROMPTS])


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """150 pairs, each with a prompt of its own."""
    return make_inputs(tmp_path_factory.mktemp("many"), [f"cat {number}" for number in range(150)])


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    return MODELS[request.param](tmp_path_factory.mktemp("models") / request.param)


def invert(inputs, model, out, *more, run):
    common = ("--pairs", inputs / "pairs.parquet", "--scores", inputs / "scores", "--model", model, "--out", out)
    small = ("--device", "cpu", "--steps", 2, "--pairs-per-shard", 4, "--concurrency", 1)
    return run("smpo-pipeline", "invert", *common, *small, *more)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below the folder that does not name the command's flags."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "config.yaml"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def stored(inputs, model, tmp_path_factory, on_ray):
    out = tmp_path_factory.mktemp("stored") / "out"
    done = invert(inputs, model, out, "--text", "stored", run=on_ray)
    assert done.returncode == 0, done.stderr
    return out


def test_each_distinct_prompt_is_stored_once_as_the_encoders_give_it(model, stored):
    entry = read_manifest(stored).text
    assert entry.prompts == len(set(PROMPTS)) + 1
    assert sum(file.prompts for file in entry.files) == entry.prompts
    listed = {"text/index.safetensors": entry.index, **{f"text/{file.name}": file for file in entry.files}}
    found = {name: content for name, content in files(stored).items() if name.startswith("text/")}
    assert {name: len(content) for name, content in found.items()} == {name: e.bytes for name, e in listed.items()}
    assert entry.bytes == sum(map(len, found.values()))
    text, family = StoredText(stored / "text", entry), load_family(str(model), ("text",))
    for prompt in ("", *PROMPTS):
        for name, expected in family.encode_text([prompt]).items():
            assert torch.equal(text([prompt])[0][name], expected[0]), (prompt, name)
        assert text.cuts(prompt) == family.cuts(prompt)
    # Any reader of safetensors can read the files. Texts of different lengths lie one after the other.
    tensors = safetensors.torch.load_file(stored / "text" / entry.files[0].name)
    empty = family.encode_text([""])["text"]
    assert torch.equal(tensors["text"][: len(empty[0]) if model.name == "sana" else 1].reshape(empty.shape), empty)


@pytest.mark.parametrize(
    "make",
    [make_tiny_flux, lambda path: make_tiny_sd3(path, version="3", t5=False)],
    ids=["flux1-dev", "sd3-without-t5"],
)
def test_prompts_that_are_encoded_together_are_stored_as_each_alone(make, tmp_path):
    """Of other kinds of encoders, without the job."""
    family = load_family(str(make(tmp_path / "model")), ("text",))
    stored = [row for batch in encode_batches(family, PROMPTS, "fp32") for row in batch]
    for prompt, row in zip(PROMPTS, stored, strict=True):
        alone = family.encode_text([prompt])
        assert row.keys() == alone.keys()
        for name, expected in alone.items():
            assert torch.equal(row[name], expected[0]), (prompt, name)


def training(shards: Path, model: Path, out: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of a short run."""
    few = ("--max-steps", 3, "--batch-size", 4, "--lr", 1e-4, "--warmup-steps", 0, "--workers", 0, "--beta", 2000)
    done = run_command("smpo-train", "--shards", shards, "--model", model, "--out", out, *few)
    assert done.returncode == 0, done.stderr
    assert ("stored text, no text encoders" in done.stdout) == (read_manifest(shards).text is not None)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines]


def test_inspect_describes_and_verifies_it(stored, tmp_path, capfd):
    look = ("smpo-pipeline", "inspect", stored, "--samples", 0)
    assert "5 prompts stored once in float32" in run_here(capfd, *look).stdout
    shutil.copytree(stored, tmp_path / "cut")
    path = tmp_path / "cut" / "text" / "text-000000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert_one_line(run_here(capfd, *look[:2], tmp_path / "cut"), str(path), "truncated", "--overwrite")


def test_the_plan_has_the_bytes_of_the_files(inputs, model, stored, tmp_path, capfd):
    flags = ("--model", model, "--device", "cpu", "--steps", 2, "--seconds", 0.1, "--batch-size", 2)
    common = ("smpo-pipeline", "plan", "--pairs", inputs / "pairs.parquet", *flags, "--json", tmp_path / "plan.json")
    done = run_here(capfd, *common, "--text", "stored")
    assert done.returncode == 0, done.stderr
    assert "5 prompts" in done.stdout
    plan, entry = json.loads((tmp_path / "plan.json").read_text()), read_manifest(stored).text
    assert plan["text"]["prompts"] == entry.prompts
    assert plan["text"]["bytes"] == plan["projections"][0]["text_bytes"] == entry.bytes
    million = plan["projections"][1]
    # Half a prompt a pair; a file has 128.
    assert million["text_bytes"] == pytest.approx(500_000 / 5 * entry.bytes, rel=0.2)
    done = run_here(capfd, *common)
    text = json.loads((tmp_path / "plan.json").read_text())["text"]
    assert (text is None) == (model.name == "sd15")


@pytest.mark.parametrize("model", ["sd35", "sana"], indirect=True)
def test_the_tars_are_those_of_live_text(inputs, model, stored, tmp_path, here_on_ray):
    done = invert(inputs, model, tmp_path / "live", "--text", "live", run=here_on_ray)
    assert done.returncode == 0, done.stderr
    mine, theirs = files(stored), files(tmp_path / "live")
    assert {name for name in mine if name.startswith("shard-")} == {n for n in theirs if n.startswith("shard-")}
    for name in theirs:
        if name.startswith("shard-"):
            assert mine[name] == theirs[name]
    assert not any(name.startswith("text/") for name in theirs)
    if model.name == "sd35":  # tests/trainer has the others
        runs = [training(folder, model, tmp_path / name) for name, folder in (("a", stored), ("b", tmp_path / "live"))]
        assert runs[0] == runs[1]
    live = read_manifest(tmp_path / "live")
    assert (live.text, live.inversion.text) == (None, "live")
    assert read_manifest(stored).totals == live.totals
    assert live.totals.prompts_cut == 2


@pytest.mark.parametrize("model", ["sd35"], indirect=True)
def test_a_killed_text_stage_is_resumed_and_gives_the_same_bytes(many, model, tmp_path, here_on_ray, capfd):
    """Killed with one of two files committed and the other half written; and once more before the manifest."""
    few = ("--source", "forward", "--steps", 1, "--pairs-per-shard", 100, "--no-hflip")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    done = invert(many, model, whole, *few, run=here_on_ray)
    assert done.returncode == 0, done.stderr
    assert [file.prompts for file in read_manifest(whole).text.files] == [128, 23]
    with killed_in(text_stage, "write_text_index"):
        invert(many, model, killed, *few, run=here_on_ray)
    assert sorted(path.name for path in killed.iterdir() if not path.name.startswith(".")) == ["run.json", "text"]
    first, second = sorted((killed / "text").glob("text-*.safetensors"))
    second.rename(second.with_name(f".{second.name}.0123.tmp"))
    next((killed / "text" / ".units").glob("000001-*.json")).unlink()
    assert "128 of 151" in run_here(capfd, "smpo-pipeline", "status", killed).stdout
    written = first.stat().st_mtime_ns
    with killed_in(job, "_finish"):
        invert(many, model, killed, *few, run=here_on_ray)
    assert first.stat().st_mtime_ns == written
    refused = invert(many, model, killed, *few, "--text", "live", run=here_on_ray)
    assert_one_line(refused, "inversion.text: stored there, live here", "--overwrite")
    second.write_bytes(second.read_bytes()[:-1])  # cut by something else: made again
    done = invert(many, model, killed, *few, run=here_on_ray)
    assert done.returncode == 0, done.stderr
    assert files(killed) == files(whole)
    assert {path.name for path in (killed / "text").iterdir()} == {first.name, second.name, "index.safetensors"}


@contextmanager
def killed_in(module: ModuleType, function: str) -> Iterator[None]:
    """Run a block whose command dies where it calls a function."""

    def die(*_: object, **__: object) -> None:
        raise RuntimeError("killed")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(module, function, die)
        yield


@pytest.mark.parametrize("model", ["sd15"], indirect=True)
def test_overwriting_removes_the_stored_text(inputs, model, stored, tmp_path, here_on_ray):
    out = tmp_path / "out"
    shutil.copytree(stored, out)
    (out / "text" / "text-000007.safetensors").write_bytes(b"of a larger run")
    done = invert(inputs, model, out, "--overwrite", "--limit", 2, run=here_on_ray)
    assert done.returncode == 0, done.stderr
    assert not (out / "text").exists()


@pytest.mark.parametrize("model", ["sd35"], indirect=True)
def test_a_limit_stores_the_prompts_of_its_pairs_only(inputs, model, tmp_path, here_on_ray, capfd):
    """From the forward source too; with a dtype of its own."""
    out = tmp_path / "out"
    flags = ("--limit", 2, "--source", "forward", "--dtype", "bf16")
    done = invert(inputs, model, out, *flags, run=here_on_ray)
    assert done.returncode == 0, done.stderr
    entry = read_manifest(out).text
    assert (entry.prompts, entry.dtype) == (3, "bfloat16")
    text, family = StoredText(out / "text", entry), load_family(str(model), ("text",))
    for prompt in ("", *PROMPTS[:2]):
        for name, expected in family.encode_text([prompt]).items():
            assert torch.equal(text([prompt])[0][name], expected[0].bfloat16())
    with pytest.raises(UserError, match="text lacks the prompt 'Größe 東京'.*--overwrite"):
        text([PROMPTS[2]])
    assert "3 of 3" in run_here(capfd, "smpo-pipeline", "status", out).stdout
