# Triton with TensorRT, and what the front model and build/finish_engine.py need beside it.
ARG TRITON_IMAGE
FROM ${TRITON_IMAGE}
COPY constraints.txt /tmp/constraints.txt
RUN pip install --no-cache-dir -c /tmp/constraints.txt \
    "numpy<2" tokenizers pyarrow "jsonargparse[signatures]" onnx polygraphy scipy ir-measures tqdm "tritonclient[grpc,http]"
