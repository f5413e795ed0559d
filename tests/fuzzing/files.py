"""Hostile pairs, scores, rejects, shards, manifests, indices and weights."""

from __future__ import annotations

import hashlib
import io
import json
import random
import struct
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from rich.console import Console

from smpo_pipeline.inspection.pairs import draw_pairs, print_pairs, summarise_pairs
from smpo_pipeline.inspection.recognise import recognise
from smpo_pipeline.inspection.scores import print_scores, summarise_scores
from smpo_pipeline.inspection.shards import print_shards, summarise_shards
from smpo_pipeline.rewards.networks.weights import read_checkpoint
from smpo_schemas.manifest import MANIFEST_FILE, read_manifest
from smpo_schemas.pairs import (
    PairRejectedError,
    ReadingChoices,
    layouts_of,
    list_pair_files,
    read_rows,
    slice_files,
)
from smpo_schemas.rejects import Reject, read_rejects, write_rejects
from smpo_schemas.scores import (
    SCORES_FILE,
    SCORES_VERSION,
    ScoresInfo,
    image_ids,
    read_scores,
    read_scores_info,
    write_part,
    write_scores_info,
)
from smpo_schemas.shards.index import INDEX_FILE, indexed_trajectories, write_index
from smpo_schemas.shards.reader import ShardDirectory
from smpo_schemas.shards.samples import decode_sample, encode_sample
from smpo_trainer.data.loader import StateDataset, collate, require_batch
from smpo_trainer.data.state_table import index_states
from smpo_trainer.objectives.dpo import DPO
from smpo_trainer.shards.fetch import ShardSource
from smpo_trainer.shards.shard_set import ShardSet
from tests.fuzzing.layouts import write_layout
from tests.fuzzing.mutate import damage, distort, hostile_text
from tests.pictures import encode, picture
from tests.schemas.helpers import statistics
from tests.schemas.shards.test_samples import make_sample, write_directory

Run = Callable[[], str]


def prepare(seed: int, folder: Path) -> Run:
    """Make the files of a seed in ``folder``; what is returned reads them and says what became of them."""
    draw = random.Random(seed)
    return draw.choice(_KINDS)(draw, folder)


# Pairs


def _pair_rows(draw: random.Random, images: bool) -> list[dict[str, Any]]:
    image = encode(picture(), "PNG") if images else "picture.png"
    rows = [
        {
            "prompt": f"prompt {row}",
            "image_0": image,
            "image_1": image,
            "label": 1.0,
            "pair_id": f"p{row}",
            "annotator": "me",
        }
        for row in range(4)
    ]
    for row in draw.sample(rows, 2):
        row["prompt"] = hostile_text(draw)
        row["annotator"] = hostile_text(draw)
    return rows


def _parquet_pairs(draw: random.Random, folder: Path) -> Run:
    path = folder / "pairs.parquet"
    table = pa.Table.from_pylist(_pair_rows(draw, images=True))
    what = draw.choice(("bytes", "bytes", "type", "text", "twice", "dictionary"))
    if what == "type":
        name = draw.choice(table.column_names)
        table = table.set_column(table.column_names.index(name), name, _odd_column(draw, len(table)))
    elif what == "text":
        invalid = pa.array([b"\xff\xfe", b"ok", b"\xc3", b"x"], pa.binary()).view(pa.string())
        name = draw.choice(("prompt", "pair_id", "annotator"))
        table = table.set_column(table.column_names.index(name), name, invalid)
    elif what == "twice":
        table = table.append_column(draw.choice(table.column_names), table.column(0))
    elif what == "dictionary":
        name = draw.choice(("prompt", "pair_id", "image_0", "label"))
        table = table.set_column(table.column_names.index(name), name, table[name].dictionary_encode())
    options = {"compression": draw.choice(("none", "snappy", "zstd", "gzip")), "row_group_size": draw.choice((1, 2, 9))}
    pq.write_table(table, path, data_page_version=draw.choice(("1.0", "2.0")), **options)
    if what == "bytes":
        data = path.read_bytes()
        path.write_bytes(_damaged_parquet(data, draw))
    return lambda: _read_pairs(path)


