# fedmom's image: the dependencies that the server and the clients need, pinned by constraints.txt, and what keeps them warm.
# The app itself (fedmom, strategies, clients) is not in it: Flower delivers it with every run, so that all nodes run the
# same code, and an image lasts until a dependency changes.
#
#   docker build -t fedmom .                                                                  # CPU
#   docker build -t fedmom:gpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .   # CUDA 13, linux/amd64
ARG BASE=python:3.11-slim-bookworm
# An image of .whl files that win over the index; scratch has none.
ARG WHEELS_IMAGE=scratch
# hadolint ignore=DL3006
FROM ${WHEELS_IMAGE} AS wheels

# hadolint ignore=DL3006
FROM ${BASE} AS build
# Where torch comes from besides PyPI: a version with a local part (+cpu, +cu130) wins over the plain one.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Another version than the one in constraints.txt, as a requirement (torch==…).
ARG TORCH=torch
# What a user's own code needs besides, as requirements with spaces between them.
ARG PACKAGES=
WORKDIR /build
COPY constraints.txt deploy/requirements.txt ./
RUN python3 -m venv /opt/venv
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,from=wheels,target=/wheels \
    if [ "${TORCH}" != torch ]; then sed -i '/^torch==/d' constraints.txt; fi && \
    /opt/venv/bin/pip install --disable-pip-version-check --find-links /wheels \
        ${TORCH_INDEX:+--extra-index-url ${TORCH_INDEX}} --constraint constraints.txt "${TORCH}" ${PACKAGES} \
        --requirement requirements.txt && \
    rm -rf /opt/venv/lib/python3*/site-packages/torch/include /opt/venv/lib/python3*/site-packages/torch/test \
        /opt/venv/lib/python3*/site-packages/pip* && \
    find /opt/venv/lib/python3*/site-packages/torch/bin -type f ! -name torch_shm_manager -delete && \
    find /opt/venv -type d -name tests -path '*/site-packages/*' -prune -exec rm -rf {} + && \
    /opt/venv/bin/python -c "import flwr.supernode.cli.flwr_clientapp, networkx, safetensors.torch, torch"

# hadolint ignore=DL3006
FROM ${BASE}
# nginx for the gate (deploy/image/gate.conf). Its version is the distribution's, for the sake of its security updates.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends nginx && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin fedmom && \
    install -d -m 1777 /state /runs && install -d /data
COPY --from=build /opt/venv /opt/venv
# Modes and the link are made here: a checkout on Windows has neither.
COPY --chmod=755 deploy/image /opt/fedmom
RUN ln -s flwr-clientapp /opt/fedmom/bin/flwr-serverapp
# HOME and FLWR_HOME lie on the tmpfs that is all a container may write to besides its volumes. Threads that wait for
# one another do not spin: with several clients on a machine they would take one another's cores.
ENV PATH=/opt/fedmom/bin:/opt/venv/bin:$PATH \
    HOME=/tmp \
    FLWR_HOME=/tmp/flwr \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 \
    OMP_WAIT_POLICY=PASSIVE \
    FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.25 \
    PYTHONUNBUFFERED=1
WORKDIR /tmp
USER 10001:10001
# $HEALTH is what must hold (deploy/image/health.py); compose sets it.
HEALTHCHECK --interval=5s --timeout=10s --start-period=120s --retries=3 CMD ["python3", "-ISS", "/opt/fedmom/health.py"]
CMD ["flower-superlink", "--help"]
