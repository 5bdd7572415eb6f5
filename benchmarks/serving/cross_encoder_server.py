"""sentence-transformers' CrossEncoder behind FastAPI, the first server that most teams write; for systems_compared.py.

python benchmarks/serving/cross_encoder_server.py CHECKPOINT float32|bfloat16 PORT torch|openvino

openvino is sentence-transformers' own backend by optimum-intel, which exports the checkpoint as it loads.
"""

import sys
import threading

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import CrossEncoder

checkpoint, dtype, port, backend = sys.argv[1:]
torch.set_num_threads(torch.get_num_threads())
if backend == "openvino":
    precision = {"float32": "f32", "bfloat16": "bf16"}[dtype]  # without it, OpenVINO takes bf16 where it can
    settings = {"ov_config": {"INFERENCE_PRECISION_HINT": precision}}
else:
    settings = {"dtype": getattr(torch, dtype)}
model = CrossEncoder(
    checkpoint, device="cpu", activation_fn=torch.nn.Identity(), backend=backend, model_kwargs=settings
)
one_at_a_time = threading.Lock()  # without it FastAPI's threads fight over the cores, and it gets slower
app = FastAPI()


class Request(BaseModel):
    """A query and its documents, each title and summary in one string."""

    query: str
    documents: list[str]


@app.post("/rerank")
def rerank(request: Request) -> list[float]:
    """Raw logits in document order."""
    with one_at_a_time, torch.inference_mode():
        pairs = [(request.query, document) for document in request.documents]
        return model.predict(pairs, batch_size=32, show_progress_bar=False, convert_to_tensor=True).float().tolist()


@app.get("/health")
def health() -> str:
    """Answers once the model is loaded."""
    return "ok"


uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning")
