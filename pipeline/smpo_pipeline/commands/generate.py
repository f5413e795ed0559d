"""``smpo-pipeline generate``."""

from __future__ import annotations

from rich.console import Console

from smpo_pipeline.jobs.generate.options import GenerateOptions
from smpo_pipeline.terminal import print_next
from smpo_schemas.candidates import CANDIDATES_FILE, REJECTS_FILE


def generate(options: GenerateOptions) -> None:
    """Generate several candidate images of every prompt, as pairs that `score` reads.

    Writes OUT/candidates-*.parquet (two images per row), OUT/rejected.parquet (prompts without images, with reasons)
    and, last, OUT/candidates.json. A finished run is kept, an unfinished one is resumed.
    """
    from smpo_models.weights import variant_remark  # noqa: PLC0415
    from smpo_pipeline.jobs.generate.job import generate as run_job  # noqa: PLC0415  (keeps --help free of torch and Ray)

    console = Console(markup=False)
    if remark := variant_remark(options.model, options.sampling.variant):
        console.print(remark, highlight=False, soft_wrap=True)
    made = run_job(options)
    options.write(options.out, options.out / CANDIDATES_FILE)
    rejected = f", {made.rejected} rejected (reasons: {options.out / REJECTS_FILE})" if made.rejected else ""
    size = f"{sum(part.bytes for part in made.parts) / 1e6:.1f} MB in {len(made.parts)} files"
    console.print(f"{made.prompts} prompts, {made.images} images, {size}{rejected}: {options.out}", soft_wrap=True)
    print_next(console, "smpo-pipeline", "score", "--pairs", options.out, "--reward", "REWARD", "--out", "scores")
