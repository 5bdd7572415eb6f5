"""A teacher behind the real tritonserver and the real vLLM: its scores, its manners under load, its refusals."""

from __future__ import annotations

import json
import random
import urllib.error
import urllib.request
from itertools import cycle

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from ranking.card import ScoreCard
from ranking.text import TeacherFormat
from tests.helpers.teacher_requests import (
    Refused,
    ask_all,
    output,
    parameter,
    read_score,
    request,
    sampling,
    score_request,
    score_token_id,
    scores,
)

QUERIES = ["running shoes", "flights to rome", "laufschuhe größe 44", "", "靴 メンズ"]
TITLES = ["light running shoes for men", "cheap flights", "", "Schuhe & mehr", "ランニング シューズ"]
SUMMARIES = ["cushioned, breathable", "", "Rückgabe in 30 Tagen", "x" * 300, "emoji 👟 and\nline breaks"]
PAIRS = [(q, t, s) for q in QUERIES for t in TITLES for s in SUMMARIES]
ADVERSARIAL = [
    ("shoes", "title", "good</s>bad"),
    ("shoes</s>", "</s></s>", "</s>"),
    ("shoes", "<s>title", "<s> summary <pad><unused0>"),
    ("shoes", "Title: Title:", "Summary: \nQuery: boats\nTitle: boats"),
    ("shoes", "< /s>", "<</s>/s>"),
    ("shoes", "title", "long text " * 10_000),
    ("</s>" * 30_000, "title", "summary"),
    ("\x00\x1b[31m", "\u2028\ufeff", "\ud800"),
]


@pytest.fixture(scope="module")
def teacher_format(tiny_teacher_checkpoint):
    return TeacherFormat.of_checkpoint(tiny_teacher_checkpoint)


@pytest.fixture(scope="module")
def reference(tiny_teacher_checkpoint):
    """The Hugging Face model's score of each pair, one pair at a time."""
    from training.evaluation.checkpoint_scores import Scorer

    scorer = Scorer.load(tiny_teacher_checkpoint)
    return lambda pairs: np.array([scorer.score(*([field] for field in pair))[0] for pair in pairs])


def prompts_of(teacher_format, pairs):
    return [text.text for text in teacher_format.texts(*zip(*pairs))]


def test_served_scores_are_the_trained_scores(teacher_server, teacher_format, reference):
    expected = reference(PAIRS)
    served = np.array(scores(teacher_server.grpc, prompts_of(teacher_format, PAIRS)))
    assert expected.std() > 0.1
    np.testing.assert_allclose(served, expected, atol=1e-4)


def test_a_pair_scored_alone_scores_as_it_does_among_many(teacher_server, teacher_format):
    prompts = prompts_of(teacher_format, PAIRS)
    together = scores(teacher_server.grpc, prompts)
    alone = [scores(teacher_server.grpc, [prompt])[0] for prompt in prompts[:10]]
    np.testing.assert_allclose(alone, together[:10], atol=1e-4)


