"""``smpo-pipeline score``."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from smpo_common.store_path import AnyPath
from smpo_pipeline.jobs.score.options import ScoreOptions
from smpo_pipeline.terminal import print_next
from smpo_schemas.generation.candidates import CANDIDATES_FILE
from smpo_schemas.rejects import REJECTS_FILE
from smpo_schemas.scoring.scores import SCORES_FILE, ScoresInfo

_MOST_SHOWN = 4
"""Most paths of pairs in the next command that is printed."""


def score(options: ScoreOptions) -> None:
    """Score both images of every pair with one or more reward models.

    If OUT already holds finished scores of the same pairs, only new rewards are scored and added.

    Writes OUT/scores-*.parquet (raw scores, one row per pair), OUT/rejected.parquet (the other pairs, with reasons),
    and last OUT/scores.json (statistics).

    Examples:
        smpo-pipeline score --pairs data --reward pickscore clipscore --out scores
    """
    from smpo_pipeline.jobs.score.job import score as run_job  # noqa: PLC0415  (keeps --help free of torch and Ray)

    info = run_job(options)
    options.write(options.out, options.out / SCORES_FILE)
    console = Console(markup=False)
    _show(console, info, options.out)
    pairs = options.pairs if len(options.pairs) <= _MOST_SHOWN else ("PAIRS",)
    if any((path / CANDIDATES_FILE).is_file() for path in options.pairs if path.is_dir()):
        select = ("smpo-pipeline", "select", "--candidates", *pairs, "--scores", options.out, "--by", "extremes")
        print_next(console, *select, "--out", "selected")
        return
    invert = ("smpo-pipeline", "invert", "--pairs", *pairs, *options.columns.as_flags())
    print_next(console, *invert, "--scores", options.out, "--model", "MODEL", "--out", "shards")


def _show(console: Console, info: ScoresInfo, out: AnyPath) -> None:
    table = Table("reward", "unit", "min", "mean", "max", "agrees with labels")
    for name, reward in info.rewards.items():
        agreement = "no labels" if reward.agreement is None else f"{reward.agreement:.1%} of {reward.num_labelled}"
        table.add_row(name, reward.unit, f"{reward.min:.4f}", f"{reward.mean:.4f}", f"{reward.max:.4f}", agreement)
    console.print(table)
    rejected = f", {info.rejected} rejected (reasons: {out / REJECTS_FILE})" if info.rejected else ""
    console.print(f"{info.scored} pairs scored{rejected}: {out}")
