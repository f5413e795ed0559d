"""``smpo-pipeline weigh``."""

from __future__ import annotations

from rich.console import Console

from smpo_common.errors import one_line
from smpo_pipeline.terminal import make_table, print_next
from smpo_pipeline.weighing.options import WeighOptions
from smpo_schemas.scoring.weights import WEIGHTS_FILE, WEIGHTS_REJECTS_FILE, WeightsInfo


def weigh(options: WeighOptions) -> None:
    """Weigh pairs by how much they look like golden ones (DoRA), for training under distribution shift.

    A logistic regression on the embeddings of a frozen CLIP tells golden images from the others, on prompts that it has
    not seen. An image's weight is the density of golden images divided by that of all images; a pair's weight is the
    mean over its two images.

    Writes a column into the Parquet files of --scores, for `smpo-train --weight-column`; weights.json (how well the
    classifiers do); and weights-rejected.parquet (pairs whose images cannot be read, which get no weight).

    Examples:
        smpo-pipeline weigh --scores scores --pairs data --golden human.txt --source-column site
    """
    from smpo_pipeline.weighing.run import weigh as run  # noqa: PLC0415  (keeps --help free of torch)

    console = Console(markup=False, emoji=False)
    report = run(options, console)
    show(console, report)
    rejects = f"; {report.rejected} rejected ({options.scores / WEIGHTS_REJECTS_FILE})" if report.rejected else ""
    console.print(
        f"{report.pairs} pairs weighed{rejects}: {options.scores / WEIGHTS_FILE}", highlight=False, soft_wrap=True
    )
    train = ("smpo-train", "--shards", "SHARDS", "--model", "MODEL", "--scores", options.scores)
    print_next(console, *train, "--weight-column", report.column, "--out", "runs/weighed")


def show(console: Console, report: WeightsInfo) -> None:
    """Print the classifiers and the weights."""
    title = f"{report.golden} golden pairs ({report.alpha:.1%}) against each source"
    table = make_table(title, ("source", "pairs", "share", "AUC", "calibration error", "l2"))
    for name, source in report.sources.items():
        numbers = (f"{source.auc:.3f}", f"{source.calibration_error:.3f}", f"{source.l2:g}")
        table.add_row(one_line(name), f"{source.pairs}", f"{source.share:.1%}", *numbers)
    console.print(table)
    console.print("on prompts held out; golden images and a source's count the same, as the formula takes them")
    for name, source in report.sources.items():
        if source.noise:
            text = f"AUC near 0.5: golden images and those of {one_line(name)} look alike; these weights are noise"
            console.print(text, style="bold", highlight=False, soft_wrap=True)
    divided = f"; divided by their mean {report.unnormalised_mean:.3f}" if report.normalised else ""
    size = f"{report.effective_size:.1f} equal ones of {report.pairs}"
    console.print(
        f"weights: mean {report.mean:.3f}, largest {report.max:.3f}{divided}; they count as {size}",
        highlight=False,
        soft_wrap=True,
    )
