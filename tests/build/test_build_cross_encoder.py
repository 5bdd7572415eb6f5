"""Publishing a foreign encoder reranker: its text is its own tokenizer's, and what is no reranker is refused."""

from __future__ import annotations

import json

import pytest
from google.protobuf import text_format
from transformers import PreTrainedTokenizerFast
from tritonclient.grpc import model_config_pb2

from build.build_cross_encoder import Config, main
from ranking.cross_encoder_text import CrossEncoderFormat
from ranking.errors import InputError
from ranking.limits import FieldLimits
from tests.helpers.foreign_encoders import ENCODERS, make_encoder
from tests.helpers.foreign_rerankers import hostile_pairs

LIMITS = FieldLimits(16, 16, 48)


def published_id(repository) -> str:
    config = text_format.Parse((repository / "foreign/config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    return f"{config.metric_tags['checkpoint']}-{config.metric_tags['precision']}"


@pytest.mark.parametrize("family", ENCODERS)
def test_a_pair_becomes_the_ids_that_transformers_makes_of_it(family, tmp_path):
    folder = make_encoder(tmp_path / "encoder", family)
    main(Config(folder, repository=tmp_path / "r", limits=LIMITS))
    text = CrossEncoderFormat.of_checkpoint(tmp_path / "r/foreign/1/checkpoint")
    own = PreTrainedTokenizerFast.from_pretrained(folder)
    columns = list(zip(*hostile_pairs(200)))
    queries, documents = text.fields(*columns)
    pairs = text.encode(*columns)
    for query, document, pair in zip(queries, documents, pairs):
        expected = {name: rows[0] for name, rows in own([query], [document]).items()}
        assert pair.ids == expected["input_ids"]
        types = [int(position >= pair.document_start) for position in range(len(pair.ids))]
        assert types == expected.get("token_type_ids", [0] * len(types))
    separators = {pair.ids.count(own.sep_token_id) for pair in pairs}
    assert len(separators) == 1  # no field can spell one
    assert max(len(pair.ids) for pair in pairs) <= text.max_tokens()


def test_the_id_tells_number_formats_and_limits_apart_but_not_places_and_versions_are_never_written_twice(tmp_path):
    folder = make_encoder(tmp_path / "encoder", "xlm-roberta")
    ids = []
    for place, changes in (("a", {}), ("b", {"threads": 2}), ("c", {"dtype": "bfloat16"}), ("d", {"limits": LIMITS})):
        main(Config(folder, repository=tmp_path / place, **changes))
        ids.append(published_id(tmp_path / place))
    assert ids[0] == ids[1] and len(set(ids)) == 3
    main(Config(folder, repository=tmp_path / "a"))
    assert sorted(path.name for path in (tmp_path / "a/foreign").iterdir()) == ["2", "config.pbtxt"]
    assert published_id(tmp_path / "a") == ids[0]


def test_what_is_no_reranker_is_refused_with_its_reason(tmp_path):
    with pytest.raises(InputError, match="3 labels; a reranker has one score"):
        main(Config(make_encoder(tmp_path / "three", "bert", num_labels=3), repository=tmp_path / "r"))
    short = make_encoder(tmp_path / "short", "xlm-roberta", max_position_embeddings=130)
    with pytest.raises(InputError, match=r"pairs of up to 199 tokens, the model has 128 positions"):
        main(Config(short, repository=tmp_path / "r"))
    headless = make_encoder(tmp_path / "headless", "bert")
    config = json.loads((headless / "config.json").read_text())
    (headless / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(InputError, match=r"weights without a value: bert\.encoder\.layer\.2"):
        main(Config(headless, repository=tmp_path / "r"))
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        main(Config(tmp_path / "nothing", repository=tmp_path / "r"))
    assert not list((tmp_path / "r").glob("*/*"))
