"""``smpo-pipeline refresh``."""

from __future__ import annotations

from rich.console import Console

from smpo_common.errors import one_line
from smpo_pipeline.refreshing.options import RefreshOptions
from smpo_pipeline.terminal import make_table, print_next
from smpo_schemas.rejects import REJECTS_FILE
from smpo_schemas.scoring.refresh import RefreshInfo


def refresh(options: RefreshOptions) -> None:
    """Refit a reward so that it prefers people's choices over samples of the policy (APO's reward player).

    A linear head on the embeddings of a frozen CLIP is fitted on top of the reward: to the labels of human pairs, and,
    with the weight of --adversarial, to comparisons of the preferred image of each pair with samples of its prompt.

    Writes a folder for `--reward refreshed=OUT`: head.safetensors, rejected.parquet, and last refresh.json.

    Examples:
        smpo-pipeline refresh --reward pickscore --scores scores --pairs data --candidates candidates --out refreshed
    """
    from smpo_pipeline.refreshing.run import refresh as run  # noqa: PLC0415  (keeps --help free of torch)

    console = Console(markup=False, emoji=False)
    info = run(options, console)
    options.write(options.out)
    show(console, info)
    rejects = f"; {info.rejected} rejected ({options.out / REJECTS_FILE})" if info.rejected else ""
    sampled = (
        f"{info.comparisons} comparisons with samples of {info.sampled_prompts} of their {info.human_prompts} prompts"
    )
    console.print(
        f"{info.human_pairs} human pairs and {sampled}{rejects}: {options.out}", highlight=False, soft_wrap=True
    )
    score = ("smpo-pipeline", "score", "--pairs", *options.candidates, "--reward", f"refreshed={options.out}")
    print_next(console, *score, "--out", "scores-refreshed")


def show(console: Console, info: RefreshInfo) -> None:
    """Print how well the reward did before and after."""
    columns = ("on prompts held out", "agrees with labels", "log-loss", "preferred over sample")
    table = make_table(f"tau {info.tau:.4g} {one_line(info.unit)}, l2 {info.l2:g}", columns)
    for name, measures in ((info.reward.partition("=")[0], info.before), ("refreshed", info.after)):
        over = "-" if measures.golden_over_sample is None else f"{measures.golden_over_sample:.1%}"
        table.add_row(one_line(name), f"{measures.agreement:.1%}", f"{measures.log_loss:.4f}", over)
    console.print(table)
    console.print(f"P(image_0 preferred) of the human pairs changes by {info.change:.3f} on average", highlight=False)
