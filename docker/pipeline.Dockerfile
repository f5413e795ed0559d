# Stages 1, 2 and 4 on Ray, for the head and for workers alike. Build from the repository's root:
#   docker build -f docker/pipeline.Dockerfile -t smpo-pipeline .
#   docker run --gpus all --shm-size 16g -v DATA:/data smpo-pipeline smpo-pipeline score --pairs /data/pairs ...
#
# torch's wheels carry the CUDA runtime themselves; a CUDA base image would hold a second one. The container toolkit
# mounts the driver, which is what the two NVIDIA variables ask for. The extra `imagereward` is left out: it builds
# fairscale from source; where you need it, add a stage with a compiler that runs `pip wheel fairscale`.
# `cluster` is Ray's dashboard and autoscaler: KubeRay submits jobs through the one and runs the other.
FROM python:3.11-slim-bookworm

ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

# KubeRay up to 1.5 asks after a node's health by wget.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends wget && rm -rf /var/lib/apt/lists/* \
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
RUN pip install -c constraints.txt '.[pipeline,cluster,s3]'

# By number, or `runAsNonRoot` cannot tell that it is not root.
USER 1000
WORKDIR /home/smpo

# Ray's own commands and ours; a cluster's operator gives the one that it needs.
CMD ["smpo-pipeline", "--help"]
