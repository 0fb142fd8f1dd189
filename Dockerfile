# The service on an NVIDIA GPU: docker build -t dreammix . (docs/deploy.md runs it). The driver is the host's.
FROM python:3.12-slim-bookworm AS wheel
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml build_backend.py dev.py CMakeLists.txt README.md LICENSE NOTICE ./
COPY cpp_ext cpp_ext
COPY core core
COPY engine engine
COPY export export
COPY trainer trainer
COPY evaluation evaluation
COPY service service
COPY dreammix_trt dreammix_trt
RUN pip wheel . --no-cache-dir --no-deps -w /wheels -C cmake.define.DREAMMIX_CUDA=ON
COPY constraints.txt /wheels/

FROM python:3.12-slim-bookworm
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir -c /wheels/constraints.txt "$(ls /wheels/*.whl)[serve,rtx,cuda]"
RUN useradd --system --uid 10001 --home-dir /var/lib/dreammix --create-home dreammix
ENV PYTHONUNBUFFERED=1 DREAMMIX_HOME=/var/lib/dreammix \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=180s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["dreammix-trt", "serve", "--host", "0.0.0.0"]
CMD ["/engine", "--device", "cuda"]
