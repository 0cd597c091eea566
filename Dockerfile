# everymask with Ray, for NVIDIA GPUs or for CPUs:
#
#   docker build --tag everymask:cuda .
#   docker build --tag everymask:cpu --build-arg TORCH_INDEX=URL .
#   docker run --rm --shm-size 1g --volume "$PWD:/data" everymask:cuda --images /data/photos --output /data/out
#
# URL is an index with PyTorch's wheels for CPUs: pytorch.org says which is its own. The image without it also runs on
# CPUs, and is some gigabytes larger.
#
# The container's user is number 1000, for whom /data must be writable there. With GPUs add `--gpus all`.
# What `docker run` gets after the image's name are flags of `jobs.generate_masks`. KubeRay, which starts a cluster of
# this image, puts Ray's commands in the entrypoint's place.
#
# There is no CUDA in the base image, because PyTorch's wheels bring their own; the host needs NVIDIA's driver and its
# container toolkit.

ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm

# An index with PyTorch's wheels for CPUs; without it they are those with CUDA.
ARG TORCH_INDEX=
# Of the extras in the README, those that are installed.
ARG EXTRAS=s3,gcs,azure,heif
# 1 puts MobileSAM's published weights into the image, so that containers need no network for them.
ARG WEIGHTS=0

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# What KubeRay runs in the containers: wget looks whether Ray is well, pkill tells workers to go. Triton's kernels need a
# C compiler where they run.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libc6-dev procps wget \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 everymask
WORKDIR /home/everymask/project

COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY schemas schemas
COPY pipeline pipeline
COPY jobs jobs
RUN if [ -n "$TORCH_INDEX" ]; then export PIP_EXTRA_INDEX_URL="$TORCH_INDEX"; fi \
    && pip install --no-cache-dir --constraint constraints.txt ".[$EXTRAS]"

USER 1000
ENV EVERYMASK_CACHE=/home/everymask/.cache/everymask \
    RAY_USAGE_STATS_ENABLED=0
RUN if [ "$WEIGHTS" = 1 ]; then \
        python -c "from pipeline.model import load_model; load_model('mobile_sam', 'cpu')"; \
    fi

ENTRYPOINT ["python", "-m", "jobs.generate_masks"]
CMD ["--help"]
