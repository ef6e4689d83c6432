# qat-edge on NVIDIA GPUs: docker build --file tools/containers/cuda.Dockerfile --tag qat-edge:cuda .
# PyPI's torch brings the libraries of CUDA itself; the host needs a driver and the NVIDIA Container Toolkit alone.
FROM python:3.11.14-slim-bookworm
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/qat-edge
COPY . .
RUN pip install --no-cache-dir --constraint tools/lock/requirements.txt ".[executorch,gguf,hf,onnx]" \
    && useradd --uid 1000 --create-home engineer
# Models and settings of libraries are kept next to the runs, in the folder that is mounted.
ENV HF_HOME=/work/.cache/huggingface XDG_CACHE_HOME=/work/.cache
USER 1000
WORKDIR /work
ENTRYPOINT ["qat-edge"]
CMD ["--help"]