def test_several_prompts_of_a_request_are_answered_in_their_order(teacher_server, teacher_format):
    prompts, token = prompts_of(teacher_format, PAIRS[:40]), score_token_id(teacher_server.grpc)
    asked = [
        score_request(prompts, sampling(token), return_num_input_tokens=True),
        score_request(prompts[:3], sampling(token, n=2, temperature=1), exclude_input_in_output=False),
    ]
    together, twice = ask_all(teacher_server.grpc, asked, read=lambda answer: answer)
    expected = scores(teacher_server.grpc, prompts)
    np.testing.assert_allclose(output(together, "cumulative_logprob"), expected, atol=1e-4)
    lengths = [len(teacher_format.tokenizer.encode(prompt).ids) for prompt in prompts]
    assert output(together, "num_input_tokens") == lengths
    texts = output(twice, "text_output")
    assert [text.startswith(prompts[number // 2]) for number, text in enumerate(texts)] == [True] * 6
    np.testing.assert_allclose(output(twice, "cumulative_logprob"), np.repeat(expected[:3], 2), atol=1e-4)


def test_text_that_spells_tokens_or_fields_cannot_move_the_pooled_token(teacher_server, teacher_format, reference):
    served = scores(teacher_server.grpc, prompts_of(teacher_format, ADVERSARIAL))
    np.testing.assert_allclose(served, reference(ADVERSARIAL), atol=1e-4)
    tokens = [teacher_format.tokenizer.encode(prompt).ids for prompt in prompts_of(teacher_format, ADVERSARIAL)]
    assert all(ids.count(teacher_format.eos_id) == 1 and ids[-1] == teacher_format.eos_id for ids in tokens)


def test_a_client_learns_the_card_and_the_teacher_from_the_server(teacher_server, tiny_teacher_checkpoint):
    card = ScoreCard.from_json(parameter(teacher_server.grpc, "ranker_card"), "server")
    assert card == ScoreCard.load(tiny_teacher_checkpoint)
    assert len(parameter(teacher_server.grpc, "teacher_id")) == 16


def test_it_answers_one_pair_over_plain_http(teacher_server, teacher_format):
    (prompt,) = prompts_of(teacher_format, PAIRS[:1])
    body = {
        "text_input": prompt,
        "sampling_parameters": sampling(score_token_id(teacher_server.grpc)),
        "return_cumulative_logprob": True,
        "exclude_input_in_output": True,
    }
    url = f"http://{teacher_server.http}/v2/models/teacher/generate"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode())) as answer:
        served = json.load(answer)["cumulative_logprob"]
    assert served == pytest.approx(scores(teacher_server.grpc, [prompt])[0], abs=1e-4)


def malformed(token: int) -> dict[str, service_pb2.ModelInferRequest]:
    """Wrong requests by the word that the reason must contain."""
    good = sampling(token)
    wrong_type = score_request("a", good)
    wrong_type.inputs[0].datatype = "INT32"
    wrong_type.raw_input_contents[0] = np.array([1], np.int32).tobytes()
    wrong_shape = score_request("a", good)
    wrong_shape.inputs[1].shape[0] = 2
    wrong_count = score_request("a", good)
    wrong_count.inputs[0].shape[0] = 2
    return {
        "not JSON": score_request("a", "{max_tokens: 1"),
        "object is expected": score_request("a", "[1, 2]"),
        "unknown: no_such": score_request("a", sampling(token, no_such=1)),
        "allowed_token_ids": score_request("a", sampling(token, allowed_token_ids=["x"])),
        "token_id": score_request("a", sampling(10_000_000)),
        "max_tokens": score_request("a", sampling(token, max_tokens="many")),
        "at least 1": score_request("a", sampling(token, max_tokens=0)),
        "temperature": score_request("a", sampling(token, temperature=-1)),
        "LoRA": score_request("a", sampling(token, lora_name="x")),
        "UTF-8": score_request(b"\xff\xfe", good),
        "text only": score_request("a", good, image="aGVsbG8="),
        "embed": score_request("a", good, embedding_request="{}"),
        "exclude_input_in_output": score_request("a", good, stream=True, exclude_input_in_output=False),
        "maximum": score_request("word " * 30_000, good),
        "missing": request(sampling_parameters=good),
        "data-type": wrong_type,
        "shape": wrong_shape,
        "2 string elements": wrong_count,
        "1 to 256 texts expected, not 257": score_request(["a"] * 257, good),
        "1 to 256 texts expected, not 0": score_request([], good),
        "one text expected": score_request(["a", "b"], good, stream=True),
        "maximum context length": score_request(["a", "word " * 30_000, "b"], good),
        "unexpected": score_request("a", good, no_such_tensor=True),
    }


@pytest.mark.parametrize("reason", malformed(0))
def test_a_malformed_request_is_refused_with_a_reason(teacher_server, reason):
    (answer,) = ask_all(teacher_server.grpc, [malformed(score_token_id(teacher_server.grpc))[reason]])
    assert isinstance(answer, Refused)
    assert reason.lower() in str(answer).lower()


def test_an_unknown_model_is_refused_with_a_reason(teacher_server):
    # alone on its stream: server 2.51 aborts if such a request meets running ones there (docs/serving-teacher.md)
    (answer,) = ask_all(teacher_server.grpc, [request(model="no_such_model", text_input="a")])
    assert "unknown model" in str(answer)


def test_a_thousand_good_and_malformed_requests_are_each_answered_and_none_is_lost(
    teacher_server, teacher_format, reference
):
    token = score_token_id(teacher_server.grpc)
    expected = reference(PAIRS)
    prompts = prompts_of(teacher_format, PAIRS)
    wrong = cycle(malformed(token).values())
    draw = random.Random(0)
    requests, truth = [], []
    for _ in range(1000):
        if draw.random() < 0.3:
            copy = service_pb2.ModelInferRequest()
            copy.CopyFrom(next(wrong))
            requests.append(copy)
            truth.append(None)
        else:
            pair = draw.randrange(len(PAIRS))
            requests.append(score_request(prompts[pair], sampling(token)))
            truth.append(expected[pair])
    answers = ask_all(teacher_server.grpc, requests)
    assert len(answers) == 1000
    assert [isinstance(answer, Refused) for answer in answers] == [score is None for score in truth]
    served = [(answer, score) for answer, score in zip(answers, truth) if score is not None]
    np.testing.assert_allclose(*zip(*served), atol=1e-4)
    assert teacher_server.is_ready()


def test_streaming_sends_the_same_text_piece_by_piece(teacher_server):
    parameters = json.dumps({"max_tokens": 12, "temperature": 0, "ignore_eos": True})
    wanted = {"return_num_output_tokens": True, "return_num_input_tokens": True, "return_finish_reason": True}
    whole = request(text_input="a", sampling_parameters=parameters, exclude_input_in_output=True, **wanted)
    read = lambda answer: {name: output(answer, name)[0] for name in (tensor.name for tensor in answer.outputs)}  # noqa: E731
    (expected,) = ask_all(teacher_server.grpc, [whole], read=read)
    pieces = list(generate(teacher_server.grpc, "a", parameters, **wanted))
    assert len(pieces) > 1
    assert "".join(output(piece, "text_output")[0] for piece in pieces) == expected["text_output"]
    assert sum(output(piece, "num_output_tokens")[0] for piece in pieces) == expected["num_output_tokens"] == 12
    assert {output(piece, "num_input_tokens")[0] for piece in pieces} == {expected["num_input_tokens"]}
    assert output(pieces[-1], "finish_reason") == [expected["finish_reason"]] == ["length"]


def test_the_prompt_comes_first_unless_it_is_excluded(teacher_server):
    parameters = json.dumps({"max_tokens": 3, "temperature": 0})
    both = [request(text_input="abc", sampling_parameters=parameters)]
    both.append(request(text_input="abc", sampling_parameters=parameters, exclude_input_in_output=True))
    with_prompt, without = ask_all(teacher_server.grpc, both, read=lambda answer: output(answer, "text_output")[0])
    assert with_prompt == "abc" + without


def generate(address: str, prompt: str, parameters: str, **wanted: bool):
    """The responses of one streaming request, until the server closes the stream that we have closed."""
    made = request(
        text_input=prompt, sampling_parameters=parameters, stream=True, exclude_input_in_output=True, **wanted
    )
    with grpc.insecure_channel(address) as channel:
        for answer in service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([made])):
            assert not answer.error_message
            yield answer.infer_response


def test_the_score_does_not_depend_on_what_else_is_asked_back(teacher_server):
    token = score_token_id(teacher_server.grpc)
    plain = score_request("a</s>", sampling(token))
    rich = score_request("a</s>", sampling(token), return_logprobs=True, return_num_input_tokens=True)
    first, second = ask_all(teacher_server.grpc, [plain, rich], read=lambda answer: answer)
    assert read_score(first) == pytest.approx(read_score(second), abs=1e-4)
    (position,) = json.loads(output(second, "logprobs")[0])
    assert position[str(token)]["logprob"] == pytest.approx(read_score(second), abs=1e-4)
