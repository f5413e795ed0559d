"""Stages 1 and 2 on a simulated cluster, with drivers, workers and nodes killed at random moments.

    python -m tests.chaos --runs 50 --seed 0              (make chaos)
    python -m tests.chaos --runs 10 --seed 0 --store s3

Each run scores and inverts a small slice of the embedded world. Up to five times a stage something is killed with
SIGKILL: the command itself, which is then given again; a process of a worker; or a whole node, in whose place another
one comes. Each run must end with directories that are byte for byte those of an undisturbed run, pairs in = out +
rejected, and no unit begun after it was committed.

With ``--store s3`` pairs, scores and shards are on an S3-speaking server on loopback. While things are killed, it fails
every ninth request: an answer of 500 or 503, one that comes late, one that breaks off, one that never comes in time.
"""

# ruff: noqa: T201
from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from ray.cluster_utils import Cluster

from smpo_common.files import atomic_path, remove_tree, write_bytes
from smpo_common.store_path import AnyPath, StorePath
from tests.servers.object_store import Faults, object_store

ROOT = Path(__file__).parent.parent
KILLS = 5
WAIT_SECONDS = 300
READ_TIMEOUT_SECONDS = 3
FAULTS_EVERY = 9
JOBS_OWN = ("ray::Map", "ray::Read", "ray::WorkLog")
"""Names of processes that do a job's work: actors and tasks of Ray Data's stages, and the log of their work."""

NODE = {"num_cpus": 2, "object_store_memory": 200 << 20, "include_dashboard": False}


