from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
import ray
import torch
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from smpo_common.errors import UserError
from smpo_pipeline.jobs.cells import bytes_array, cell_values, list_cell
from smpo_pipeline.jobs.cluster.errors import _reason, unwrap_ray_errors
from smpo_pipeline.jobs.cluster.pools import Pool, share_gpus, task_memory
from smpo_pipeline.jobs.cluster.session import connected, set_reproducible_arithmetic
from smpo_pipeline.jobs.invert import job as invert
from smpo_pipeline.jobs.score import job as score
from smpo_pipeline.jobs.score.job import _pool_sizes, _pools
from smpo_pipeline.jobs.score.options import ScoreJobOptions, ScoreOptions


def test_gpus_are_shared_so_that_no_stage_waits_for_another():
    assert share_gpus({"a": (1, 0.25)}, 1) == {"a": 1.0}
    assert share_gpus({"a": (8, 0.25)}, 8) == {"a": 1.0}
    assert share_gpus({"a": (1, 0.25), "b": (1, 0.25), "c": (1, 0.25)}, 1) == dict.fromkeys("abc", 0.3333)
    assert share_gpus({"a": (4, 0.25), "b": (1, 0.25)}, 4) == dict.fromkeys("ab", 0.5)
    assert share_gpus({"a": (16, 0.25)}, 8) == {"a": 0.5}
    shares = share_gpus({"small": (2, 0.2), "large": (2, 0.6)}, 2)
    assert list(shares.items()) == [("large", 0.75), ("small", 0.25)]
    assert share_gpus({"a": (1, 1.0), "b": (1, 1.0)}, 2) == {"a": 1.0, "b": 1.0}


def test_a_workers_storage_error_is_one_line_and_a_bug_is_not():
    failure = OSError(errno.ESTALE, os.strerror(errno.ESTALE), "/pairs/a")
    with (
        pytest.raises(UserError, match="/pairs/a: Stale file handle, tried 6 times; .*same command"),
        unwrap_ray_errors(),
    ):
        raise RayTaskError("map", "", failure).as_instanceof_cause()
    with pytest.raises(RayTaskError), unwrap_ray_errors():
        raise RayTaskError("map", "", KeyError("a")).as_instanceof_cause()


@pytest.mark.parametrize("wanted", [{"a": (2, 1.0)}, {"a": (1, 0.6), "b": (1, 0.6)}, {"a": (5, 0.25)}])
def test_stages_that_would_wait_forever_are_refused(wanted):
    with pytest.raises(UserError, match=r"--device cuda: .* 1 GPUs.* \(a .*--concurrency"):
        share_gpus(wanted, 1)
    if wanted == {"a": (2, 1.0)}:
        with pytest.raises(UserError, match="too few"):
            share_gpus({"a": (1, 0.6), "b": (1, 0.6), "c": (1, 0.6)}, 2)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("--reward a: no such file"), "--reward a: no such file"),
        (KeyError("x"), "KeyError: 'x'"),
        (ValueError("one\ntwo"), "ValueError: one two"),
    ],
)
def test_the_error_of_an_actors_constructor_is_reported(error, message):
    """In Ray's form: one text that begins with the traceback."""
    try:
        raise error
    except type(error):
        cause = RayTaskError("A.__init__", traceback.format_exc(), error, proctitle="A", pid=1, ip="127.0.0.1")
    assert _reason(ActorDiedError(cause)) == message


def test_a_dead_worker_is_reported_with_its_cause():
    died = RayError("The actor died unexpectedly.\n\tclass_name: A\n\tip: 10.0.0.1\nIts worker was killed by SIGKILL.")
    assert _reason(died) == "The actor died unexpectedly. class_name: A ip: 10.0.0.1 Its worker was killed by SIGKILL."


def test_workers_do_not_use_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    set_reproducible_arithmetic("cuda")
    assert not torch.backends.cudnn.allow_tf32
    # For matrix products this is the default.
    assert torch.get_float32_matmul_precision() == "highest"


def test_concurrency_for_all_rewards_or_for_one():
    specs = {"a": "a", "b": "b=x"}
    assert _pool_sizes([], specs) == {}
    assert _pool_sizes(["2"], specs) == {"a": 2, "b": 2}
    assert _pool_sizes(["b=3", "2"], specs) == {"a": 2, "b": 3}
    for wrong in ("0", "c=1", "a=", "a=x", "=2"):
        with pytest.raises(UserError, match=rf"--concurrency {wrong}: .*NAME=N"):
            _pool_sizes([wrong], specs)


