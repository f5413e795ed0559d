"""On a GPU the benchmarks compare a GPU with a GPU, by a clock that waits for it."""

from __future__ import annotations

import importlib
import subprocess
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from smpo_schemas.inversion_settings import InversionSettings


@pytest.fixture
def load():
    """Imports a program when a test needs it: some take seconds."""
    return lambda name: importlib.import_module(f"benchmarks.speed.{name}")


@pytest.mark.parametrize("program", ["published", "bare", "invert", "ours"])
def test_every_program_of_a_training_step_is_on_the_device_that_is_named(program, load, monkeypatch, tmp_path):
    train, asked = load("train"), []

    class Begun(Exception):
        pass

    def load_family(_model, *, device):
        asked.append(device)
        raise Begun

    def run(command, **_options):
        asked.append(command[command.index("--device") + 1])
        raise Begun

    monkeypatch.setattr(train, "load_family", load_family)
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(Begun):
        train._measured(program, train.SHAPES["sd15"], "cuda", tmp_path)
    assert asked == ["cuda"]


def test_the_job_of_an_inversion_is_on_the_device_that_is_named(load, tmp_path):
    (tmp_path / "pairs.parquet").touch()
    (tmp_path / "scores").mkdir()
    assert load("invert").options_of(tmp_path, tmp_path, "cuda").running.device == "cuda"


@pytest.mark.parametrize("module", ["train", "invert"])
def test_the_clock_waits_for_the_gpu(module, load, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append("waited"))
    assert load(module).now() > 0
    assert waited == ["waited"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "LoRA"])
@pytest.mark.parametrize("program", ["Flow-DPO", "ours"])
def test_each_program_of_a_flow_models_step_trains_and_is_measured_by_parts(
    program, method, load, monkeypatch, tmp_path
):
    train_flow, programs, train = load("train_flow"), load("flow_programs"), load("train")
    for module in (train, programs):
        monkeypatch.setattr(module, "SIDE", 16)
    load("shapes").build_flux(8, 1).save_pretrained(tmp_path / "model")
    train.make_shards(tmp_path / "shards", tmp_path / "model", trajectories=1, text=True)
    monkeypatch.setattr(programs, "STEPS", 2)
    found = train_flow._measured(method, program, tmp_path, 8)
    frozen = {"VAE", "text encoders", "reference"} if program == "Flow-DPO" else set()
    assert found.keys() == frozen | {"forward", "backward", "clipping and AdamW", "the rest", "GiB"}
    assert all(value > 0 for value in found.values())


def test_operations_of_a_flow_models_step(load):
    """A linear layer's backward pass has twice the operations of its forward one; VAE and encoders are a small part."""
    counted = load("train_flow").operations(8, 1, 64)
    assert counted["full"] == pytest.approx(3 * counted["reference"], rel=0.02)
    assert 2 * counted["reference"] < counted["LoRA"] < counted["full"]
    assert 0 < counted["text encoders"] < counted["reference"]
    assert 0 < counted["VAE"] < counted["reference"]


@pytest.mark.parametrize(("source", "states"), [("renoise", 54), ("tracked", 18)])
def test_evaluations_of_noise_tracked_pairs_by_hand(source, states):
    """Nine steps: of both images, two evaluations to solve a step, and one for the reference's error of a state."""
    tracked = importlib.import_module("benchmarks.experiments.pairs.tracked")
    totals = SimpleNamespace(pairs=100, samples=100, states=900)
    manifest = SimpleNamespace(inversion=InversionSettings(source=source), totals=totals)
    assert tracked.evaluations(manifest, training_states=2400) == (8 * 16 / 2, states, 2 * 3 * 24)


def test_shifted_pairs_are_flipped_for_small_shapes_and_golden_for_some_large_ones(tmp_path):
    shift = importlib.import_module("benchmarks.experiments.pairs.shift")
    captions = [f"a {('small', 'large')[number % 2]} red circle on a blue background" for number in range(90)]
    labels = [(1.0, 0.0, 0.5)[number % 3] for number in range(90)]
    (tmp_path / "world/pairs").mkdir(parents=True)
    columns = {
        "caption": captions,
        "label_0": labels,
        "ranking_id": range(90),
        "jpg_0": [b"0"] * 90,
        "jpg_1": [b"1"] * 90,
    }
    pq.write_table(
        pa.table({name: list(values) for name, values in columns.items()}), tmp_path / "world/pairs/a.parquet"
    )
    path, golden = shift.shift_pairs(tmp_path)
    rows = pq.read_table(path).to_pylist()
    for number, row in enumerate(rows):
        small = "small" in row["prompt"]
        assert row["label"] == (1 - labels[number] if small else labels[number])
        assert (row["pair_id"], row["image_0"], row["image_1"]) == (str(number), b"0", b"1")
        assert not (small and golden[str(number)])
    assert 5 < sum(golden.values()) < 30


def test_evaluations_of_step_pairs_by_hand():
    """Of 17 steps down to the 4th, four begin at a draw whose evaluation is known; each pair needs two, and two of the
    reference: 13 + 5 * 4."""
    tailorpo = importlib.import_module("benchmarks.experiments.pairs.tailorpo")
    assert tailorpo.step_evaluations(20, [20, 16, 12, 8, 4], 2) == 33
    totals = SimpleNamespace(samples=100, states=900)
    assert tailorpo.generated_evaluations(SimpleNamespace(inversion=InversionSettings(), totals=totals)) == 8 * 16 + 108
