"""Serve a reward from an environment of its own, for `--reward http=http://127.0.0.1:9000`.

python examples/reward_server.py pickscore --device cuda --port 9000
"""

import argparse
import base64
import io
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

from smpo_pipeline.rewards import Reward, load_reward


class Handler(BaseHTTPRequestHandler):
    """Answers a POST of images with their scores, and a GET with the fingerprint of the weights."""

    protocol_version = "HTTP/1.1"
    reward: Reward
    lock = threading.Lock()

    def do_GET(self) -> None:
        self.reply(200, {"fingerprint": self.reward.fingerprint})

    def do_POST(self) -> None:
        try:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            files = [io.BytesIO(base64.b64decode(image)) for image in request["images"]]
            images = [Image.open(file, formats=["PNG"]).convert("RGB") for file in files]
            with self.lock:
                scores = self.reward.score(images, request["prompts"]).tolist()
            self.reply(200, {"scores": [score if math.isfinite(score) else None for score in scores]})
        except Exception as error:  # noqa: BLE001  (the client reports it, and rejects the image that causes it)
            self.reply(500, {"error": f"{type(error).__name__}: {error}"})

    def reply(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("reward", help="NAME, NAME=MODEL or MODULE:CLASS, as for --reward")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9000)
    arguments = parser.parse_args()
    Handler.reward = load_reward(arguments.reward, arguments.device)
    ThreadingHTTPServer((arguments.host, arguments.port), Handler).serve_forever()
