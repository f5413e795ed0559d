"""The commands of stages 1 and 2 on the pairs of ``inputs``."""

from __future__ import annotations


def score(inputs, out, *more, run):
    rewards = [f"{name}={inputs / name}" for name in ("pickscore", "clipscore")]
    common = ("--pairs", inputs / "pairs", "--reward", *rewards, "--out", out, "--device", "cpu")
    return run("smpo-pipeline", "score", *common, *more)


def invert(inputs, scores, out, *more, run):
    common = ("--pairs", inputs / "pairs", "--model", inputs / "model", "--out", out)
    joined = ("--scores", scores) if scores else ()
    few = () if "--concurrency" in more else ("--concurrency", 1)  # each worker's start is seconds
    return run(
        "smpo-pipeline",
        "invert",
        *common,
        *joined,
        "--device",
        "cpu",
        "--pairs-per-shard",
        6,
        "--steps",
        3,
        *few,
        *more,
    )
