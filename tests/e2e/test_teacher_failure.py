"""What callers see when the teacher's engine dies, and what is left of it."""

from __future__ import annotations

import threading
import time

from serving.temporary_server import start_triton
from tests.e2e.conftest import QUIET_VLLM
from tests.helpers.teacher_requests import Refused, ask_all, read_score, sampling, score_request, score_token_id

EXPLICIT = ("--model-control-mode=explicit", "--load-model=*")


def test_a_dead_engine_answers_every_caller_and_makes_the_model_not_ready(tiny_teacher_repository):
    with start_triton(tiny_teacher_repository, *EXPLICIT, environment=QUIET_VLLM) as server:
        parameters = sampling(score_token_id(server.grpc))
        requests = [score_request(f"document {number}</s>", parameters) for number in range(3000)]
        (worker,) = [child for child in server.children() if "Worker" in child.name()]
        answers: list = []
        first = threading.Event()

        def read(response) -> float:
            first.set()
            return read_score(response)

        caller = threading.Thread(target=lambda: answers.extend(ask_all(server.grpc, requests, read=read, seconds=300)))
        caller.start()
        assert first.wait(120)  # nearly all of the others are on their way now
        worker.kill()
        caller.join()
        assert len(answers) == 3000
        refused = [answer for answer in answers if isinstance(answer, Refused)]
        assert refused
        assert {str(answer) for answer in refused} == {"vLLM's engine process has died"}

        deadline = time.monotonic() + 60
        while server.model_is_ready("teacher") and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not server.model_is_ready("teacher")
        assert server.stop() == 0
        assert server.stragglers == []
