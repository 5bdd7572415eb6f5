# Triton with TensorRT, and what the front model needs beside it: text format and card reader lie in the version folder.
ARG TRITON_IMAGE
FROM ${TRITON_IMAGE}
COPY constraints.txt /tmp/constraints.txt
RUN pip install --no-cache-dir -c /tmp/constraints.txt "numpy<2" tokenizers \
    opentelemetry-sdk opentelemetry-exporter-otlp-proto-http