class Chaos:
    """A world, what undisturbed commands make of it, and a cluster to disturb."""

    def __init__(self, folder: Path, rows: int, inverted: int, store: str = "disk") -> None:
        """``rows`` of the input are scored, ``inverted`` of them inverted; ``store``: disk or s3."""
        self.folder = folder
        self.log = folder / "log"
        self.data: AnyPath = folder
        self.whole, self.seconds = folder / f"whole-{store}", folder / f"seconds-{store}"
        self.faults = Faults(None)
        self._exits = ExitStack()
        if store == "s3":
            os.environ["FSSPEC_S3"] = json.dumps({"config_kwargs": {"read_timeout": READ_TIMEOUT_SECONDS}})
            self.faults = self._exits.enter_context(object_store(os.environ.__setitem__))
            self.faults.ways = itertools.cycle(("500", "503", "slow", "cut", "hang"))
            self.faults.hang = READ_TIMEOUT_SECONDS + 1
            self.data = StorePath("s3://bucket")
        os.environ |= {
            "CHAOS_LOG": str(self.log),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *(path for path in sys.path if path)]),
            "RAY_BACKEND_LOG_LEVEL": "fatal",
            "HF_HUB_OFFLINE": "1",
        }
        self.rows, self.inverted = rows, inverted
        self._make_pairs()
        self.cluster = Cluster(initialize_head=True, head_node_args=NODE)
        self.nodes = [self.cluster.add_node(**NODE)]
        os.environ["RAY_ADDRESS"] = self.cluster.address

    def _make_pairs(self) -> None:
        """A few sampled pairs over and over, each time with new ids, and now and then one that cannot be read."""
        world = self.folder / "world"
        if not (world / "world.json").exists():
            self._check(self._start("toy", "--out", world, "--pairs", 16))
        tables = [pq.read_table(path) for path in sorted((world / "pairs").glob("*.parquet"))]
        few = pa.concat_tables(tables).to_pylist()
        rows = [dict(few[number % len(few)]) for number in range(self.rows)]
        for number, row in enumerate(rows):
            row["ranking_id"] = number
            if number % 41 == 7:
                row["jpg_1"] = row["jpg_1"][: len(row["jpg_1"]) // 2]
        with atomic_path(self.data / "pairs.parquet") as path:
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=50)

    def command(self, stage: str) -> list[object]:
        """What a user types."""
        common = ["--pairs", self.data / "pairs.parquet", "--device", "cpu", "--ray-address", "auto"]
        out = self.data / "out"
        rewards, model = self.folder / "world" / "rewards", self.folder / "world" / "model"
        if stage == "score":
            return ["score", *common, "--out", out / "scores", "--reward", f"pickscore={rewards / 'pickscore'}"]
        few = ["--steps", 3, "--pairs-per-shard", 6, "--batch-size", 4, "--limit", self.inverted]
        return ["invert", *common, "--scores", out / "scores", "--model", model, "--out", out / "shards", *few]

    def undisturbed(self) -> float:
        """Make what every run must end with; returns the seconds that the slower stage took."""
        if self.seconds.exists():
            remove_tree(self.data / "out")
            return float(self.seconds.read_text())
        seconds = []
        for stage in ("score", "invert"):
            start = time.monotonic()
            self._check(self._start(*self.command(stage)))
            seconds.append(time.monotonic() - start)
        for path, content in _contents(self.data / "out").items():
            write_bytes(self.whole / path, content)
        remove_tree(self.data / "out")
        self.seconds.write_text(str(max(seconds)))
        return max(seconds)

    def run(self, seed: int, seconds: float, most: int = KILLS) -> Counter[str]:
        """Both stages, disturbed up to ``most`` times each, each time within half of ``seconds`` of the time before.

        Returns:
            What was killed how often.

        Raises:
            AssertionError: a result is not that of the undisturbed run.
        """
        dice, killed = random.Random(seed), Counter[str]()
        self.log.write_text("")
        self.faults.every = FAULTS_EVERY
        for stage in ("score", "invert"):
            process = self._start(*self.command(stage))
            for _ in range(dice.randint(1, most)):
                try:
                    process.wait(dice.uniform(0.2, seconds / 2))
                    break
                except subprocess.TimeoutExpired:
                    victim = self._kill(dice, process)
                killed[f"{stage}: {victim}"] += 1
                if process.poll() is not None:
                    process = self._start(*self.command(stage))
            if self._wait(process):
                # With a node a driver may lose what it cannot go on without: a user gives the command again.
                killed[f"{stage}: command ended with an error"] += 1
                process = self._start(*self.command(stage))
            self._check(process)
        self.faults.every = 0
        self._compare(self.data / "out")
        self._nothing_twice()
        remove_tree(self.data / "out")
        return killed

    def _kill(self, dice: random.Random, driver: subprocess.Popen[bytes]) -> str:
        victim = dice.choice(["driver", "worker", "worker", "worker", "one of Ray's own", "node"])
        workers = self._workers(own=victim == "worker")
        if victim in ("worker", "one of Ray's own") and workers:
            worker = dice.choice(workers)
            name = " ".join(worker.cmdline())[:60].strip()
            worker.send_signal(signal.SIGKILL)
            return "decoder" if "decoder" in name else f"worker {name.split('(')[0].split('.')[0]}"
        if victim == "node":
            self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)
            self.nodes.append(self.cluster.add_node(**NODE))
            return "node"
        driver.kill()
        driver.wait()
        return "driver"

    def _workers(self, *, own: bool) -> list[psutil.Process]:
        """Busy processes of this cluster alone: those that do a job's work, or those that Ray has beside them."""
        found = []
        for node in (self.cluster.head_node, *self.nodes):
            for raylet in node.all_processes.get("raylet", ()):
                for process in psutil.Process(raylet.process.pid).children(recursive=True):
                    try:
                        words = process.cmdline()
                    except psutil.Error:
                        continue
                    # Where an agent dies, the raylet ends its node; and the head's is the whole cluster.
                    busy = words and words[0].startswith("ray::") and not re.search("IDLE|Agent", words[0])
                    works = words and (words[0].startswith(JOBS_OWN) or "smpo_pipeline.images.decoder" in words)
                    if works if own else busy and not works:
                        found.append(process)
        return found

    def _start(self, *arguments: object) -> subprocess.Popen[bytes]:
        with (self.folder / "output").open("ab") as output:
            command = [sys.executable, "-c", "from tests.chaos_driver import run; run()", *map(str, arguments)]
            self._driver = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT)
        return self._driver

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        try:
            return process.wait(WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"{process.args} does not end") from None

    def _check(self, process: subprocess.Popen[bytes]) -> None:
        status = self._wait(process)
        said = (self.folder / "output").read_text(errors="replace")[-3000:]
        assert status == 0, f"{process.args}: {status}; {said}"

    def _compare(self, out: AnyPath) -> None:
        mine, whole = _contents(out), _contents(self.whole)
        assert mine.keys() == whole.keys(), sorted(mine.keys() ^ whole.keys())
        for path, content in mine.items():
            assert content == whole[path], path
        info = json.loads((out / "scores" / "scores.json").read_text())
        totals = json.loads((out / "shards" / "manifest.json").read_text())["totals"]
        assert info["scored"] + info["rejected"] == self.rows
        assert totals["pairs"] + totals["rejected"] == totals["pairs_in"] == self.inverted

    def _nothing_twice(self) -> None:
        committed = set()
        for line in self.log.read_text().splitlines():
            what, stage, unit = line.split()
            if what == "commit":
                committed.add((stage, unit))
            else:
                assert (stage, unit) not in committed, f"{line}, after it was committed"
        assert committed

    def close(self) -> None:
        """End what is running, and the cluster."""
        self._driver.kill()
        self.cluster.shutdown()
        self._exits.close()


def _contents(folder: AnyPath) -> dict[str, bytes]:
    start = len(f"{folder}/")
    return {str(path)[start:]: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the next ones count on")
    parser.add_argument("--rows", type=int, default=512, help="pairs that are scored")
    parser.add_argument("--inverted", type=int, default=48, help="pairs that are inverted")
    parser.add_argument("--folder", type=Path, help="kept, and used again, with the world and the undisturbed results")
    parser.add_argument("--store", choices=("disk", "s3"), default="disk", help="where pairs and outputs lie")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        chaos = Chaos(folder, given.rows, given.inverted, given.store)
        try:
            seconds = chaos.undisturbed()
            print(f"undisturbed: {seconds:.0f} s for the slower stage", flush=True)
            total = Counter[str]()
            for seed in range(given.seed, given.seed + given.runs):
                start = time.monotonic()
                killed = chaos.run(seed, seconds)
                total += killed
                print(f"run {seed}: as undisturbed, {time.monotonic() - start:.0f} s, {dict(killed)}", flush=True)
            print(f"{given.runs} runs; killed: {dict(total)}; failed requests: {dict(chaos.faults.injected)}")
        finally:
            chaos.close()


if __name__ == "__main__":
    main()
