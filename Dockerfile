# syntax=docker/dockerfile:1
# The generation service and the miner, from the same locks as ./deploy_competitive.sh. Targets: generation-cpu,
# generation-cuda, cluster, miner. compose.yaml builds and starts them; docs/DEPLOYMENT_GUIDE.md tells how.

FROM python:3.12-slim-bookworm AS base
ARG UID=1000
# Not root. Give the UID of the user who owns the wallet's files: --build-arg UID=$(id -u)
RUN useradd --uid ${UID} --create-home miner && mkdir -p /app /weights && chown miner /app /weights
USER miner
WORKDIR /app
ENV PYTHONUNBUFFERED=1 HF_HOME=/weights UV_LINK_MODE=copy UV_CACHE_DIR=/tmp/uv
COPY --chown=miner pyproject.toml constraints.txt README.md ./
COPY --chown=miner requirements requirements
COPY --chown=miner scripts scripts
COPY --chown=miner common common
COPY --chown=miner generation/__init__.py generation/__init__.py
COPY --chown=miner neurons/__init__.py neurons/__init__.py

FROM base AS generation-cpu
RUN --mount=type=secret,id=pip,target=/etc/pip.conf scripts/install.sh service && rm -rf /tmp/uv
COPY --chown=miner . .
RUN mkdir -p data logs run .cache/compiled
EXPOSE 10006
ENV COMPETITIVE_SERVICE_HOST=0.0.0.0
HEALTHCHECK --interval=10s --timeout=11s --start-period=30m --start-interval=5s --retries=3 \
    CMD [".venv/bin/python", "scripts/ops/probe.py", "service", "http://127.0.0.1:10006"]
CMD [".venv/bin/python", "scripts/ops/serve.py", "generation_service"]

FROM generation-cpu AS generation-cuda
# g++ compiles gsplat here, and torch.compile's code at run time.
USER root
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
USER miner
# Compute capabilities of your cards: 8.0 A100, 8.6 RTX 30 and A40, 8.9 RTX 40 and L40, 9.0 H100 and H200, 12.0 RTX 50
ARG CUDA_ARCHITECTURES="8.6 8.9 9.0"
RUN --mount=type=secret,id=pip,target=/etc/pip.conf scripts/install.sh service gpu && rm -rf /tmp/uv
RUN .venv/bin/python -m scripts.ops.build_gsplat --arch ${CUDA_ARCHITECTURES}

FROM generation-cuda AS cluster
# For configs/raycluster.yaml: Kubernetes starts Ray by its name, and the engines where Ray is.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf scripts/install.sh service gpu cluster && rm -rf /tmp/uv
ENV PATH=/app/.venv/bin:$PATH

FROM base AS miner
RUN --mount=type=secret,id=pip,target=/etc/pip.conf scripts/install.sh miner && rm -rf /tmp/uv
COPY --chown=miner . .
RUN mkdir -p data logs run
HEALTHCHECK --interval=30s --timeout=5s --start-period=5m --retries=3 \
    CMD [".venv/bin/python", "scripts/ops/probe.py", "miner", "run/miner.status"]
CMD [".venv/bin/python", "scripts/ops/serve.py", "miner"]
