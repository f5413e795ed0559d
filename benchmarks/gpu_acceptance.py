r"""Check on one GPU, in one run of nine minutes, that numbers are right and rates are as expected.

    python -m benchmarks.gpu_acceptance --out DIR [--budget 510]
    python -m benchmarks.gpu_acceptance --out DIR --device cpu --shape tiny

For one GPU of 80 GB (H100 class) without any data. The script makes its inputs: random models of the published shapes,
pairs of JPEGs, shards. Each check has its own budget and alarm; a check that raises or exceeds its budget is a row
"failed: ...", and the next one runs. --out receives, after each check, results.jsonl (a line per check), table.md,
profile.txt and the metrics of two runs.

`--device cpu --shape tiny` runs the same code with models that are an eighth as wide. What a CPU cannot show is "not
judged", and table.md lists the lines that only a GPU runs.

On a machine without network that has torch, transformers, accelerate and peft, bring the other packages as wheels, made
elsewhere for its version of Python, and run it beside them. A missing package is named at the start.

    pip download -c constraints.txt --no-deps --only-binary :all: --python-version 3.12 -d wheels \
      diffusers webdataset braceexpand importlib_metadata zipp pydantic pydantic_core annotated_types \
      typing_inspection typing_extensions ftfy wcwidth pyarrow tensorboard tenacity bitsandbytes
    python3 -m pip install --no-index --no-deps --upgrade --target site wheels/*.whl
    python3 -m pip install --no-index --no-deps --no-build-isolation --target site .
    HF_HUB_OFFLINE=1 PYTHONPATH=site timeout 525 python3 -m benchmarks.gpu_acceptance --out gpu-acceptance
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.acceptance.ray_stubs import install_ray_stubs


def main() -> int:
    """Run all checks; returns 1 where one failed."""
    began = time.monotonic()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for what is found")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--shape", default="full", choices=("full", "tiny"), help="size of models and data")
    parser.add_argument("--budget", type=float, default=510.0, help="seconds; the checks' own budgets are parts of it")
    parser.add_argument("--work", type=Path, help="folder for models and runs, about 50 GB; default: a temporary one")
    arguments = parser.parse_args()
    import torch  # noqa: PLC0415  (the budget counts its seconds)

    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no GPU here")
    stubbed = install_ray_stubs()
    from benchmarks.acceptance.checks.order import make_checks  # noqa: PLC0415  (imports all of the project, and with it Ray)
    from benchmarks.acceptance.device import DEVICES  # noqa: PLC0415
    from benchmarks.acceptance.runner import run_checks  # noqa: PLC0415
    from benchmarks.acceptance.world import SIZES, World  # noqa: PLC0415

    arguments.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="acceptance-", dir=arguments.work))
    try:
        world = World(DEVICES[arguments.device](), SIZES[arguments.shape], work, arguments.out)
        world.notes["ray is stubbed"] = stubbed
        checks = make_checks(began)
        rows = run_checks(checks, world, arguments.out, arguments.budget, began)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print((arguments.out / "table.md").read_text(encoding="utf-8"))
    return int(any(row["verdict"].startswith(("FAIL", "failed")) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
