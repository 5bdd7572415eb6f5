# The A/B router: a light image without torch. It runs without root, writes to the log folder alone, and needs no other
# writable place (compose.yaml gives it the account that owns the log folder).
FROM python:3.11-slim
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY ranking ranking
COPY clients clients
COPY training/__init__.py training/__init__.py
COPY build/__init__.py build/__init__.py
COPY serving/__init__.py serving/__init__.py
COPY loadtest/__init__.py loadtest/__init__.py
COPY demo/__init__.py demo/__init__.py
COPY benchmarks/__init__.py benchmarks/__init__.py
COPY disranker disranker
COPY docs/architecture.md docs/architecture.md
RUN pip install --no-cache-dir -c constraints.txt ".[clients,tracing]"
USER 65534:65534
ENTRYPOINT ["python", "clients/ab_router.py"]
