# Where build/finish_engine.py runs. Triton's image has TensorRT's library, but nothing says that it has its Python module,
# so the engine is built in the TensorRT container of the same release; the version that the server loads is noted beside
# it, and finish_engine refuses to build with another one. Not built here yet: no GPU and no container was at hand.
ARG TRITON_IMAGE
ARG TENSORRT_IMAGE
FROM ${TRITON_IMAGE} AS serving
RUN find / -xdev -name "libnvinfer.so.*.*.*" -printf "%f\n" | sort -u > /serving-tensorrt
FROM ${TENSORRT_IMAGE}
COPY --from=serving /serving-tensorrt /etc/serving-tensorrt
ENV SERVING_TENSORRT=/etc/serving-tensorrt
COPY constraints.txt /tmp/constraints.txt
# MORE_PACKAGES: for a TensorRT image without the Python module, its bindings of exactly the server's version
ARG MORE_PACKAGES=""
RUN pip install --no-cache-dir -c /tmp/constraints.txt \
    "numpy<2" tokenizers pyarrow "jsonargparse[signatures]" onnx onnxruntime polygraphy scipy ir-measures tqdm \
    "tritonclient[grpc,http]" ${MORE_PACKAGES}
RUN python3 -c "import importlib.util as u; assert u.find_spec('tensorrt'), 'no tensorrt module: see MORE_PACKAGES'"
