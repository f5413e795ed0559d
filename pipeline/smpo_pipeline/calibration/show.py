"""Print a calibration."""

from __future__ import annotations

from rich.console import Console

from smpo_common.errors import one_line
from smpo_pipeline.calibration.agreement import Repeats
from smpo_pipeline.calibration.calibrate import CalibrationResult
from smpo_pipeline.calibration.cross_validation import COIN, MIXTURE
from smpo_pipeline.terminal import facts, make_table, percent


def print_report(report: CalibrationResult, scores: str, console: Console) -> None:
    """Print all tables and the verdict."""
    result = report.calibration
    labels = f"{result.labels - result.ties} decided, {result.ties} ties (each counts half for either image)"
    prior = result.votes
    prompts = f"{result.prompts}, in {result.folds} folds; all pairs of a prompt are in one fold"
    lines = {"labels": labels, "prompts": prompts}
    if prior and prior.votes > prior.pairs:
        lines["votes"] = (
            f"{prior.votes} on {prior.pairs} pairs; their prior counts as {prior.strength:.3g} votes for "
            f"`--preference votes`, as {prior.mixture_strength:.3g} for `votes-mixture`"
        )
    console.print(facts(f"calibration: {scores}", lines))
    _print_measures(report, console)
    _print_rewards(report, console)
    _print_annotators(report, console)
    _print_people(report, console)
    console.print(verdict(report), style="bold", highlight=False, soft_wrap=True)


def best(report: CalibrationResult) -> str:
    """Return the reward or mix with the lowest held-out log-loss."""
    fits = report.calibration.held_out
    return min(fits, key=lambda name: fits[name].log_loss)


def verdict(report: CalibrationResult) -> str:
    """Name the best reward or mix in one sentence."""
    fits = report.calibration.held_out
    name = best(report)
    sentence = f"lowest held-out log-loss: {name} ({fits[name].log_loss:.4f})"
    written = report.held_out.chosen
    return sentence if name == written else f"{sentence}; the calibrated mixture has {fits[written].log_loss:.4f}"


def _print_measures(report: CalibrationResult, console: Console) -> None:
    title = "held out: each label is predicted by a fit to the other folds"
    table = make_table(title, ("reward or mix", "agrees", "log-loss", "calibration error"))
    for name, fit in report.calibration.held_out.items():
        error = "-" if name == COIN else f"{fit.calibration_error:.3f}"
        agrees = "-" if name == COIN or fit.agreement is None else f"{100 * fit.agreement:.1f} %"
        table.add_row(name, agrees, f"{fit.log_loss:.4f}", error)
    console.print(table)


def _print_rewards(report: CalibrationResult, console: Console) -> None:
    weights = "equal weights, which did better" if report.calibration.weights == "equal" else "fitted weights"
    title = f"the mixture, fitted to all labels ({weights})"
    table = make_table(title, ("reward", "unit", "weight", "over folds", "tau", "tau alone"), 2)
    for k, (name, reward) in enumerate(report.calibration.rewards.items()):
        equal = report.held_out.equal_weights
        weights_of_folds = [float(fits.mixture(equal_weights=equal).weight_K[k]) for fits in report.held_out.folds]
        table.add_row(
            name,
            one_line(reward.unit),
            f"{reward.weight:.3f}",
            f"{min(weights_of_folds):.2f} .. {max(weights_of_folds):.2f}",
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
        console.print("no pair was labelled more than once: people's agreement with each other is unknown\n")
        return
    lines = {"different people": _describe(people.others), "the same person": _describe(people.selves)}
    console.print(facts(f"{people.pairs} pairs were labelled more than once", lines))


def _describe(repeats: Repeats) -> str:
    if not repeats.decided and not repeats.with_tie:
        return "none"
    ties = f"; {repeats.with_tie} with a tie" if repeats.with_tie else ""
    return f"{percent(repeats.alike, repeats.decided)} of {repeats.decided} repeated decided labels agree{ties}"
