"""A server of Triton's gRPC protocol whose models give each document its number as score, and a TCP proxy before it."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter

import grpc
import numpy as np
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

# an experiment file of two arms, with one user who is always given the student
EXPERIMENT = """
default_model: baseline
experiments:
  - name: exp
    arms: [{name: baseline, model: baseline}, {name: student, model: student}]
    forced: {tester: student}
"""


class _Background:
    """An event loop in a thread, for a server beside a test."""

    def __enter__(self):
        self.loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(60)
        return self

    def __exit__(self, *problem) -> None:
        self.loop.call_soon_threadsafe(self._end.set)
        self._thread.join(60)

    def _run(self, started: threading.Event) -> None:
        async def serve() -> None:
            self._end = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                serving = group.create_task(self.serve(started))
                await self._end.wait()
                serving.cancel()
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

        self.loop.run_until_complete(serve())


class StubRanker(_Background, service_pb2_grpc.GRPCInferenceServiceServicer):
    """max_documents: what the models' configuration says; a page whose query is `refuse me` is a caller's fault.

    max_chunks: the same, of the students alone, which then take an input of that name; chunks: what it said, by call;
    url: where it answers; asked: calls by model; timeouts: the requests' own, in microseconds.
    """

    def __init__(self, max_documents: int | None = None, max_chunks: int | None = None):
        self.max_documents, self.max_chunks, self.url = max_documents, max_chunks, ""
        self.chunks: list[tuple[str, int | None]] = []
        self.asked: Counter[str] = Counter()
        self.timeouts: list[int] = []

    async def serve(self, started: threading.Event) -> None:
        server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, server)
        self.url = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await server.stop(0)

    async def ModelInfer(self, request, context):
        self.asked[request.model_name] += 1
        self.timeouts.append(request.parameters["timeout"].int64_param)
        inputs = {tensor.name: raw for tensor, raw in zip(request.inputs, request.raw_input_contents)}
        wanted = int.from_bytes(inputs["max_chunks"], "little") if "max_chunks" in inputs else None
        self.chunks.append((request.model_name, wanted))
        if b"refuse me" in request.raw_input_contents[0]:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "this page is wrong")
        count = next(tensor.shape[0] for tensor in request.inputs if tensor.name == "title")
        answer = service_pb2.ModelInferResponse(model_name=request.model_name, model_version="1")
        answer.outputs.add(name="score", datatype="FP32", shape=[count])
        answer.raw_output_contents.append(np.arange(count, dtype=np.float32).tobytes())
        return answer

    async def ModelConfig(self, request, context):
        config = model_config_pb2.ModelConfig(name=request.name)
        if self.max_documents is not None:
            config.parameters["max_documents"].string_value = str(self.max_documents)
        if self.max_chunks is not None and request.name == "student":
            config.parameters["max_chunks"].string_value = str(self.max_chunks)
        return service_pb2.ModelConfigResponse(config=config)


class TcpProxy(_Background):
    """Forwards connections to `target`. freeze(): those that are open go silent for ever, without being closed.

    connections: how many were opened.
    """

    def __init__(self, target: str):
        self.lead_to(target)
        self.url, self.connections = "", 0
        self._frozen: set[int] = set()

    def lead_to(self, target: str) -> None:
        """New connections go to another address."""
        self._host, port = target.split(":")
        self._port = int(port)

    def freeze(self) -> None:
        self._frozen = set(range(self.connections + 1))

    async def serve(self, started: threading.Event) -> None:
        server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        self.url = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        started.set()
        await asyncio.Event().wait()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        try:
            back_reader, back_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:  # nobody is there now
            writer.close()
            return
        await asyncio.gather(
            self._copy(number, reader, back_writer), self._copy(number, back_reader, writer), return_exceptions=True
        )

    async def _copy(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                if number not in self._frozen:
                    writer.write(data)
                    await writer.drain()
        finally:
            writer.close()
