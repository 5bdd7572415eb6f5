"""A gRPC proxy that fails on purpose, to stand between a labeller and its server."""

from __future__ import annotations

import asyncio
import random
import threading

import grpc
from tritonclient.grpc import service_pb2 as pb


class FaultyProxy:
    """Between labeller and server: 10% of the answers become errors, 5% come 0.3 s late, about 1% end the stream.

    one_prompt: the models' configurations say that a request carries one prompt.
    """

    def __init__(self, target: str, one_prompt: bool = False):
        self.one_prompt = one_prompt
        self.target, self.errors, self.drops, self.url = target, 0, 0, ""
        self._draw, self._started = random.Random(3), threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        assert self._started.wait(60)
        return self

    def __exit__(self, *exc) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(60)

    async def _serve(self) -> None:
        self._end = asyncio.Event()
        async with grpc.aio.insecure_channel(self.target) as self._channel:
            server = grpc.aio.server()
            server.add_generic_rpc_handlers((_Forward(self),))
            self.url = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            await server.start()
            self._started.set()
            await self._end.wait()
            await server.stop(0)

    async def unary(self, method: str, request: bytes) -> bytes:
        answer = await self._channel.unary_unary(method)(request)
        if not (self.one_prompt and method.endswith("/ModelConfig")):
            return answer
        config = pb.ModelConfigResponse.FromString(answer)
        for tensor in config.config.input:
            if tensor.name == "text_input":
                tensor.dims[:] = [1]
        return config.SerializeToString()

    async def stream(self, method: str, requests, context) -> None:
        async for answer in self._channel.stream_stream(method)(requests):
            fate = self._draw.random()
            if fate < 0.10:
                self.errors += 1
                failed = pb.ModelStreamInferResponse(error_message="failed by the proxy")
                failed.infer_response.id = pb.ModelStreamInferResponse.FromString(answer).infer_response.id
                answer = failed.SerializeToString()
            elif fate < 0.15:
                await asyncio.sleep(0.3)
            elif fate < 0.16:
                self.drops += 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "dropped by the proxy")
            await context.write(answer)


class _Forward(grpc.GenericRpcHandler):
    """Every method as bytes: ModelStreamInfer as a stream, all others as one request and one answer."""

    def __init__(self, proxy: FaultyProxy):
        self.proxy = proxy

    def service(self, details):
        method, proxy = details.method, self.proxy

        async def stream(requests, context):
            await proxy.stream(method, requests, context)

        async def unary(request, context):
            return await proxy.unary(method, request)

        if method.endswith("/ModelStreamInfer"):
            return grpc.stream_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(unary)
