"""Score images that another program hands over: ``python -m smpo_pipeline.score_images REWARD DEVICE|check``.

smpo-train starts it for ``--validation-reward``, so that training needs no reward model in its own process. Standard
input has one JSON object per image: ``prompt``, and ``png``, the file in base64. The last line of standard output is a
JSON list of their raw scores, null where an image has none. ``check`` in place of the device reads no images, and
checks the form of REWARD. An error is one line on standard error, with status 2.
"""

from __future__ import annotations

import base64
import io
import json
import math
import sys
from collections.abc import Iterable

from PIL import Image

from smpo_common.errors import UserError
from smpo_pipeline.rewards import check_reward, checked_scores, load_reward


def score_lines(spec: str, device: str, lines: Iterable[str]) -> list[float | None]:
    """Score the images of the lines, see the module's docstring.

    Raises:
        UserError: the reward cannot be loaded, or fails.
    """
    items = [json.loads(line) for line in lines]
    images = [Image.open(io.BytesIO(base64.b64decode(item["png"]))).convert("RGB") for item in items]
    prompts = [item["prompt"] for item in items]
    reward, scores = load_reward(spec, device), []
    size = reward.needs.batch_size
    for start in range(0, len(items), size):
        batch = slice(start, start + size)
        scores += checked_scores(reward, images[batch], prompts[batch]).values.tolist()
    return [score if math.isfinite(score) else None for score in scores]


def main() -> int:
    """Run the program; returns its exit status."""
    spec, device = sys.argv[1:]
    try:
        scores = [] if check_reward(spec) and device == "check" else score_lines(spec, device, sys.stdin)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"\n{json.dumps(scores)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
