# The embedded engine on the CPU:     docker build -t trimtab .
# The embedded engine on CUDA:        docker build -t trimtab --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
# With vLLM (a CUDA machine):         docker build -t trimtab --build-arg VLLM=1 .
FROM node:22.21.1-bookworm-slim AS console

WORKDIR /src
COPY clients/typescript clients/typescript
COPY clients/web clients/web
COPY docs/openapi.json docs/
RUN npm ci --prefix clients/typescript && npm ci --prefix clients/web && npm run build --prefix clients/web

FROM python:3.11.14-slim-bookworm AS build

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG VLLM=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1

WORKDIR /src
RUN python -m venv /opt/trimtab
COPY constraints.txt requirements.lock ./
COPY scripts/install_torch.sh scripts/
# Before the sources, so that a change of them installs nothing of this again. Every file is held to its hash. vLLM brings
# the CUDA build of the same torch with it.
RUN if [ -z "$VLLM" ]; then scripts/install_torch.sh /opt/trimtab/bin/python "$TORCH_INDEX" \
    && /opt/trimtab/bin/pip install --no-deps --require-hashes -r requirements.lock; fi
COPY . .
COPY --from=console /src/clients/web/dist clients/web/dist
RUN /opt/trimtab/bin/pip install -c constraints.txt ./clients/python ".[plots,probes,postgresql,s3,otel${VLLM:+,vllm}]" \
    && /opt/trimtab/bin/pip check

FROM python:3.11.14-slim-bookworm

RUN useradd --system --user-group --uid 10001 --create-home --home-dir /home/trimtab trimtab \
    && install -d -o 10001 -g trimtab /data
COPY --from=build /opt/trimtab /opt/trimtab
ENV PATH=/opt/trimtab/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    TRIMTAB_DATA_DIR=/data \
    TRIMTAB_LOG_FORMAT=json \
    TRIMTAB_MODEL=lab-dense \
    TRIMTAB_HOST=0.0.0.0 \
    TRIMTAB_PORT=8000

USER 10001:10001
WORKDIR /home/trimtab
VOLUME /data
EXPOSE 8000
# Liveness: an engine that restarts itself is left alone, one that only a new process helps is unhealthy. A model may take
# minutes to load. Readiness, for balancers, is /health/ready.
HEALTHCHECK --interval=15s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"TRIMTAB_PORT\"]}/health/live', timeout=4)"]
# Reachable from outside the container, so it refuses to start without TRIMTAB_API_KEY.
ENTRYPOINT ["trimtab"]
CMD ["serve"]
