"""``smpo-pipeline score``."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from smpo_common.store_path import AnyPath
from smpo_pipeline.jobs.score.options import ScoreOptions
from smpo_pipeline.terminal import print_next
from smpo_schemas.scores import REJECTS_FILE, SCORES_FILE, ScoresInfo

_MOST_SHOWN = 4
"""Paths of pairs in the command that is printed at the end."""


def score(options: ScoreOptions) -> None:
    """Score both images of every pair with one or more reward models.

    Into a finished OUT of the same pairs, rewards that it lacks are added: what is there is not scored again.

    Writes OUT/scores-*.parquet (one row a pair, raw scores), OUT/rejected.parquet (pairs left out, with the reason)
    and OUT/scores.json (statistics; written last).
    """
    from smpo_pipeline.jobs.score.job import score as run_job  # noqa: PLC0415  (keeps --help free of torch and Ray)

    info = run_job(options)
    options.write(options.out, options.out / SCORES_FILE)
    console = Console(markup=False)
    _show(console, info, options.out)
    pairs = options.pairs if len(options.pairs) <= _MOST_SHOWN else ("PAIRS",)
    invert = ("smpo-pipeline", "invert", "--pairs", *pairs, *options.columns.as_flags())
    print_next(console, *invert, "--scores", options.out, "--model", "MODEL", "--out", "shards")


def _show(console: Console, info: ScoresInfo, out: AnyPath) -> None:
    table = Table("reward", "unit", "min", "mean", "max", "agrees with labels")
    for name, each in info.rewards.items():
        agreement = "no labels" if each.agreement is None else f"{each.agreement:.1%} of {each.num_labelled}"
        table.add_row(name, each.unit, f"{each.min:.4f}", f"{each.mean:.4f}", f"{each.max:.4f}", agreement)
    console.print(table)
    rejected = f", {info.rejected} rejected (reasons: {out / REJECTS_FILE})" if info.rejected else ""
    console.print(f"{info.scored} pairs scored{rejected}: {out}")
