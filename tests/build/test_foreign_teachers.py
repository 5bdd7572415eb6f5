"""Foreign decoder rerankers as teachers: the folded score is the published code's, whatever stands in the fields."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from build.build_teacher import Config, main
from build.fold_teacher import FoldedTeacher, write_serving_tokenizer
from build.foreign_teachers import fold_reranker
from ranking.errors import InputError
from ranking.limits import FieldLimits
from ranking.reranker_prompts import PROMPTS, PromptFormat
from tests.helpers.foreign_rerankers import (
    FAMILIES,
    hostile_pairs,
    last_logits,
    make_reranker,
    published_ids,
    published_scores,
)

LIMITS = FieldLimits(16, 16, 48)
PAIRS = hostile_pairs(200)


def served_scores(folded, tokenizer_folder, teacher: FoldedTeacher, texts: list[str]) -> list[float]:
    """The score token's raw logit after each text, from what lies on disk, tokenised as the server does it."""
    rows = AutoTokenizer.from_pretrained(tokenizer_folder)(texts)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folded, dtype=torch.float32).eval()
    return last_logits(model, rows)[:, teacher.score_token_id].tolist()


@pytest.mark.parametrize("prompt", FAMILIES)
def test_the_folded_score_is_the_published_codes_on_hostile_text(prompt, tmp_path):
    folder = make_reranker(tmp_path / "reranker", prompt)
    teacher = fold_reranker(folder, tmp_path / "folded", prompt, LIMITS)
    write_serving_tokenizer(tmp_path / "folded", tmp_path / "tokenizer")
    text_format = PromptFormat.of_checkpoint(tmp_path / "folded")
    columns = list(zip(*PAIRS))
    expected = published_scores(folder, prompt, list(zip(*text_format.fields(*columns))))
    texts = [text.text for text in text_format.texts(*columns)]
    served = served_scores(tmp_path / "folded", tmp_path / "tokenizer", teacher, texts)
    assert torch.tensor(expected).std() > 0.3
    assert served == pytest.approx(expected, abs=1e-4)
    longest = max(len(text_format.tokenizer.encode(text).ids) for text in texts)
    assert longest <= teacher.max_prompt_tokens <= longest + 40  # the bound holds and is not idle


@pytest.mark.parametrize("prompt", FAMILIES)
def test_the_served_tokenizer_makes_the_published_ids_where_joined_text_would_not(prompt, tmp_path):
    folder = make_reranker(tmp_path / "reranker", prompt)
    fold_reranker(folder, tmp_path / "folded", prompt, LIMITS)
    text_format = PromptFormat.of_checkpoint(tmp_path / "folded")
    own = PreTrainedTokenizerFast.from_pretrained(folder)
    joined_differs = 0
    for query, document in (("shoes (red).", "A light shoe."), ("shoes", ""), ("größe", "靴")):
        (text,) = text_format.texts([query], [""], [document])
        expected = published_ids(prompt, own, query, document)
        assert text_format.tokenizer.encode(text.text).ids == expected
        joined_differs += own(text.text.replace("\ue000", ""))["input_ids"] != expected
    assert joined_differs or prompt != "mxbai-rerank-v2"  # Qwen 2 merges a full stop with the line break behind it


def test_a_reranker_published_as_a_classifier_keeps_its_own_head(tmp_path):
    folder = make_reranker(tmp_path / "reranker", "qwen3-reranker", classifier=True)
    teacher = fold_reranker(folder, tmp_path / "folded", "qwen3-reranker", LIMITS)
    write_serving_tokenizer(tmp_path / "folded", tmp_path / "tokenizer")
    text_format = PromptFormat.of_checkpoint(tmp_path / "folded")
    own = PreTrainedTokenizerFast.from_pretrained(folder)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    columns = list(zip(*PAIRS[:40]))
    with torch.inference_mode():
        expected = [
            float(classifier(torch.tensor([published_ids("qwen3-reranker", own, query, document)])).logits[0, 0])
            for query, document in zip(*text_format.fields(*columns))
        ]
    texts = [text.text for text in text_format.texts(*columns)]
    assert served_scores(tmp_path / "folded", tmp_path / "tokenizer", teacher, texts) == pytest.approx(
        expected, abs=1e-4
    )


