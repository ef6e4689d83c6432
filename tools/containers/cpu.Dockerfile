# qat-edge on a CPU: docker build --file tools/containers/cpu.Dockerfile --tag qat-edge .
FROM python:3.11.14-slim-bookworm
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/qat-edge
COPY . .
# The index of CPU builds of torch; the one of PyPI brings CUDA, some gigabytes.
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
        --constraint tools/lock/requirements.txt ".[executorch,gguf,hf,onnx]" \
    && useradd --uid 1000 --create-home engineer
# Models and settings of libraries are kept next to the runs, in the folder that is mounted.
ENV HF_HOME=/work/.cache/huggingface XDG_CACHE_HOME=/work/.cache
USER 1000
WORKDIR /work
ENTRYPOINT ["qat-edge"]
CMD ["--help"]
