# The trainer alone: no Ray, no reward models. Build from the repository's root:
#   docker build -f docker/trainer.Dockerfile -t smpo-train .
#   docker run --gpus all --ipc=host -v DATA:/data smpo-train --shards /data/shards --model MODEL --out /data/run
#
# torch's wheels carry the CUDA runtime themselves; a CUDA base image would hold a second one. The container toolkit
# mounts the driver, which is what the two NVIDIA variables ask for.
FROM python:3.11-slim-bookworm

ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

# The compiler is for `--compile`: Triton builds its launcher, and Inductor what runs on the CPU, when training begins.
# Versions of the base image's Debian; pinned ones vanish from its mirrors with the next update.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 smpo

# What changes rarely comes first: gigabytes of torch stay one layer, however often the code below changes.
WORKDIR /opt/smpo
COPY constraints.txt ./
RUN pip install -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY common common
COPY schemas schemas
COPY models models
COPY pipeline pipeline
COPY trainer trainer
RUN pip install -c constraints.txt '.[s3]'

# By number, or `runAsNonRoot` cannot tell that it is not root.
USER 1000
WORKDIR /home/smpo

ENTRYPOINT ["smpo-train"]
CMD ["--help"]
