"""``smpo-pipeline evaluate``."""

from __future__ import annotations

from rich.console import Console

from smpo_pipeline.evaluation.evaluation import finished_results, prepare_evaluation
from smpo_pipeline.evaluation.options import EvaluateOptions
from smpo_pipeline.evaluation.results import REPORT_FILE
from smpo_pipeline.evaluation.summary import print_results
from smpo_pipeline.terminal import print_next


def evaluate(options: EvaluateOptions) -> None:
    """Compare models: the same prompts and noise for all, scores, win rates with intervals, a report with pictures.

    A finished evaluation with the same settings is left alone, an unfinished one is continued.
    """
    console = Console(markup=False)
    evaluation = prepare_evaluation(options)
    results = finished_results(evaluation, overwrite=options.running.overwrite)
    if results:
        console.print(
            f"{evaluation.out} is finished with these settings; nothing to do.", highlight=False, soft_wrap=True
        )
    else:
        from smpo_pipeline.evaluation.run import run  # noqa: PLC0415  (loads torch: not for a finished evaluation)

        options.write(evaluation.out)
        results = run(evaluation, console)
    print_results(results, console)
    print_next(console, "open", evaluation.out / REPORT_FILE)