def _damaged_parquet(data: bytes, draw: random.Random) -> bytes:
    """Damage anywhere, or in the footer with its length and magic kept, so that its reader believes it."""
    if draw.random() < 0.5:
        return damage(data, draw, [data])
    (length,) = struct.unpack("<I", data[-8:-4])
    footer = damage(data[-8 - length : -8], draw, [data])
    return data[: -8 - length] + footer + struct.pack("<I", len(footer)) + b"PAR1"


def _odd_column(draw: random.Random, rows: int) -> pa.Array:
    return draw.choice(
        (
            lambda: pa.nulls(rows),
            lambda: pa.array([10**30] * rows, pa.decimal128(38)),
            lambda: pa.array([2**60] * rows, pa.timestamp("ms")),
            lambda: pa.array([2**62] * rows, pa.duration("s")),
            lambda: pa.array([-(2**31)] * rows, pa.date32()),
            lambda: pa.array([float("nan")] * rows, pa.float16()),
            lambda: pa.array([[["deep"]]] * rows),
            lambda: pa.array([{"bytes": {"bytes": "x"}, "path": 3}] * rows),
            lambda: pa.array([{"bytes": None, "path": "/dev/zero"}] * rows),
            lambda: pa.array([[("k", 1)]] * rows, pa.map_(pa.string(), pa.int64())),
            lambda: pa.array([b"\xff" * 4] * rows, pa.binary(4)),
            lambda: pa.array([True] * rows),
        )
    )()


def _jsonl_pairs(draw: random.Random, folder: Path) -> Run:
    (folder / "picture.png").write_bytes(encode(picture(), "PNG"))
    path = folder / "pairs.jsonl"
    rows = [distort(row, draw) if draw.random() < 0.6 else row for row in _pair_rows(draw, images=False)]
    lines = [json.dumps(row).encode() for row in rows]
    lines.insert(draw.randrange(5), draw.choice(_HOSTILE_JSON)())
    data = b"\n".join(lines)
    path.write_bytes(damage(data, draw, [data]) if draw.random() < 0.3 else data)
    return lambda: _read_pairs(path)


def _layout_pairs(draw: random.Random, folder: Path) -> Run:
    path = write_layout(draw, folder)
    return lambda: _read_pairs(path)


_HOSTILE_JSON: tuple[Callable[[], bytes], ...] = (
    lambda: b"[" * 100_000,
    lambda: b'{"prompt":' * 50_000 + b"1" + b"}" * 50_000,
    lambda: b'{"pair_id": ' + b"[" * 900 + b"]" * 900 + b"}",
    lambda: b'{"label": ' + b"9" * 5000 + b"}",
    lambda: b'{"label": 1e999, "prompt": "x"}',
    lambda: b'{"prompt": "' + b"x" * 20_000_000 + b'"}',
    lambda: b"\xff\xfe{\x00}",
    lambda: b"NaN",
    lambda: b'{"prompt": "a", "prompt": "b"}',
    lambda: b'{"prompt": "a", "image_0": "/dev/zero", "image_1": "/proc/self/mem"}',
    lambda: b'{"prompt": "a", "image_0": "..", "image_1": "picture.png/"}',
    lambda: b'{"prompt": "a", "image_0": "/dev/stdin", "image_1": "/dev/stdin"}',
    lambda: b"",
)


def _read_pairs(path: Path) -> str:
    files = list_pair_files([path])
    layouts = layouts_of(files)
    found = [each for (rows,) in slice_files(files, 3) for each in read_rows(rows, layouts[path])]
    assert len(found) == files[0].rows
    for _, pair in found:
        if isinstance(pair, PairRejectedError):
            assert str(pair).isprintable()
            assert len(str(pair)) < 2000
    rejects = [Reject(pair_id=p.pair_id, source=s, stage="x", reason="x") for s, p in found]
    write_rejects(path.with_name("rejected.parquet"), rejects)
    summary = summarise_pairs(recognise(path)[1], ReadingChoices(), limit=None, samples=4, advance=lambda *_: None)
    print_pairs(summary, path, Console(markup=False))
    draw_pairs(summary, path, {})
    return "rejected" if summary.rejects else "read"


