"""GPUs that come and go, on a simulated cluster with made-up GPUs; the actors compute nothing."""

from __future__ import annotations

import os
import threading
import time
from unittest.mock import patch

import pyarrow as pa
import pytest
import ray
from ray.cluster_utils import Cluster

from smpo_common.errors import UserError
from smpo_pipeline.jobs.cluster.pools import Pool, model_pool
from smpo_pipeline.jobs.cluster.session import connected, resolve_device
from smpo_pipeline.jobs.invert import job as invert

pytestmark = pytest.mark.long

NODE = {"object_store_memory": 100 << 20, "include_dashboard": False}
UNITS = 16


@pytest.fixture
def cluster():
    with patch.dict(os.environ, RAY_BACKEND_LOG_LEVEL="fatal"):
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, **NODE})
        try:
            yield made
        finally:
            made.shutdown()


def _decode(row):
    return row


class _Actor:
    def __init__(self, folder):
        self._folder, self._node = folder, ray.get_runtime_context().get_node_id()

    def __call__(self, row):
        unit = row["unit"][0].as_py()
        (self._folder / f"{self._node} began {unit}").touch()
        time.sleep(0.5)
        return pa.table({"unit": [unit], "node": [self._node]})


def test_units_of_a_lost_node_are_made_by_the_others(cluster, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(invert, "InvertActor", _Actor)
    with pytest.raises(UserError, match="Ray sees no GPU"), connected(cluster.address):
        model_pool("cuda", None, cluster.address, 1, UNITS)
    assert resolve_device(None, cluster.address) == "cpu"
    nodes = {node.node_id: node for node in (cluster.add_node(num_cpus=1, num_gpus=1, **NODE) for _ in range(2))}
    assert resolve_device(None, cluster.address) == "cuda"
    made = {}
    lost = []

    def lose_one():
        while len({path.name.split()[0] for path in tmp_path.iterdir()}) < 2:
            time.sleep(0.1)
        lost.append(next(iter(nodes)))
        cluster.remove_node(nodes[lost[0]], allow_graceful=True)

    with connected(cluster.address):
        assert model_pool("cuda", None, cluster.address, 1, UNITS) == Pool(2, 1, room=2)
        pool = model_pool("cuda", 8, cluster.address, 1, UNITS)
        assert pool == Pool(8, 1, room=2)
        printed = capsys.readouterr().out
        assert "--concurrency 8" in printed
        assert "2 GPUs" in printed
        source = ray.data.from_items([{"unit": unit} for unit in range(UNITS)], override_num_blocks=UNITS)
        dataset = invert._add_stages(source, _decode, {"folder": tmp_path}, pool, 1000)
        killer = threading.Thread(target=lose_one)
        killer.start()
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            made |= {row["unit"]: row["node"] for row in table.to_pylist()}
        killer.join()
    assert sorted(made) == list(range(UNITS))
    begun = {int(path.name.split()[-1]) for path in tmp_path.iterdir() if path.name.startswith(lost[0])}
    assert any(made[unit] != lost[0] for unit in begun)
