"""``smpo-pipeline evaluate``."""

from __future__ import annotations

from rich.console import Console

from smpo_pipeline.evaluation.evaluation import finished_results, prepare_evaluation
from smpo_pipeline.evaluation.options import EvaluateOptions
from smpo_pipeline.evaluation.results import REPORT_FILE
from smpo_pipeline.evaluation.summary import print_results


def evaluate(options: EvaluateOptions) -> None:
    """Compare models on the same prompts and noise: scores, win rates with intervals, and a report with images.

    A finished evaluation with the same settings is kept, an unfinished one is resumed.

    Examples:
        smpo-pipeline evaluate --model base=MODEL tuned=runs/smpo --prompts prompts.txt --reward pickscore --out report
    """
    console = Console(markup=False)
    evaluation = prepare_evaluation(options)
    results = finished_results(evaluation, overwrite=options.running.overwrite)
    if results:
        console.print(
            f"{evaluation.out} is finished with these settings; nothing to do.", highlight=False, soft_wrap=True
        )
    else:
        # Torch and Ray: not for a finished evaluation.
        from smpo_pipeline.evaluation.run import run  # noqa: PLC0415
        from smpo_pipeline.jobs.evaluate.sampling import sample_model  # noqa: PLC0415
        from smpo_pipeline.jobs.record.lock import locked  # noqa: PLC0415

        # With what was chosen by default, so that the config reproduces the numbers on any machine.
        names = ("dtype", "steps", "guidance_scale") if evaluation.models else ()
        chosen = {name: getattr(evaluation.settings, name) for name in names}
        with locked(evaluation.out):
            options.replace(**chosen).write(evaluation.out)
            results = run(evaluation, console, sample_model)
    print_results(results, console)
    console.print(f"report: {evaluation.out / REPORT_FILE}", highlight=False, soft_wrap=True)
