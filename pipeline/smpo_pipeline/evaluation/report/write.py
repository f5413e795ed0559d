"""Render ``report.html``: one self-contained page, with its style, its script and its pictures in it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from smpo_common.files import write_bytes
from smpo_models.sampling import sampling_in_words
from smpo_pipeline.evaluation.report.charts import SERIES, curve, distribution
from smpo_pipeline.evaluation.report.curves import read_curves
from smpo_pipeline.evaluation.report.figure import draw_win_rates
from smpo_pipeline.evaluation.report.gallery import select_sections
from smpo_pipeline.evaluation.report.pictures import embed_all
from smpo_pipeline.evaluation.report.prompts import SHOWN_IMAGE, prompt_table
from smpo_pipeline.evaluation.report.tables import (
    Scores,
    compare_by_category,
    compare_models,
    prompts_csv,
    win_rates_csv,
)
from smpo_pipeline.evaluation.results import REPORT_FILE, Results
from smpo_pipeline.evaluation.summary import headline, percent_interval, signed_interval

_PAGE = resources.files("smpo_pipeline.evaluation.report") / "page"


def write_report(
    out: Path,
    results: Results,
    scores: Scores,
    files: Mapping[str, Sequence[Path]],
    metrics: Mapping[str, Path],
) -> None:
    """Write the page, and its tables and its figure as files beside it.

    Args:
        out: the evaluation's folder.
        results: its results.
        scores: of all images.
        files: per model, the P * I image files, prompt by prompt.
        metrics: the metrics file of each model that has one.
    """
    sections = select_sections(results, scores, files)
    in_table = [path for paths in files.values() for path in paths[SHOWN_IMAGE :: results.settings.images_per_prompt]]
    pictures = embed_all([*in_table, *(path for section in sections for path in section.paths())])
    names = {path: _name(path, out) for path in pictures.by_path}
    everywhere = compare_models(scores, range(results.num_prompts))
    by_category = compare_by_category(results, scores)
    beside = {
        "win_rates.png": draw_win_rates(results),
        "win_rates.csv": win_rates_csv(results, [everywhere, *by_category]).encode(),
        "prompts.csv": prompts_csv(results, scores).encode(),
    }
    for name, content in beside.items():
        write_bytes(out / name, content)
    first = results.rewards[0].name
    trained = [model for model in results.models if model.training]
    page = _environment().get_template("report.html.j2")
    rendered = page.render(
        results=results,
        sampling=_sampling(results),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        headlines=[headline(results, model.name, first) for model in results.models[1:]],
        colours={model.name: f"series-{number % SERIES}" for number, model in enumerate(results.models)},
        everywhere=everywhere,
        by_category=by_category,
        distributions={name: distribution(by_model, f"scores of {name} by model") for name, by_model in scores.items()},
        sections=sections,
        pictures=pictures,
        names=names,
        prompts=prompt_table(results, scores, files, pictures, names),
        curves=_curves(metrics),
        trained=trained,
        training_settings=list(dict.fromkeys(name for model in trained for name in model.training)),
        beside={name: _data_uri(name, content) for name, content in beside.items()},
    )
    write_bytes(out / REPORT_FILE, rendered.encode())


def _name(path: Path, out: Path) -> str:
    """Name a file as the page links to it."""
    return (path.relative_to(out) if path.is_relative_to(out) else path).as_posix()


def _sampling(results: Results) -> str:
    settings = results.settings
    sampling = sampling_in_words(settings.sampler, settings.steps, settings.guidance_scale)
    if not settings.sampler:
        return sampling
    size = [f"{settings.resolution} pixels"] if settings.resolution else []
    variant = [f"{settings.variant} weights"] if settings.variant else []
    return ", ".join([sampling, *size, f"seed {settings.seed}", settings.dtype, *variant])


def _data_uri(name: str, content: bytes) -> str:
    kind = "image/png" if name.endswith(".png") else "text/csv"
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _curves(metrics: Mapping[str, Path]) -> dict[str, dict[str, Markup]]:
    """Draw the training curves, by name, of each model."""
    return {
        model: {
            name: curve(*points, f"{name} of {model} over optimizer steps")
            for name, points in read_curves(path).items()
        }
        for model, path in metrics.items()
    }


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("smpo_pipeline.evaluation.report", "page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(percent_interval=percent_interval, signed_interval=signed_interval)
    # Files of this package, not of users.
    for name in ("report.css", "report.js"):
        environment.globals[name.replace(".", "_")] = Markup((_PAGE / name).read_text(encoding="utf-8"))  # noqa: S704
    return environment