def test_a_clusters_cores_are_counted_by_machine(monkeypatch):
    """Pool sizes and threads of CPU actors on machines with different numbers of cores."""
    cluster = [{"Alive": True, "Resources": {"CPU": cores}} for cores in (16.0, 8.0, 16.0)]
    cluster += [{"Alive": False, "Resources": {"CPU": 2.0}}, {"Alive": True, "Resources": {"GPU": 1.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: cluster)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    specs = {"toy-truth": "toy-truth", "pickscore": "pickscore"}

    def pools(address, given):
        running = ScoreJobOptions(device="cpu", ray_address=address)
        options = ScoreOptions.model_construct(running=running)
        return {name: (pool.size, pool.threads) for name, pool in _pools(options, specs, given).items()}

    assert pools(None, {}) == {"toy-truth": (6, 1), "pickscore": (1, 6)}
    assert pools(None, {"toy-truth": 2, "pickscore": 2}) == {"toy-truth": (2, 1), "pickscore": (2, 3)}
    assert pools("auto", {}) == {"toy-truth": (40, 1), "pickscore": (5, 8)}
    assert pools("auto", {"pickscore": 6})["pickscore"] == (6, 4)
    assert pools("auto", {"pickscore": 100})["pickscore"] == (100, 1)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_reward_that_a_server_computes_has_one_actor_and_no_gpu(monkeypatch, device):
    monkeypatch.setattr("smpo_pipeline.jobs.score.job.cluster_gpus", lambda: 2)
    specs = {"pickscore": "pickscore", "ocr": "http=http://host,name=ocr"}
    options = ScoreOptions.model_construct(running=ScoreJobOptions(device=device))
    for given in ({}, {"pickscore": 2, "ocr": 8}):
        pools = _pools(options, specs, given)
        assert pools["ocr"] == Pool(1, 0, 2)
        assert bool(pools["pickscore"].num_gpus) == (device == "cuda")
    assert list(_pools(options, {"ocr": specs["ocr"]}, {})) == ["ocr"]


UNIT_BYTES = 8 << 20


def _decode(row, folder):
    """A unit of black pixels; touches a file when it is decoded."""
    unit = row["unit"][0].as_py()
    (folder / f"decoded-{unit}").touch()
    pixels = bytes_array(bytes(UNIT_BYTES), [0, UNIT_BYTES])
    return pa.table({"unit": pa.array([unit]), "pixels": list_cell(pixels)})


class _SlowActor:
    def __init__(self, folder=None, spec="", **_):
        self._folder = folder or Path(spec.partition("=")[2])

    def __call__(self, row):
        """Return how many decoded units wait."""
        assert len(cell_values(row, "pixels")[0].as_buffer()) == UNIT_BYTES
        time.sleep(0.1)
        (self._folder / f"made-{row['unit'][0].as_py()}").touch()
        waiting = len(list(self._folder.glob("decoded-*"))) - len(list(self._folder.glob("made-*")))
        return pa.table({"waiting": [waiting]})


@pytest.mark.slow
def test_decoded_units_do_not_pile_up_before_a_slow_actor(tmp_path, monkeypatch, ray_address):
    monkeypatch.setattr(invert, "InvertActor", _SlowActor)
    with connected(ray_address):
        source = ray.data.from_items([{"unit": unit} for unit in range(16)], override_num_blocks=16)
        decode = partial(_decode, folder=tmp_path)
        made = invert._add_stages(source, decode, {"folder": tmp_path}, Pool(1, 0), UNIT_BYTES)
        tables = made.iter_batches(batch_size=None, batch_format="pyarrow")
        waiting = [count for table in tables for count in table["waiting"].to_pylist()]
        with pytest.raises(UserError, match=r"1000000\.0 GB .*--pairs-per-shard"):
            task_memory(10**15)
    assert len(waiting) == 16
    assert max(waiting) <= 6


def _decode_chunk(row, folder, **_):
    yield _decode(row, folder)


@pytest.mark.slow
def test_decoded_chunks_do_not_pile_up_before_a_slow_reward(tmp_path, monkeypatch, ray_address):
    monkeypatch.setattr(score, "RewardActor", _SlowActor)
    monkeypatch.setattr(score, "prepare_chunks", partial(_decode_chunk, folder=tmp_path))
    monkeypatch.setattr(score, "CHUNK_BYTES", UNIT_BYTES)
    options = ScoreOptions.model_construct(running=ScoreJobOptions(device="cpu"))
    specs = {"toy-truth": f"toy-truth={tmp_path}"}
    models = {"toy-truth": score.RewardRecord("m", "f", "u", "fp32")}
    with connected(ray_address):
        source = ray.data.from_items([{"unit": unit} for unit in range(32)], override_num_blocks=32)
        made = score._add_stages(source, None, options, [], {}, specs, models, {"toy-truth": 1})
        tables = made.iter_batches(batch_size=None, batch_format="pyarrow")
        waiting = [count for table in tables for count in table["waiting"].to_pylist()]
    assert len(waiting) == 32
    assert max(waiting) <= 14  # ten by the limit, and four tasks that run


_STOPPED_IN_RAY = """
import os, signal, sys, time
import ray, typer
from smpo_pipeline.jobs.cluster.session import connected
from smpo_common.commandline import run_app

app = typer.Typer()

@app.command()
def work():
    with connected(None):
        print(ray.get(ray.remote(lambda: "a worker answered").remote()), flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

sys.argv = ["work"]
run_app(app)
"""


@pytest.mark.slow
def test_ray_starts_without_a_home_and_with_a_long_tmpdir_and_stops_at_sigterm(tmp_path):
    far = tmp_path / ("far" * 40)
    far.mkdir()
    keep = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", _STOPPED_IN_RAY],
        env=keep | {"HOME": "/dev/null/nobody", "TMPDIR": str(far)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "a worker answered\n", done.stderr
    assert done.returncode == 143
    assert re.fullmatch("stopped.*same command.*\n", done.stderr)


def test_a_ray_that_does_not_start_in_time_is_one_line(monkeypatch):
    def fail(**_options):
        raise Exception("The current node timed out during startup.")  # noqa: TRY002  (what Ray raises)

    monkeypatch.setattr("ray.init", fail)
    with (
        pytest.raises(UserError, match=r"^Ray cannot start on this machine: The current node timed out"),
        connected(None),
    ):
        pass


def test_a_defect_while_ray_starts_is_not_taken_for_the_machines(monkeypatch):
    monkeypatch.setattr("ray.init", lambda **_options: {}["missing"])
    with pytest.raises(KeyError), connected(None):
        pass
