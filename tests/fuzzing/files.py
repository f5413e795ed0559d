"""Hostile pairs, scores, rejects, shards, manifests, indices and weights."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from rich.console import Console

from smpo_pipeline.inspection.scores import print_scores, summarise_scores
from smpo_pipeline.rewards.networks.weights import read_checkpoint
from smpo_schemas.rejects import Reject, read_rejects, write_rejects
from smpo_schemas.scoring.scores import (
    SCORES_FILE,
    SCORES_VERSION,
    ScoresInfo,
    image_ids,
    read_scores,
    read_scores_info,
    write_part,
    write_scores_info,
)
from tests.fuzzing import pairs, shards
from tests.fuzzing.layouts import write_and_read
from tests.fuzzing.mutate import damage, damaged_parquet, distort_json, hostile_text, odd_column
from tests.fuzzing.shards import hostile_tensors
from tests.schemas.helpers import statistics

Run = Callable[[], str]


def prepare(seed: int, folder: Path) -> Run:
    """Make the files of a seed in ``folder``; what is returned reads them and says what became of them."""
    draw = random.Random(seed)
    return draw.choice(_KINDS)(draw, folder)


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
        distort_json(folder / SCORES_FILE, draw)
    elif what in ("part", "rejects"):
        path = folder / ("rejected.parquet" if what == "rejects" else part.name)
        path.write_bytes(damaged_parquet(path.read_bytes(), draw))
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
            changed = table.set_column(table.column_names.index(name), name, odd_column(draw, len(table)))
        pq.write_table(changed, path)
    return lambda: _read_scores(folder)


def _read_scores(folder: Path) -> str:
    info = read_scores_info(folder)
    image_ids(read_scores(folder, info))
    read_rejects(folder / "rejected.parquet")
    print_scores(summarise_scores(folder), folder, Console(markup=False))
    return "read"


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
        path.write_bytes(hostile_tensors(path.read_bytes(), draw))
    else:
        content = draw.choice((state, {"state_dict": state}, {**state, "x": _Calls()}, _Calls(), [1], {"a": 1}))
        torch.save(content, path, _use_new_zipfile_serialization=draw.random() < 0.7)
        if draw.random() < 0.6:
            path.write_bytes(damage(path.read_bytes(), draw, [path.read_bytes()]))

    def run() -> str:
        read_checkpoint(path, "--reward x=PATH")
        return "read"

    return run


_KINDS = (*pairs.KINDS, write_and_read, _scores, *shards.KINDS, _weights)
