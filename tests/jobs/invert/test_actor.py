"""The actor of ``invert``, without Ray."""

from __future__ import annotations

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DiffusionPipeline

from smpo_common.errors import UserError
from smpo_models.family_bases.unet_family import UNetFamily
from smpo_models.loading import load_family
from smpo_pipeline import isolation
from smpo_pipeline.inversion.health import HealthSums
from smpo_pipeline.isolation import Failure
from smpo_pipeline.jobs.invert import actor as invert_unit
from smpo_pipeline.jobs.invert import job as invert
from smpo_pipeline.jobs.invert import models as invert_models
from smpo_pipeline.jobs.invert.actor import InvertActor
from smpo_pipeline.jobs.invert.models import describe_model, load_models
from smpo_pipeline.jobs.invert.options import InvertOptions
from smpo_pipeline.jobs.record import progress
from smpo_pipeline.jobs.record.batch_sizes import pop_batch_sizes
from smpo_pipeline.jobs.record.run_record import Run
from smpo_pipeline.jobs.record.work_log import WorkLog
from tests.inversion.helpers import make_pair
from tests.tiny.stable_diffusion import make_tiny_model, make_tiny_xl


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_tiny_model(folder / "sd")
    make_tiny_xl(folder / "xl")
    make_tiny_model(folder / "inverting_denoiser", seed=1)
    return folder


def make_options(models, out, **changed):
    """``changed``: by flag name, not validated."""
    options = InvertOptions(
        pairs=[],
        scores=models,
        out=out,
        models={"model": str(models / "sd")},
        trajectory={"steps": 1},
        storing={"pairs_per_shard": 8},
        running={"batch_size": 8, "device": "cpu", "dtype": "bf16", "concurrency": 1, "max_reject_rate": 1.0},
    )
    return options.replace(**changed)


def make_actor(models, out, monkeypatch, **changed):
    monkeypatch.setattr(invert_unit.ray, "get", lambda value: value)
    options = make_options(models, out, **changed)
    model = describe_model(options, *load_models(options))
    run = Run(out, "manifest.json", {})
    run.open(overwrite=False, patterns=())
    return InvertActor(options, model, run, pa.table({}), 8, 32, WorkLog())


def test_the_job_prints_its_default_settings(models, tmp_path):
    options = make_options(models, tmp_path, prompt_dropout=0.25, batch_size=None, seed=3)
    printed = "; ".join(options.choices(64, 77))
    for part in (
        "77 pairs",
        "64 x 64",
        "cpu",
        "bf16",
        "seed 3",
        "25 %",
        "--prompt-dropout",
        "50 % mirrored",
        "automatic",
    ):
        assert part in printed
    printed = "; ".join(make_options(models, tmp_path, hflip=False, buckets=True).choices(64, 77))
    for part in (", 0 % mirrored", "aspect", "of 8 trajectories", "seed 0"):
        assert part in printed


@pytest.mark.parametrize("inverting_denoiser", [None, "inverting_denoiser"])
def test_denoisers_are_cast_before_they_move_to_the_device(models, tmp_path, monkeypatch, inverting_denoiser):
    moved, to = set(), UNetFamily.to

    def watched(family, device):
        for name, parameter in family.denoiser.named_parameters():
            moved.add(("norm" in name, parameter.dtype, parameter.device.type, device))
        to(family, device)

    monkeypatch.setattr(UNetFamily, "to", watched)
    # The meta device stands for a GPU.
    actor = make_actor(
        models,
        tmp_path,
        monkeypatch,
        inverting_unet=inverting_denoiser and models / inverting_denoiser,
        device="meta",
    )
    # Norms stay in float32 in the reference, as in the trainer.
    assert moved == {(False, torch.bfloat16, "cpu", "meta"), (True, torch.float32, "cpu", "meta")}
    own = actor._inverter._denoisers.inverting
    assert {(parameter.dtype, parameter.device.type) for parameter in own.parameters()} == {(torch.bfloat16, "meta")}
    reference = dict(actor._family.denoiser.named_parameters())
    shared = {"norm" in name for name, parameter in own.named_parameters() if parameter is reference[name]}
    assert shared == ({False} if inverting_denoiser is None else set())


@pytest.mark.slow
def test_files_in_the_runs_dtype_are_never_held_in_float32(models, tmp_path, monkeypatch):
    DiffusionPipeline.from_pretrained(models / "sd", torch_dtype=torch.bfloat16).save_pretrained(tmp_path / "sd")
    family, _ = load_models(make_options(tmp_path, tmp_path))
    assert {parameter.dtype for parameter in family.denoiser.parameters()} == {torch.bfloat16}
    made = []
    for name in ("half", "whole"):
        actor = make_actor(tmp_path, tmp_path / name, monkeypatch)
        made.append(actor._inverter.invert([(make_pair(number), 0) for number in range(2)])[0])
        monkeypatch.setattr(invert_models, "DTYPES", {"bf16": torch.float32})
    for half, whole in zip(*made, strict=True):
        expected = whole.tensors()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in half.tensors().items())


def test_each_batch_is_reported(models, tmp_path, monkeypatch):
    """Pairs have two trajectories each; a batch has three."""
    monkeypatch.setattr(progress, "_REPORT_SECONDS", 0)
    actor = make_actor(models, tmp_path, monkeypatch, trajectories=2, dtype="fp32", batch_size=3)
    reported = []
    monkeypatch.setattr(WorkLog, "report", lambda _, *what: reported.append(what))
    list(
        actor._trajectories(
            7, [dataclasses.replace(make_pair(number), measured=False) for number in range(2)], {}, HealthSums()
        )
    )
    assert reported == [(7, None, 1.5), (7, None, 2.0)]


