"""What the server says of a run: requests, batch sizes and queue times from Triton's Prometheus page."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from http.client import HTTPException
from urllib.error import URLError
from urllib.request import urlopen

_LINE = re.compile(r"^(nv_inference_\w+)\{([^}]*)\} (-?\d+(?:\.\d+)?(?:e[+-]?\d{1,2})?)$")
_MODEL = re.compile(r'model="([^"]+)"')
MAX_PAGE_BYTES = 16 << 20
_WANTED = {
    "nv_inference_request_success", "nv_inference_request_failure", "nv_inference_count", "nv_inference_exec_count",
    "nv_inference_request_duration_us", "nv_inference_queue_duration_us", "nv_inference_compute_infer_duration_us",
}  # fmt: skip


@dataclass
class ServerMetrics:
    """Counters per model, as scraped; `reason` says why there are none."""

    counters: dict[str, dict[str, float]]
    reason: str = ""


def scrape(url: str, timeout_s: float = 3.0) -> ServerMetrics:
    """Read url/metrics; http is meant without a scheme. An unreachable page is no failure of the load test: it is said
    in the result."""
    url = url.removesuffix("/").removesuffix("/metrics")
    try:
        with urlopen(f"{url if '://' in url else f'http://{url}'}/metrics", timeout=timeout_s) as answer:
            page = answer.read(MAX_PAGE_BYTES).decode("utf-8", "replace")
    except (URLError, OSError, HTTPException, ValueError) as problem:  # HTTPException: the answer was cut off
        return ServerMetrics({}, f"{url}/metrics cannot be read: {problem}")
    counters: dict[str, dict[str, float]] = {}
    for line in page.splitlines():
        found = _LINE.match(line)
        if found and found[1] in _WANTED and (model := _MODEL.search(found[2])):
            model_counters = counters.setdefault(model[1], {})
            model_counters[found[1]] = model_counters.get(found[1], 0.0) + float(found[3])
    return ServerMetrics(counters)


def settled(url: str, timeout_s: float = 3.0) -> ServerMetrics:
    """scrape() once two looks at the page agree, or timeout_s is over: Triton counts a request after its answer."""
    end = time.monotonic() + timeout_s
    found = scrape(url)
    while not found.reason and time.monotonic() < end:
        time.sleep(0.25)
        before, found = found, scrape(url)
        if found == before:
            break
    return found


def difference(before: ServerMetrics, after: ServerMetrics) -> dict:
    """Per model what happened between two scrapes: requests, failures, mean batch and mean times in milliseconds."""
    if before.reason or after.reason:
        return {"unavailable": before.reason or after.reason}
    models = {}
    for model, counters in after.counters.items():
        old = before.counters.get(model, {})
        moved = {name: value - old.get(name, 0.0) for name, value in counters.items()}
        requests = moved.get("nv_inference_request_success", 0.0)
        if requests <= 0 and moved.get("nv_inference_request_failure", 0.0) <= 0:
            continue
        executions = moved.get("nv_inference_exec_count", 0.0)

        def per_request(name: str, moved=moved, requests=requests) -> float | None:
            return moved[name] / requests / 1000.0 if requests > 0 and name in moved else None

        models[model] = {
            "requests": int(requests),
            "failures": int(moved.get("nv_inference_request_failure", 0.0)),
            "mean_batch": moved.get("nv_inference_count", 0.0) / executions if executions else None,
            "request_ms": per_request("nv_inference_request_duration_us"),
            "queue_ms": per_request("nv_inference_queue_duration_us"),
            "compute_ms": per_request("nv_inference_compute_infer_duration_us"),
        }
    return models
