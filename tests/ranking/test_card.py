"""A score card says what a checkpoint is, and a damaged or foreign one is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ranking.card import CARD_NAME, ScoreCard, fingerprint, model_name
from ranking.chunks import Chunking
from ranking.errors import InputError
from ranking.limits import FieldLimits
from ranking.pretrained import refuse_missing_folder

CARD = ScoreCard(
    role="student", text_format="f", format_version=1, limits=FieldLimits(8, 8, 16),
    head="linear", pooling="cls", score_mean=0.25, metrics={"ndcg@5": 0.7},
    calibration={"kind": "platt", "slope": 1.0, "intercept": 0.0},
)  # fmt: skip
IN_CHUNKS = replace(CARD, chunking=Chunking(most=4, overlap=5, pooling="mean"))


@pytest.mark.parametrize("card", [CARD, IN_CHUNKS])
def test_a_card_reads_back_as_it_was_saved(card, tmp_path):
    assert card.save(tmp_path) == tmp_path / CARD_NAME
    assert ScoreCard.load(tmp_path) == card


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"version": 99}, "card version 99"),
        ({"surprise": 1}, "unknown keys surprise"),
        ({"role": "wizard"}, "role is 'wizard'"),
        ({"head": "none at all"}, "head is 'none at all'"),
        ({"pooling": None}, "pooling is None"),
        ({"limits": {"max_query_tokens": 0, "max_title_tokens": 8, "max_summary_tokens": 8}}, "max_query_tokens is 0"),
        (
            {"limits": {"max_query_tokens": 8, "max_title_tokens": "8", "max_summary_tokens": 8}},
            "max_title_tokens is '8'",
        ),
        (
            {"limits": {"max_query_tokens": 8, "max_title_tokens": True, "max_summary_tokens": 8}},
            "max_title_tokens is True",
        ),
        ({"limits": {"max_query_tokens": 8, "max_title_tokens": 8}}, "max_summary_tokens"),
        ({"limits": [8, 8, 8]}, "limits"),
        ({"score_spread": -1}, "score_spread is -1"),
        ({"chunking": None}, "chunking is None"),
        ({"chunking": {"most": 0}}, "most is 0"),
        ({"chunking": {"most": 4, "overlap": 16}}, "overlap is 16, a chunk .* has 16 tokens"),
        ({"chunking": {"pooling": "median"}}, "pooling is 'median'"),
        ({"chunking": {"surprise": 1}}, "surprise"),
        ({"score_mean": float("nan")}, "score_mean is nan"),
    ],
)
def test_a_card_with_a_wrong_value_is_refused(change, reason, tmp_path):
    CARD.save(tmp_path)
    content = json.loads((tmp_path / CARD_NAME).read_text(encoding="utf-8"))
    (tmp_path / CARD_NAME).write_text(json.dumps({**content, **change}), encoding="utf-8")
    with pytest.raises(InputError, match=reason):
        ScoreCard.load(tmp_path)


@pytest.mark.parametrize(
    "content, reason", [("{", "cannot be read as JSON"), ("[]", "a JSON object"), ("{}", "version")]
)
def test_a_damaged_card_is_refused(content, reason, tmp_path):
    with pytest.raises(InputError, match=r"no ranker\.json; this is not a DisRanker checkpoint"):
        ScoreCard.load(tmp_path)
    (tmp_path / CARD_NAME).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=reason):
        ScoreCard.load(tmp_path)


def test_a_training_that_was_stopped_is_called_so(tmp_path):
    """Seen: evaluate called it no cross-encoder, and --init asked for sentencepiece."""
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "settings.json").write_text("{}", encoding="utf-8")
    for opens in (ScoreCard.load, refuse_missing_folder):
        with pytest.raises(InputError, match="the training there has not finished; --resume goes on with it"):
            opens(tmp_path)
    CARD.save(tmp_path)
    refuse_missing_folder(tmp_path)


def test_a_card_without_a_key_is_refused(tmp_path):
    CARD.save(tmp_path)
    content = json.loads((tmp_path / CARD_NAME).read_text(encoding="utf-8"))
    del content["role"]
    (tmp_path / CARD_NAME).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match="role"):
        ScoreCard.load(tmp_path)


def in_version_1() -> dict:
    """The card of version 1 as its release wrote it: the three limits beside the other fields."""
    return {
        "role": "student", "text_format": "f", "format_version": 1, "max_query_tokens": 8, "max_title_tokens": 8,
        "max_summary_tokens": 16, "head": "linear", "pooling": "cls", "score_mean": 0.25, "score_spread": 1.0,
        "vocabulary": "", "base_model": "", "trained_on": {}, "metrics": {"ndcg@5": 0.7},
        "calibration": {"kind": "platt", "slope": 1.0, "intercept": 0.0}, "version": 1,
    }  # fmt: skip


def test_a_card_of_the_first_version_is_read_with_its_limits(tmp_path):
    (tmp_path / CARD_NAME).write_text(json.dumps(in_version_1()), encoding="utf-8")
    assert ScoreCard.load(tmp_path) == CARD
    CARD.save(tmp_path)
    assert json.loads((tmp_path / CARD_NAME).read_text(encoding="utf-8"))["version"] == 3


def test_a_card_of_the_second_version_reads_one_chunk(tmp_path):
    content = json.loads(IN_CHUNKS.to_json()) | {"version": 2}
    del content["chunking"]
    (tmp_path / CARD_NAME).write_text(json.dumps(content), encoding="utf-8")
    assert ScoreCard.load(tmp_path) == CARD


def test_whoever_knows_a_model_by_its_folder_notices_other_chunks(tmp_path):
    CARD.save(tmp_path)
    before = fingerprint(tmp_path)
    IN_CHUNKS.save(tmp_path)
    assert fingerprint(tmp_path) != before


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"max_summary_tokens": 0}, "max_summary_tokens is 0"),
        ({"limits": {}}, "max_query_tokens"),
        ({"max_title_tokens": None}, "max_title_tokens is None"),
    ],
)
def test_a_damaged_card_of_the_first_version_is_refused(change, reason, tmp_path):
    content = in_version_1() | change
    if "limits" in change:
        content = {name: value for name, value in content.items() if not name.startswith("max_")}
    (tmp_path / CARD_NAME).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match=reason):
        ScoreCard.load(tmp_path)


def test_a_card_names_what_training_started_from_and_tells_no_path(tmp_path):
    """Seen: the card, which a server tells everybody who may ask the model, held a folder of the training machine."""
    base = tmp_path / "some base"
    base.mkdir()
    (base / "model.safetensors").write_bytes(b"weights")
    named = model_name(base)
    assert named == f"some base ({fingerprint(base / 'model.safetensors')})" and str(tmp_path) not in named
    assert model_name("org/model-of-a-hub") == "org/model-of-a-hub"
    (tmp_path / CARD_NAME).write_text(json.dumps(in_version_1() | {"base_model": str(base) + "/"}), encoding="utf-8")
    assert ScoreCard.load(tmp_path).base_model == "some base"


def test_a_teacher_must_not_pass_for_a_student(tmp_path):
    assert CARD.require(tmp_path, "student", "baseline") is CARD
    with pytest.raises(InputError, match="this checkpoint is a student, a teacher is needed"):
        CARD.require(tmp_path, "teacher")


def test_a_fingerprint_follows_content_and_names_inside_a_folder_not_its_place(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place / "sub").mkdir(parents=True)
        (tmp_path / place / "sub/x").write_bytes(b"1")
    first = fingerprint(tmp_path / "a")
    assert first == fingerprint(tmp_path / "b") and len(first) == 16
    (tmp_path / "b/sub/x").rename(tmp_path / "b/sub/y")
    assert fingerprint(tmp_path / "b") != first
    (tmp_path / "a/sub/x").write_bytes(b"2")
    assert fingerprint(tmp_path / "a") != first
    with pytest.raises(InputError, match="nothing there to fingerprint"):
        fingerprint(tmp_path / "none")