# Scores


@cache
def _score_rows() -> list[dict[str, Any]]:
    scores = {"a_0": 0.5, "a_1": 0.25, "b_0": 1.0, "b_1": -2.0, "image_0_id": "i", "image_1_id": "j"}
    return [
        {"pair_id": f"p{row}", "prompt": "x", "label": (1.0, 0.5, None)[row % 3], "annotator": "me", **scores}
        for row in range(5)
    ]


def _scores(draw: random.Random, folder: Path) -> Run:
    part = write_part(folder / "scores-000000.parquet", _score_rows(), ("a", "b"))
    rewards = {name: statistics([[0.5, 0.25], [1, -2]]) for name in ("a", "b")}
    info = ScoresInfo(schema_version=SCORES_VERSION, rewards=rewards, parts=[part], scored=5, rejected=1)
    write_scores_info(folder, info)
    write_rejects(folder / "rejected.parquet", [Reject(pair_id=None, source="s:1", stage="score", reason="r: x")])
    what = draw.choice(("info", "part", "rejects", "type", "rejects type", "text"))
    if what == "info":
        _distort_json(folder / SCORES_FILE, draw)
    elif what in ("part", "rejects"):
        path = folder / ("rejected.parquet" if what == "rejects" else part.name)
        path.write_bytes(_damaged_parquet(path.read_bytes(), draw))
    else:
        path = folder / ("rejected.parquet" if what == "rejects type" else part.name)
        table = pq.read_table(path)
        name = draw.choice(table.column_names)
        if what == "text":
            texts = [hostile_text(draw) for _ in range(len(table))]
            changed = table.set_column(1, table.column_names[1], pa.array(texts))
        elif draw.random() < 0.3:
            changed = table.drop_columns([name])
        else:
            changed = table.set_column(table.column_names.index(name), name, _odd_column(draw, len(table)))
        pq.write_table(changed, path)
    return lambda: _read_scores(folder)


def _read_scores(folder: Path) -> str:
    info = read_scores_info(folder)
    image_ids(read_scores(folder, info))
    read_rejects(folder / "rejected.parquet")
    print_scores(summarise_scores(folder), folder, Console(markup=False))
    return "read"


def _distort_json(path: Path, draw: random.Random) -> None:
    value = json.loads(path.read_text())
    what = draw.random()
    if what < 0.7:
        data = json.dumps(distort(value, draw)).encode()
    elif what < 0.9:
        data = damage(path.read_bytes(), draw, [path.read_bytes()])
    else:
        data = draw.choice(_HOSTILE_JSON)()
    path.write_bytes(data)


# Shards


def _manifest(draw: random.Random, folder: Path) -> Run:
    _write_shards(folder, indexed=draw.random() < 0.5)
    _distort_json(folder / MANIFEST_FILE, draw)
    return lambda: _read_shards(folder)


def _write_shards(folder: Path, *, indexed: bool) -> None:
    write_directory(folder, shards=1)
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["rewards"] = {"clipscore": statistics([[0.1, -0.2]]).model_dump()}
    band = {"start": 0, "stop": 1000, "states": 9, "noise_ratio": 1.0, "residual": 0.1, "neighbour_correlation": 0.0}
    manifest["health"] = [band]
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    if indexed:
        manifest["index"] = write_index(ShardDirectory(folder)).model_dump()
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


def _sign(folder: Path) -> None:
    """Make the manifest say of what is there that it is right: hostile shards come with their own manifest."""
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    for entry in [*manifest["shards"], *([manifest["index"]] if manifest.get("index") else [])]:
        data = (folder / entry["name"]).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


