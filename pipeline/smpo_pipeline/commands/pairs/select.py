"""``smpo-pipeline select``."""

from __future__ import annotations

from rich.console import Console

from smpo_pipeline.selection.options import SelectOptions
from smpo_pipeline.selection.report import print_selection
from smpo_pipeline.terminal import print_next
from smpo_schemas.generation.selection import PAIRS_FILE, SCORES_FOLDER, SELECTION_FILE


def select(options: SelectOptions) -> None:
    """Select pairs worth learning from among several scored images of each prompt.

    Writes OUT/pairs.parquet (the pairs with their images), OUT/scores (their scores and those of all candidates, for
    `smpo-train --preference winrate`), OUT/rejected.parquet (prompts without a pair, with reasons), and last
    OUT/selection.json.

    Examples:
        smpo-pipeline select --candidates candidates --scores scores --by extremes --out selected
    """
    from smpo_pipeline.selection.run import select as run  # noqa: PLC0415  (keeps --help free of torch)

    console = Console(markup=False, emoji=False)
    info = run(options, console)
    options.write(options.out, options.out / SELECTION_FILE)
    print_selection(info, options.out, console)
    pairs, scores = options.out / PAIRS_FILE, options.out / SCORES_FOLDER
    print_next(
        console, "smpo-pipeline", "invert", "--pairs", pairs, "--scores", scores, "--model", "MODEL", "--out", "shards"
    )
