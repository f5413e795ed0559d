"""A calibration in words and tables."""

from __future__ import annotations

from rich.console import Console

from smpo_common.errors import one_line
from smpo_pipeline.calibration.agreement import Repeats
from smpo_pipeline.calibration.calibrate import CalibrationResult
from smpo_pipeline.calibration.cross_validation import COIN, MIXTURE
from smpo_pipeline.terminal import facts, make_table, percent


def print_report(report: CalibrationResult, scores: str, console: Console) -> None:
    """Print everything."""
    found = report.calibration
    console.print(
        facts(
            f"calibration: {scores}",
            {
                "labels": f"{found.labels - found.ties} decided, {found.ties} ties (each counts half for either image)",
                "prompts": f"{found.prompts}, in {found.folds} folds; no prompt is on both sides",
            },
        )
    )
    _print_measures(report, console)
    _print_rewards(report, console)
    _print_annotators(report, console)
    _print_people(report, console)
    console.print(verdict(report), style="bold", highlight=False, soft_wrap=True)


def best(report: CalibrationResult) -> str:
    """The reward or mix with the lowest held-out log-loss."""
    fits = report.calibration.held_out
    return min(fits, key=lambda name: fits[name].log_loss)


def verdict(report: CalibrationResult) -> str:
    """What to prefer by, in a sentence."""
    fits = report.calibration.held_out
    name = best(report)
    sentence = f"lowest held-out log-loss: {name} ({fits[name].log_loss:.4f})"
    written = report.held_out.chosen
    return sentence if name == written else f"{sentence}; the calibrated mixture has {fits[written].log_loss:.4f}"


def _print_measures(report: CalibrationResult, console: Console) -> None:
    title = "held out: each label predicted from the prompts of the other folds"
    table = make_table(title, ("reward or mix", "agrees", "log-loss", "calibration error"))
    for name, fit in report.calibration.held_out.items():
        error = "-" if name == COIN else f"{fit.calibration_error:.3f}"
        agrees = "-" if name == COIN or fit.agreement is None else f"{100 * fit.agreement:.1f} %"
        table.add_row(name, agrees, f"{fit.log_loss:.4f}", error)
    console.print(table)


def _print_rewards(report: CalibrationResult, console: Console) -> None:
    weights = "equal weights did better" if report.calibration.weights == "equal" else "fitted weights"
    title = f"the mixture, of all labels ({weights})"
    table = make_table(title, ("reward", "unit", "weight", "over folds", "tau", "tau alone"), 2)
    for k, (name, reward) in enumerate(report.calibration.rewards.items()):
        equal = report.held_out.equal_weights
        over = [float(fits.mixture(equal_weights=equal).weight_K[k]) for fits in report.held_out.folds]
        table.add_row(
            name,
            one_line(reward.unit),
            f"{reward.weight:.3f}",
            f"{min(over):.2f} .. {max(over):.2f}",
            f"{reward.tau:.4g}",
            f"{reward.tau_alone:.4g}",
        )
    console.print(table)


def _print_annotators(report: CalibrationResult, console: Console) -> None:
    names = list(report.annotators)
    mixture = report.annotators[report.held_out.chosen]
    people = list(mixture)
    if not people:
        return
    table = make_table(
        "agreement by annotator, held out, of decided labels",
        ("annotator", "labels", *(MIXTURE if name == report.held_out.chosen else name for name in names)),
    )
    for person in people:
        decided = mixture[person][1]
        table.add_row(one_line(person), f"{decided}", *(percent(*report.annotators[name][person]) for name in names))
    console.print(table)


def _print_people(report: CalibrationResult, console: Console) -> None:
    people = report.people
    if not people.pairs:
        console.print("no pair was labelled more than once: how far people agree with each other is not known\n")
        return
    lines = {
        "different people": _words(people.others),
        "the same person": _words(people.selves),
    }
    console.print(facts(f"{people.pairs} pairs were labelled more than once", lines))


def _words(found: Repeats) -> str:
    if not found.decided and not found.with_tie:
        return "no two labels"
    ties = f", and {found.with_tie} with a tie" if found.with_tie else ""
    return f"{percent(found.alike, found.decided)} of {found.decided} decided twos of labels agree{ties}"
