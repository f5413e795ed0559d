"""HPSv3 by its authors' package, in an environment with the transformers that it pins, served to this environment."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest

from smpo_common.errors import UserError
from smpo_pipeline.rewards import load_reward
from tests.rewards.test_hpsv3 import PICTURES, PROMPTS
from tests.tiny.vision_language import make_tiny_hpsv3

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
PINS = ("hpsv3==1.0.0", "transformers==4.45.2", "tokenizers==0.20.3", "huggingface_hub==0.36.2", "accelerate==1.2.1")


def make_environment(folder: Path) -> Path:
    """Make an environment with those versions; what it lacks, such as torch, is that of this environment."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    install = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", *PINS)
    subprocess.run([python, *install], check=True)
    packages = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    here = sysconfig.get_path("purelib")
    Path(packages, "z_below.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    return python


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_the_package_gives_the_same_scores_over_http(tmp_path):
    python, folder, port = make_environment(tmp_path / "other"), make_tiny_hpsv3(tmp_path / "model"), free_port()
    paths = [path for path in sys.path if path.startswith(str(ROOT))]
    server = subprocess.Popen(
        [
            *(python, ROOT / "examples" / "reward_server.py", "--port", str(port)),
            f"tests.rewards.published_hpsv3:PublishedHpsV3={folder}",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*paths, str(ROOT)])},
        cwd=ROOT,
    )
    try:
        deadline, served = time.monotonic() + 300, None
        while served is None:
            assert server.poll() is None
            assert time.monotonic() < deadline
            try:
                served = load_reward(f"http=http://127.0.0.1:{port},name=published", "cpu")
            except UserError:
                time.sleep(1)
        assert served.fingerprint == "transformers 4.45.2"
        ours = load_reward(f"hpsv3={folder}", "cpu").score(PICTURES, PROMPTS)
        np.testing.assert_allclose(ours, served.score(PICTURES, PROMPTS), atol=1e-5)
        assert np.ptp(ours) > 0.05
    finally:
        server.terminate()
        server.wait()
