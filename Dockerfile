# syntax=docker/dockerfile:1
FROM python:3.11-slim-bookworm AS build
# Where the CPU build of torch comes from. Empty: from where pip's own settings say, which may be a build with CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Anything: torch comes with CUDA, from the index that TORCH_INDEX then has to name, and with what torch.compile needs.
ARG GPU=
# Extras of pyproject.toml, for model stores by URL: s3, gcs, hub, http; for photos of phones: heif; for gRPC: grpc; with commas.
ARG EXTRAS=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
# The largest layer first: it changes only with its pin.
COPY constraints.txt ./
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+--index-url $TORCH_INDEX} torch
COPY pyproject.toml README.md LICENSE ./
# The dependencies without the source, so that a change of the source does not fetch them again. Nothing of that build
# may stay: its empty files are newer than the source's, and setuptools would keep them.
RUN mkdir app cli pvt_client service && touch app/__init__.py cli/__init__.py pvt_client/__init__.py service/__init__.py \
    && pip install --constraint constraints.txt ".${EXTRAS:+[$EXTRAS]}" && pip uninstall --yes pvt-serve && rm -rf build *.egg-info
COPY app app
COPY cli cli
COPY pvt_client pvt_client
COPY service service
# What serving never reads: torch's C++ tests and, unless it is to compile, headers, and pip itself.
RUN pip install --no-deps --constraint constraints.txt . \
    && rm -rf /opt/venv/lib/python3.*/site-packages/torch/test \
    && if [ -z "$GPU" ]; then rm -rf /opt/venv/lib/python3.*/site-packages/torch/include; fi \
    && pip uninstall --yes pip

FROM python:3.11-slim-bookworm
ARG GPU=
# Triton, which torch.compile makes kernels with, compiles a launcher for each.
RUN if [ -n "$GPU" ]; then apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*; fi
COPY --from=build /opt/venv /opt/venv
COPY model_store /srv/model_store
# For SageMaker, which runs the image as `docker run IMAGE serve`.
COPY deploy/serve /usr/local/bin/serve
# Measured batch plans and compiled graphs, and copies out of a store by URL: volumes there let the next container start
# without measuring and fetching.
# Any user of the group 0 may write there: OpenShift gives each project a user id of its own. So it may to the model
# store: a volume that is mounted there gets its contents and permissions, and `pvt-serve pull` puts models into it.
RUN useradd --system --uid 10001 --gid 0 --no-create-home pvt \
    && chown --recursive 10001:0 /srv/model_store && chmod --recursive u+w,g=u /srv/model_store \
    && install --directory --owner 10001 --group 0 --mode 770 /var/cache/pvt-serve /var/cache/pvt-serve-stores
# By number, so that Kubernetes' runAsNonRoot can tell that it is not root.
USER 10001:0
WORKDIR /srv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PVT_HOST=0.0.0.0 PVT_PORT=8000 PVT_MODEL_STORE=/srv/model_store \
    PVT_CACHE_DIR=/var/cache/pvt-serve PVT_STORE_CACHE_DIR=/var/cache/pvt-serve-stores
# An image that lacks a part of ours does not come to be.
RUN pvt-serve --version && pvt-serve ls --all
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-m", "app.healthcheck"]
CMD ["python", "-m", "app"]
