# Model server with vLLM: ModelDeployments with engine.type VLLM. From the repository's root, for CPU and for GPUs:
#   docker build -f trainer_image/vllm.Dockerfile -t tunesmith-vllm .
#   docker build -f trainer_image/vllm.Dockerfile -t tunesmith-vllm-gpu --build-arg LOCKS="-r /tmp/vllm-cuda.txt" .
# BASE_IMAGE may be any image with Python 3.11, libgomp, libnuma and lscpu; on GPUs with a C compiler, too, as Triton calls one.
ARG BASE_IMAGE=docker.io/library/python:3.11-bookworm

FROM ${BASE_IMAGE} AS packages
# PyPI's torch wants the NVIDIA libraries of cuda.txt, whatever vLLM computes on
ARG LOCKS="-r /tmp/vllm.txt -r /tmp/cuda.txt"
COPY requirements/vllm.txt requirements/vllm-cuda.txt requirements/cuda.txt /tmp/
RUN python3 -m pip install --no-cache-dir --no-deps --require-hashes --no-compile --target /packages ${LOCKS} \
    && { python3 -m compileall -q --invalidation-mode unchecked-hash /packages || true; }

FROM ${BASE_IMAGE}
# the root file system is read-only at run time: byte code is compiled here, everything written goes to /scratch
ENV PYTHONPATH=/opt/tunesmith/app:/opt/tunesmith/packages \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    HOME=/scratch USER=tunesmith TMPDIR=/scratch LANG=C.UTF-8
# on CPU vLLM's kernels want libnuma, and it asks lscpu for the cores; a base without apt brings both itself
RUN if command -v apt-get >/dev/null; then \
        apt-get update && apt-get install -y --no-install-recommends libnuma1 util-linux && rm -rf /var/lib/apt/lists/*; fi
COPY --from=packages /packages /opt/tunesmith/packages
COPY crds/tunesmith_api /opt/tunesmith/app/tunesmith_api
COPY trainer_image/tunesmith_store /opt/tunesmith/app/tunesmith_store
COPY trainer_image/tunesmith_server /opt/tunesmith/app/tunesmith_server
RUN python3 -m compileall -q --invalidation-mode unchecked-hash /opt/tunesmith/app
USER 65532:65532
WORKDIR /scratch
ENTRYPOINT ["python3", "-m"]
CMD ["tunesmith_server"]
