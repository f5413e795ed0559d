"""Print an evaluation's results as sentences and as a table."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from smpo_pipeline.evaluation.comparison import Estimate
from smpo_pipeline.evaluation.results import Results


def percent_interval(estimate: Estimate) -> str:
    """Format as ``74.1 .. 82.0 %``; one prompt gives no interval."""
    if estimate.low is None or estimate.high is None:
        return "none with one prompt"
    return f"{100 * estimate.low:.1f} .. {100 * estimate.high:.1f} %"


def signed_interval(estimate: Estimate) -> str:
    """Format as ``+0.12 (+0.08 .. +0.16)``."""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:+.3g}"
    return f"{estimate.value:+.3g} ({estimate.low:+.3g} .. {estimate.high:+.3g})"


def headline(results: Results, model: str, reward: str) -> str:
    """Describe in one sentence how often ``model`` beats the baseline under ``reward``, with the interval.

    Raises:
        ValueError: ``model`` is the baseline.
    """
    versus = results.finding(model, reward).versus_baseline
    if versus is None:
        raise ValueError(f"{model} is the baseline")
    rate = versus.win_rate
    ties = f", {versus.ties} {'tie' if versus.ties == 1 else 'ties'} counted half" if versus.ties else ""
    return (
        f"{model} beats {results.baseline} in {100 * rate.value:.1f} % of {results.num_images} images of "
        f"{results.num_prompts} prompts under {reward} "
        f"(95 % interval {percent_interval(rate)}, clustered by prompt{ties})"
    )


def headlines(results: Results) -> list[str]:
    """Describe every model but the baseline under every reward."""
    return [
        headline(results, finding.model, finding.reward)
        for finding in results.findings
        if finding.versus_baseline is not None
    ]


def print_results(results: Results, console: Console) -> None:
    """Print a table of all findings and the headlines."""
    table = Table(
        title=f"{results.num_images} images of {results.num_prompts} prompts per model",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    for column in ("reward", "model"):
        table.add_column(column, overflow="fold")
    for column in ("median", "mean", "win rate", "95 % interval", "mean gain"):
        table.add_column(column, justify="right", no_wrap=True)
    previous = ""
    for finding in results.findings:
        if previous and finding.reward != previous:
            table.add_section()
        cells = ["" if finding.reward == previous else finding.reward, finding.model]
        cells += [f"{finding.median:.3g}", f"{finding.mean:.3g}"]
        versus = finding.versus_baseline
        if versus is None:
            cells += ["baseline", "", ""]
        else:
            rate, gain = versus.win_rate, versus.mean_difference
            cells += [f"{100 * rate.value:.1f} %", percent_interval(rate), f"{gain.value:+.3g}"]
        table.add_row(*cells)
        previous = finding.reward
    console.print(table)
    for sentence in headlines(results):
        console.print(sentence, style="bold", highlight=False, soft_wrap=True)
