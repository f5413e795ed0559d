from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace

import pytest
import safetensors.torch
import torch
import webdataset

from smpo_common.errors import UserError
from smpo_schemas.inversion_settings import InversionSettings
from smpo_schemas.manifest import (
    MANIFEST_VERSION,
    Manifest,
    ModelInfo,
    Totals,
    read_manifest,
    write_manifest,
)
from smpo_schemas.shards.reader import ShardDirectory
from smpo_schemas.shards.samples import Sample, SampleMeta, decode_sample, encode_sample
from smpo_schemas.shards.writer import ShardWriter


def make_sample(number: int, states: int = 3, **tensors: torch.Tensor) -> Sample:
    stream = torch.Generator().manual_seed(number)
    values = {
        "x0_2Chw": torch.randn(2, 4, 8, 8, generator=stream).half(),
        "noise_K2Chw": torch.randn(states, 2, 4, 8, 8, generator=stream).half(),
        "timestep_K": torch.arange(1, states + 1) * 100,
        "ref_error_K2": torch.rand(states, 2, generator=stream),
        "residual_K2": torch.full((states, 2), torch.nan),
    }
    meta = SampleMeta(
        pair_id=f"pair {number}",
        trajectory=0,
        flipped=number % 2 == 0,
        prompt="Zürich 東京 …",
        prompt_dropped=False,
        label=0.5,
        annotator=None,
        scores={"clipscore": (0.1, -0.2)},
        size=((512, 640), (300, 200)),
        crop=((0, 64), (50, 0)),
    )
    return Sample(meta=meta, **(values | tensors))


def write_directory(path, shards: int = 2, samples: int = 3, *, flow: bool = False):
    """Shards of made-up samples; of a flow model the timesteps are no whole numbers."""
    fractions = {"timestep_K": torch.tensor([0.5, 300.25, 999.9])} if flow else {}
    entries = []
    for shard in range(shards):
        with ShardWriter(path / f"shard-{shard:06d}.tar") as writer:
            for number in range(samples):
                writer.write(f"{shard * samples + number:09d}", make_sample(shard * samples + number, **fractions))
        entries.append(writer.entry)
    model = ModelInfo(
        id="m",
        kind="sd15",
        prediction_type="flow" if flow else "epsilon",
        reference="r",
        inverting_denoiser="r",
        text="t",
        vae="v",
        scheduler="s",
        num_train_timesteps=1000,
    )
    manifest = Manifest(
        schema_version=MANIFEST_VERSION,
        model=model,
        resolution=32,
        inversion=InversionSettings(),
        seed=0,
        rewards={},
        shards=entries,
        totals=Totals(
            pairs_in=6, pairs=6, samples=6, states=18, rejected=0, bytes=sum(entry.bytes for entry in entries)
        ),
        rejected_reasons={},
        health=[],
        versions={},
        ref_error_arithmetic="fp32",
    )
    write_manifest(path, manifest)
    return manifest


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16])
def test_both_kinds_of_storage_are_read_as_written(storage):
    sample = make_sample(0)
    sample = replace(sample, x0_2Chw=sample.x0_2Chw.to(storage), noise_K2Chw=sample.noise_K2Chw.to(storage))
    members = encode_sample(sample)
    back = decode_sample(members["json"], members["safetensors"], "here")
    for name, tensor in sample.tensors().items():
        assert back.tensors()[name].dtype == tensor.dtype
        torch.testing.assert_close(back.tensors()[name], tensor, rtol=0, atol=0, equal_nan=True)
    mixed = replace(sample, noise_K2Chw=sample.noise_K2Chw.float())
    with pytest.raises(UserError, match=f"noise is torch.float32 .*expected {storage}"):
        decode_sample(**dict(zip(("meta", "tensors"), encode_sample(mixed).values(), strict=True)), source="here")