def test_a_batch_size_that_runs_out_of_memory_is_tried_once(models, tmp_path, monkeypatch):
    actor = make_actor(models, tmp_path, monkeypatch)
    invert, tried = actor._inverter.invert, []

    def small(requests):
        tried.append(len(requests))
        if len(requests) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return invert(requests)

    actor._inverter.invert = small
    pairs = [dataclasses.replace(make_pair(number), measured=False) for number in range(12)]
    for _ in range(2):
        assert not any(isinstance(result, Failure) for result in actor._trajectories(0, pairs, {}, HealthSums()))
    first = [8, 8, 4, 4, 4, 4, 2, 2, 2, 2]  # what fails is tried twice
    assert tried == first + [2] * 2 + [2] * 6
    (said,) = pop_batch_sizes(tmp_path, 8, "trajectories")
    assert said == "--batch-size 8: larger batches failed, usually for lack of memory: batches of 2 trajectories"
    assert pop_batch_sizes(tmp_path, 8, "trajectories") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "file", "name", "value", "message"),
    [
        ("sd", "vae/config.json", "scaling_factor", 0.13, r"vae.scaling_factor: 0.18215 there, 0.13 here\)"),
        (
            "sd",
            "unet/config.json",
            "attention_head_dim",
            4,
            "denoiser.attention_head_dim: 8 there, 4 here; .*inverting_denoiser",
        ),
        ("sd", "text_encoder/config.json", "hidden_act", "gelu", r"text\)"),
        ("sd", "tokenizer/tokenizer_config.json", "model_max_length", 20, r"tokenizers\)"),
        ("xl", "model_index.json", "force_zeros_for_empty_prompt", False, "zeros_for_empty_prompt: True there, False"),
    ],
)
def test_an_unfinished_run_is_not_resumed_with_other_model_settings(
    models, tmp_path, monkeypatch, kind, file, name, value, message
):
    """Although the weights are the same: the shards of one manifest would have two scales."""
    monkeypatch.setattr(invert, "read_scores_info", lambda _: SimpleNamespace(parts=[]))
    monkeypatch.setattr(invert, "_invert", lambda *_: None)  # a kill, before any shard is made
    pq.write_table(pa.table({"caption": ["a cat"], "jpg_0": [b"0"], "jpg_1": [b"1"]}), tmp_path / "pairs.parquet")
    shutil.copytree(models / kind, tmp_path / "model")
    paths = {"pairs": (tmp_path / "pairs.parquet",), "model": str(tmp_path / "model")}
    options = make_options(models, tmp_path / "out", **paths)
    for _ in range(2):
        invert.invert(options)
    before = describe_model(options, *load_models(options))
    config = json.loads((tmp_path / "model" / file).read_text())
    (tmp_path / "model" / file).write_text(json.dumps({**config, name: value}))
    with pytest.raises(UserError, match=rf"unfinished run with other settings \(model.settings.{message}"):
        invert.invert(options)
    after = describe_model(options, *load_models(options))
    assert (after != before, after.info()) == (True, before.info())


def test_a_shard_size_decides_the_pairs_of_every_shard(models, tmp_path, monkeypatch):
    monkeypatch.setattr(invert, "read_scores_info", lambda _: SimpleNamespace(parts=[]))
    given = []
    monkeypatch.setattr(invert, "_invert", lambda options, run, units, *_: given.append((options, run, units)))
    rows = {"caption": ["a cat"] * 9, "jpg_0": [b"0"] * 9, "jpg_1": [b"1"] * 9}
    pq.write_table(pa.table(rows), tmp_path / "pairs.parquet")
    pairs = (tmp_path / "pairs.parquet",)
    # x0 and one noise of 1024 bytes each, and headers: about 4 kB per pair.
    invert.invert(make_options(models, tmp_path / "out", shard_size=20_000, pairs=pairs))
    ((options, run, units),) = given
    assert (
        options.storing.pairs_per_shard
        == run._identity["pairs_per_shard"]
        == sum(part.stop - part.start for part in units[0])
    )
    assert 2 <= options.storing.pairs_per_shard <= 5


def test_a_tokenizers_settings_do_not_depend_on_earlier_prompts(models):
    family = load_family(str(models / "xl"))
    before = family.settings()
    family.encode_text(["a cat", "dog " * 60])
    assert family.settings() == before


def test_a_pair_that_fails_in_the_batch_size_search_rejects_only_itself(models, tmp_path, monkeypatch):
    actor = make_actor(models, tmp_path, monkeypatch, batch_size=None)
    invert = actor._inverter.invert

    def touchy(requests):
        if "pair-0" in {pair.pair_id for pair, _ in requests}:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return invert(requests)

    actor._inverter.invert = touchy
    pairs = [dataclasses.replace(make_pair(number), measured=False) for number in range(3)]
    first, *others = actor._trajectories(0, pairs, {}, HealthSums())
    assert first.reason == "fails alone: RuntimeError: CUDA error: device-side assert triggered"
    assert [len(samples) for samples in others] == [1, 1]
    assert pop_batch_sizes(tmp_path, None, "trajectories") == ["--batch-size auto: batches of 1 trajectories"]


def test_too_little_memory_for_one_trajectory_stops_the_job_and_rejects_no_pair(models, tmp_path, monkeypatch):
    monkeypatch.setattr(isolation, "PAUSES", (0.0,))
    actor = make_actor(models, tmp_path, monkeypatch, batch_size=2)

    def full(_requests):
        raise torch.OutOfMemoryError("CUDA out of memory")

    actor._inverter.invert = full
    with pytest.raises(UserError, match="too little memory .*out of memory.*same command"):
        list(actor._trajectories(0, [make_pair(0), make_pair(1)], {}, HealthSums()))