def test_special_tokens_and_borders_in_fields_lose_their_role(tmp_path):
    folder = make_reranker(tmp_path / "reranker", "qwen3-reranker")
    fold_reranker(folder, tmp_path / "folded", "qwen3-reranker", LIMITS)
    text_format = PromptFormat.of_checkpoint(tmp_path / "folded")
    marks = {text_format.tokenizer.token_to_id(mark) for mark in ("<|im_start|>", "<|im_end|>", "<think>", "</think>")}
    counts = set()
    for text in text_format.texts(*zip(*PAIRS)):
        ids = text_format.tokenizer.encode(text.text).ids
        counts.add(sum(number in marks for number in ids))
        assert text.text.count("\ue000") == 2
    assert len(counts) == 1


def test_the_instruction_is_part_of_the_prompt_and_of_the_teachers_id(tmp_path):
    folder = make_reranker(tmp_path / "reranker", "mxbai-rerank-v2")
    ids, texts = [], []
    for place, instruction in (("a", ""), ("b", "Prefer recent documents")):
        main(Config(folder, repository=tmp_path / place, prompt="mxbai-rerank-v2", instruction=instruction))
        published = tmp_path / place / "teacher"
        ids.append((published / "config.pbtxt").read_text().split('key: "teacher_id"')[1].split('"')[1])
        texts.append(PromptFormat.of_checkpoint(published / "1/checkpoint").texts(["q"], ["t"], ["s"])[0].text)
    assert ids[0] != ids[1]
    assert texts[1] == texts[0].replace("query: q", "instruction: Prefer recent documents\nquery: q")
    with pytest.raises(InputError, match="no place for an instruction"):
        PROMPTS["bge-reranker-gemma"].fill("q", "d", "Prefer recent documents")


def test_what_is_published_tells_the_limits_and_the_prompt(tmp_path):
    folder = make_reranker(tmp_path / "reranker", "bge-reranker-gemma", dtype=torch.bfloat16)
    main(Config(folder, repository=tmp_path / "r", prompt="bge-reranker-gemma", limits=LIMITS))
    card = json.loads((tmp_path / "r/teacher/1/checkpoint/ranker.json").read_text())
    assert (card["text_format"], card["head"], card["base_model"]) == ("bge-reranker-gemma", "folded", "reranker")
    assert card["limits"] == {"max_query_tokens": 16, "max_title_tokens": 16, "max_summary_tokens": 48}
    arguments = json.loads((tmp_path / "r/teacher/1/model.json").read_text())
    assert (arguments["dtype"], arguments["hf_overrides"]) == ("bfloat16", {"head_dtype": "float32"})


def test_what_cannot_be_folded_is_refused_with_its_reason(tmp_path):
    folder = make_reranker(tmp_path / "reranker", "qwen3-reranker")
    config = json.loads((folder / "config.json").read_text())

    def refused(reason: str, prompt: str = "qwen3-reranker", **changes) -> None:
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(InputError, match=reason):
            fold_reranker(folder, tmp_path / "folded", prompt, LIMITS)

    refused("no linear read-out", final_logit_softcapping=30.0)
    refused("architecture Qwen3Model", architectures=["Qwen3Model"])
    with pytest.raises(ValueError, match="one of bge-reranker-gemma"):
        Config(folder, prompt="qwen4-reranker")
    with pytest.raises(ValueError, match="give --prompt"):
        Config(folder, instruction="x")
    with pytest.raises(InputError, match="no readable config"):
        fold_reranker(tmp_path / "nowhere", tmp_path / "folded", "qwen3-reranker", LIMITS)


def test_a_tokenizer_of_another_family_is_refused(tmp_path):
    gemma = make_reranker(tmp_path / "gemma", "bge-reranker-gemma")
    with pytest.raises(InputError, match="no token <|im_start|>, <|im_end|>".replace("|", r"\|")):
        fold_reranker(gemma, tmp_path / "folded", "qwen3-reranker", LIMITS)