def test_what_is_written_is_read(tmp_path):
    manifest = write_directory(tmp_path)
    directory = ShardDirectory(tmp_path)
    assert directory.manifest == manifest
    assert (manifest.shards[0].pairs, manifest.shards[0].samples, manifest.shards[0].states) == (3, 3, 9)
    read = list(directory.samples())
    for number, sample in enumerate(read):
        expected = make_sample(number)
        assert sample.meta == expected.meta
        for name, tensor in expected.tensors().items():
            torch.testing.assert_close(sample.tensors()[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert len(read) == 6


def test_equal_samples_give_equal_bytes(tmp_path):
    one, two = write_directory(tmp_path / "a"), write_directory(tmp_path / "b")
    assert [entry.sha256 for entry in one.shards] == [entry.sha256 for entry in two.shards]


def test_any_webdataset_reader_can_read_a_shard(tmp_path):
    write_directory(tmp_path)
    dataset = webdataset.WebDataset(str(tmp_path / "shard-000000.tar"), shardshuffle=False)
    samples = list(dataset)
    assert [sample["__key__"] for sample in samples] == [f"{number:09d}" for number in range(3)]
    assert json.loads(samples[1]["json"])["pair_id"] == "pair 1"
    tensors = safetensors.torch.load(samples[1]["safetensors"])
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "x0": (torch.float16, (2, 4, 8, 8)),
        "noise": (torch.float16, (3, 2, 4, 8, 8)),
        "timestep": (torch.int64, (3,)),
        "ref_error": (torch.float32, (3, 2)),
        "residual": (torch.float32, (3, 2)),
    }


def test_an_interrupted_shard_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path / "s.tar") as writer:
        writer.write("0", make_sample(0))
        raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"x0_2Chw": torch.full((2, 4, 8, 8), torch.nan).half()}, "x0 is not finite"),
        ({"noise_K2Chw": torch.zeros(2, 2, 4, 8, 8).half()}, "noise is"),
        ({"x0_2Chw": torch.zeros(2, 4, 8, 8)}, "x0 is torch.float32"),
        ({"timestep_K": torch.tensor([5, 5, 7])}, "do not increase"),
        ({"ref_error_K2": torch.full((3, 2), torch.inf)}, "ref_error is not finite"),
        ({"ref_norm_K2": torch.full((3, 2), torch.nan)}, "ref_norm is not finite"),
        ({"ref_norm_K2": torch.ones(2, 2)}, "ref_norm is torch.float32 .2, 2., expected torch.float32 .3, 2."),
    ],
)
def test_wrong_tensors_are_named(tmp_path, tensors, problem):
    manifest = write_directory(tmp_path)
    with ShardWriter(tmp_path / "shard-000000.tar") as writer:
        for number in range(3):
            writer.write(f"{number:09d}", make_sample(number, **(tensors if number == 1 else {})))
    write_manifest(tmp_path, manifest.model_copy(update={"shards": [writer.entry]}))
    with pytest.raises(UserError, match=f"sample 000000001.*pair 1.*{problem}"):
        list(ShardDirectory(tmp_path).samples())


def rewrite(path, change) -> None:
    """Pass the tar's members through ``change`` (name, bytes) -> list of them."""
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w") as tar:
        for name, data in [changed for member in members for changed in change(*member)]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_damage_is_named(tmp_path):
    manifest = write_directory(tmp_path)
    path = tmp_path / "shard-000001.tar"
    whole = path.read_bytes()

    def problem() -> str:
        with pytest.raises(UserError) as caught:
            list(ShardDirectory(tmp_path).samples())
        return str(caught.value)

    path.write_bytes(whole[:-512])
    assert "truncated" in problem()
    path.write_bytes(whole[:600] + bytes([whole[600] ^ 1]) + whole[601:])
    assert "SHA-256" in problem()
    path.unlink()
    assert "missing" in problem()
    path.write_bytes(whole)
    rewrite(path, lambda name, data: [] if name == "000000004.json" else [(name, data)])
    directory = ShardDirectory(tmp_path)
    with pytest.raises(UserError, match="sample 000000004 has the members"):
        directory.locate(1)
    path.write_bytes(whole)
    rewrite(path, lambda name, data: [] if name.startswith("000000004") else [(name, data)])
    with pytest.raises(UserError, match="holds 2 samples, the manifest says 3"):
        directory.locate(1)
    rewrite(tmp_path / "shard-000000.tar", lambda name, data: [(name, data[:-3] if name.endswith("s") else data)])
    with pytest.raises(UserError, match="malformed safetensors"):
        directory.read(directory.locate(0)[0])
    assert manifest.totals.samples == 6


def test_manifest_problems_are_named(tmp_path):
    with pytest.raises(UserError, match="no manifest.json: .*smpo-pipeline invert"):
        read_manifest(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text("{")
    with pytest.raises(UserError, match="not a readable JSON"):
        read_manifest(tmp_path)
    path.write_text('{"schema_version": 99}')
    with pytest.raises(UserError, match="schema version 99"):
        read_manifest(tmp_path)
    path.write_text(json.dumps({"schema_version": MANIFEST_VERSION}))
    with pytest.raises(UserError, match="malformed: model: Field required"):
        read_manifest(tmp_path)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    writer = ShardWriter(tmp_path / "s.tar")
    with pytest.raises(UserError, match="No space left"), writer:
        writer._stream.close()
        writer._stream = open("/dev/full", "wb")  # noqa: PTH123, SIM115
        writer._tar.tarstream.fileobj = writer._stream
        writer.write("0", make_sample(0, states=200))
    assert list(tmp_path.iterdir()) == []
