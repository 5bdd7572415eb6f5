"""A teacher server without a model: Triton's gRPC service, scores by a hash of the prompt, faults on demand.

    python tests/helpers/stub_teacher.py --teacher FOLDER --port 0 --latency 0.05 --capacity 16 --error-rate 0.1

Prints its port as the first line. Served: the calls that clients/label_corpus.py makes, on the model `teacher`.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import random
import struct
from pathlib import Path

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from ranking.card import CARD_NAME


def unpack(raw: bytes) -> list[bytes]:
    """The elements of a BYTES tensor."""
    found, at = [], 0
    while at < len(raw):
        size = int.from_bytes(raw[at : at + 4], "little")
        found.append(raw[at + 4 : at + 4 + size])
        at += 4 + size
    return found


def stub_score(prompt: bytes) -> float:
    """A float32-exact score in -8..8 from the prompt's digest."""
    return int.from_bytes(hashlib.blake2b(prompt, digest_size=2).digest(), "little") / 4096 - 8


class StubTeacher(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Faults are drawn per request: an error answer, NaN, an answer after 5 latencies, no answer, a broken stream."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.card = (Path(options.teacher) / CARD_NAME).read_text(encoding="utf-8")
        self.slots = asyncio.Semaphore(options.capacity)
        self.draw = random.Random(options.seed)
        self.served = 0

    @property
    def promoted(self) -> bool:
        """Whether version 2 serves in place of version 1."""
        return 0 < self.options.promote_after <= self.served

    @property
    def version(self) -> str:
        return "2" if self.promoted else "1"

    @property
    def teacher_id(self) -> str:
        return (self.promoted and self.options.promoted_id) or self.options.teacher_id

    async def ModelReady(self, request, context):
        return pb.ModelReadyResponse(ready=request.name == "teacher")

    async def ModelMetadata(self, request, context):
        return pb.ModelMetadataResponse(name="teacher", versions=[self.version])

    async def ModelConfig(self, request, context):
        answer = pb.ModelConfigResponse()
        answer.config.name = "teacher"
        if self.options.ranker:
            answer.config.metric_tags.update({"checkpoint": self.teacher_id, "precision": "fp32"})
            return answer
        given = {"teacher_id": self.teacher_id, "score_token_id": "1", "ranker_card": self.card}
        given["head_dtype"] = "float32"
        answer.config.input.add(name="text_input", dims=[-1 if self.options.several else 1])
        for name, value in given.items():
            answer.config.parameters[name].string_value = value
        return answer

    async def ModelStreamInfer(self, request_iterator, context):
        answers: asyncio.Queue[pb.ModelStreamInferResponse | None] = asyncio.Queue()
        tasks: set[asyncio.Task] = set()
        broken = asyncio.Event()

        async def take() -> None:
            async for request in request_iterator:
                if self.options.latency:
                    task = asyncio.create_task(self._answer(request, answers, broken))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                else:
                    await self._answer(request, answers, broken)
            await answers.put(None)

        taker = asyncio.create_task(take())
        try:
            while (answer := await answers.get()) is not None:
                if broken.is_set():
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "stream dropped by the stub")
                await context.write(answer)
        finally:
            for task in (taker, *tasks):
                task.cancel()

    async def _answer(self, request, answers: asyncio.Queue, broken: asyncio.Event) -> None:
        options, fate = self.options, self.draw.random()
        faults = ("error", "nan", "delay", "silent", "drop")
        chosen = ""
        for fault in faults:
            rate = getattr(options, f"{fault}_rate")
            if fate < rate:
                chosen = fault
                break
            fate -= rate
        if options.latency:
            async with self.slots:
                await asyncio.sleep(options.latency * (5 if chosen == "delay" else 1))
        if chosen == "silent":
            return
        if chosen == "drop":
            broken.set()
        answer = pb.ModelStreamInferResponse()
        answer.infer_response.id = request.id
        prompts = unpack(request.raw_input_contents[0])
        if options.ranker:
            query, titles, summaries = (unpack(raw) for raw in request.raw_input_contents)
            prompts = [b"\n".join([query[0], *pair]) for pair in zip(titles, summaries)]
        if len(prompts) > 1 and not (options.several or options.ranker):
            answer.error_message = f"unexpected shape for input 'text_input': [{len(prompts)}] where [1] is declared"
        elif request.model_version not in ("", self.version):  # in Triton's words
            refused = f"'{request.model_name}' version {request.model_version} is not at ready state"
            answer.error_message = f"Request for unknown model: {refused}"
        elif chosen == "error":
            answer.error_message = "the stub was asked to fail"
        elif options.final_mark and any(options.final_mark.encode() in prompt for prompt in prompts):
            answer.error_message = "The prompt is longer than the maximum model length of 64"
        else:
            answer.infer_response.model_name, answer.infer_response.model_version = "teacher", self.version
            name = "score" if options.ranker else "cumulative_logprob"
            answer.infer_response.outputs.add(name=name, datatype="FP32", shape=[len(prompts)])
            other = float(self.teacher_id != options.teacher_id)  # another teacher, other scores
            values = [float("nan") if chosen == "nan" else stub_score(prompt) + other for prompt in prompts]
            content = struct.pack(f"<{len(values)}f", *values)
            if options.bf16_scores:
                bits = struct.unpack(f"<{len(values)}I", content)
                content = struct.pack(f"<{len(values)}I", *(value & 0xFFFF0000 for value in bits))
            answer.infer_response.raw_output_contents.append(content)
        self.served += 1
        await answers.put(answer)


async def serve(options: argparse.Namespace) -> None:
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(StubTeacher(options), server)
    port = server.add_insecure_port(f"127.0.0.1:{options.port}")
    if not port:
        raise SystemExit(f"port {options.port} is taken")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--teacher-id", default="stub0")
    parser.add_argument("--ranker", action="store_true", help="take query, title and summary as an arm does")
    parser.add_argument("--several", action="store_true", help="take several prompts in a request, and say so")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds a request takes; 0 answers at once")
    parser.add_argument("--capacity", type=int, default=64, help="requests worked on at a time, where latency > 0")
    parser.add_argument("--final-mark", default="", help="text that makes a prompt too long for the model")
    parser.add_argument("--bf16-scores", action="store_true", help="answer as a vLLM with a bf16 head does")
    parser.add_argument("--promote-after", type=int, default=0, help="requests after which version 2 takes over")
    parser.add_argument("--promoted-id", default="", help="version 2's teacher id; left out, the same")
    for fault in ("error", "nan", "delay", "silent", "drop"):
        parser.add_argument(f"--{fault}-rate", type=float, default=0.0)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