def _tar(draw: random.Random, folder: Path) -> Run:
    _write_shards(folder, indexed=draw.random() < 0.3)
    path = folder / "shard-000000.tar"
    data = path.read_bytes()
    what = draw.choice(("bytes", "header", "header", "member", "member", "packed", "sample", "sample"))
    if what == "bytes":
        path.write_bytes(damage(data, draw, [data]))
    elif what == "header":
        path.write_bytes(_damaged_header(data, draw))
    elif what == "packed":
        path.write_bytes(draw.choice((_gzip_bomb(), b"\x1f\x8b" + data, b"BZh9" + data, b"\xfd7zXZ\0" + data)))
    else:
        path.write_bytes(_hostile_tar(draw, whole=what == "member"))
    if draw.random() < 0.9:
        _sign(folder)
    return lambda: _read_shards(folder)


def _damaged_header(data: bytes, draw: random.Random) -> bytes:
    """A member's header with another field and the checksum made right."""
    headers = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    at = draw.choice(headers)
    header = bytearray(data[at : at + 512])
    start, length = draw.choice(((0, 100), (100, 8), (124, 12), (124, 12), (124, 12), (136, 12), (156, 1), (345, 155)))
    value = draw.choice(
        (
            b"77777777777",
            b"00000000000",
            b"\x80" + bytes(3) + struct.pack(">Q", draw.choice((2**62, 2**63 - 1, 2**40, 0))),
            b"\xff" * 12,
            b"\xff" + b"\xff" * 7 + struct.pack(">I", draw.choice((2**32 - 512, 2**32 - 1024))),
            b"-0000000512",
            draw.choice(b"0123456789gxLKSVDMN").to_bytes(1, "little"),
            b"../../outside",
            b"/etc/passwd",
        )
    )[:length]
    header[start : start + length] = value.ljust(length, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + 512 :]


@cache
def _gzip_bomb() -> bytes:
    import gzip

    return gzip.compress(bytes(1 << 28))


def _hostile_tar(draw: random.Random, *, whole: bool) -> bytes:
    """A well-formed tar with members that no shard has, or with hostile samples."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=draw.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as tar:
        for number in range(3):
            members = encode_sample(make_sample(number))
            if number == 1 and not whole:
                members = {"json": _hostile_meta(members["json"], draw), "safetensors": members["safetensors"]}
                members["safetensors"] = _hostile_tensors(members["safetensors"], draw)
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{number:09d}.{extension}")
                if whole and number == 1:
                    member.name = draw.choice((member.name, f"../{member.name}", f"/{member.name}", "a/b.json"))
                    member.type = draw.choice((*b"01234567xgLKS",)).to_bytes(1, "little")
                    member.linkname = draw.choice(("000000000.json", "/etc/passwd", "../../outside", ""))
                    if draw.random() < 0.3:
                        member.pax_headers = {
                            draw.choice(("size", "path", "GNU.sparse.size", "GNU.sparse.map")): "9" * 9
                        }
                member.size = len(content)
                for _ in range(draw.choice((1, 1, 2)) if whole else 1):
                    tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def _hostile_meta(data: bytes, draw: random.Random) -> bytes:
    what = draw.random()
    if what < 0.3:
        return data
    if what < 0.8:
        return json.dumps(distort(json.loads(data), draw)).encode()
    return draw.choice(_HOSTILE_JSON)()


def _hostile_tensors(data: bytes, draw: random.Random) -> bytes:
    """A safetensors member with another header: lengths, offsets, types, shapes, nesting."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    what = draw.choice(("header", "header", "length", "bytes", "json", "shape", "values"))
    if what == "length":
        return struct.pack("<Q", draw.choice((0, 1, length - 1, 2**31, 2**63 - 1, 2**64 - 1))) + data[8:]
    if what == "bytes":
        return damage(data, draw, [data])
    if what == "shape":
        odd = {"x0": torch.zeros(draw.choice(((0,), (2, 0, 8, 8), (2, 4, 8, 8), (3,)))), "timestep": torch.zeros(0)}
        return safetensors.torch.save({**safetensors.torch.load(data), **odd})
    if what == "values":
        tensors = safetensors.torch.load(data)
        name = draw.choice(list(tensors))
        tensors[name] = torch.full_like(tensors[name], draw.choice((0, -1, 2)))
        return safetensors.torch.save(tensors)
    packed = draw.choice(_HOSTILE_JSON)() if what == "json" else json.dumps(distort(header, draw)).encode()
    return struct.pack("<Q", len(packed)) + packed + rest


