"""The card of a data set on the hub."""

from __future__ import annotations

from importlib.metadata import version

from huggingface_hub import DatasetCardData

from smpo_models.sharing.card import SMPO_CITATION, compose, table
from smpo_pipeline.sharing.contents import Contents

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def dataset_card(contents: Contents, name: str, license_: str) -> str:
    """Describe a data set.

    Args:
        contents: what is in it.
        name: ``OWNER/NAME``.
        license_: of the data, an identifier of the hub.
    """
    data = DatasetCardData(
        license=license_,
        task_categories=["text-to-image"],
        tags=["smpo-diffusion", "preference", contents.kind.replace(" ", "-")],
        size_categories=[next((size for limit, size in _SIZES if contents.pairs < limit), "n>1M")],
        configs=[{"config_name": "default", "data_files": contents.data_files}],
    )
    usage = contents.usage.replace("DATA", f"hf://datasets/{name}")
    introduction = f"{contents.introduction} Made by smpo-diffusion {version('smpo-diffusion')} ({contents.kind})."
    sections = {
        "Use": f"```bash\n{usage}\n```",
        "Content": table(("", ""), contents.facts),
        "License": f"`{license_}`",
        "Citation": SMPO_CITATION if contents.kind == "training states" else "",
    }
    return compose(data, name.rpartition("/")[2], introduction, sections)