def _index(draw: random.Random, folder: Path) -> Run:
    _write_shards(folder, indexed=True)
    path = folder / INDEX_FILE
    if draw.random() < 0.4:
        path.write_bytes(_damaged_parquet(path.read_bytes(), draw))
    else:
        table = pq.read_table(path)
        name = draw.choice(table.column_names)
        odd = draw.choice((0, -1, 1, 10, 2**31 - 1, 2**62))
        if pa.types.is_int64(table.schema.field(name).type) or name == "shard":
            column = pa.array([odd] * len(table), pa.int64())
        elif draw.random() < 0.4:
            column = pa.array([[odd], None, []])
        else:
            column = _odd_column(draw, len(table))
        pq.write_table(table.set_column(table.column_names.index(name), name, column), path)
    _sign(folder)
    return lambda: _read_shards(folder)


def _read_shards(folder: Path) -> str:
    """As ``inspect`` and the trainer do; both must be free of anything but one line."""
    directory = ShardDirectory(folder, read_manifest(folder))
    reading = (
        lambda: [directory.read(trajectory.location) for trajectory in list(indexed_trajectories(directory))],
        lambda: list(directory.samples()),
        lambda: _read_states(folder, directory),
    )
    problems = [_refused(read) for read in reading]
    summary = summarise_shards(recognise(folder)[1], limit=None, samples=1, advance=lambda *_: None)
    print_shards(summary, folder, Console(markup=False))
    return "refused" if any(problems) else "read"


def _read_states(folder: Path, directory: ShardDirectory) -> None:
    """List the states of the directory, read each, and make a batch of those of each shape."""
    shards = ShardSet((ShardSource(str(folder), folder, directory, None),))
    table = index_states(shards, _objective(), None, None, (None, None), say=lambda _: None)
    dataset, buckets = StateDataset(shards, table), table.buckets()
    of_buckets = [(buckets == bucket).nonzero()[0] for bucket in range(len(table.latents))]
    for batch in [collate([dataset[int(state)] for state in states]) for states in of_buckets]:
        require_batch(batch)


@cache
def _objective() -> DPO:
    """One that learns from each state with a label."""
    return DPO(DPO.Options(beta=1.0, ties="keep"))


def _refused(read: Callable[[], object]) -> bool:
    from smpo_common.errors import UserError

    try:
        read()
    except UserError:
        return True
    return False


def _member(draw: random.Random, folder: Path) -> Run:
    members = encode_sample(make_sample(0))
    meta, tensors = _hostile_meta(members["json"], draw), _hostile_tensors(members["safetensors"], draw)

    def run() -> str:
        decode_sample(meta, tensors, "here")
        return "read"

    return run


# Weights


class _Calls:
    """What a hostile pickle holds: a call to be made on loading."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("true",)


def _weights(draw: random.Random, folder: Path) -> Run:
    state = {"layer.weight": torch.zeros(4, 4), "layer.bias": torch.zeros(4)}
    path = folder / draw.choice(("a.pt", "a.pth", "a.bin", "a.ckpt", "a.safetensors"))
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
        path.write_bytes(_hostile_tensors(path.read_bytes(), draw))
    else:
        content = draw.choice((state, {"state_dict": state}, {**state, "x": _Calls()}, _Calls(), [1], {"a": 1}))
        torch.save(content, path, _use_new_zipfile_serialization=draw.random() < 0.7)
        if draw.random() < 0.6:
            path.write_bytes(damage(path.read_bytes(), draw, [path.read_bytes()]))

    def run() -> str:
        read_checkpoint(path, "--reward x=PATH")
        return "read"

    return run


_PAIRS = (_parquet_pairs, _parquet_pairs, _jsonl_pairs, _layout_pairs)
_KINDS = (*_PAIRS, _scores, _manifest, _tar, _tar, _index, _member, _weights)
