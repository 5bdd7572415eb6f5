"""Publishing a teacher: the folded head on tiny models of each family, what is written, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from google.protobuf import text_format
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from tritonclient.grpc import model_config_pb2

from build.build_teacher import Config, main, teacher_id
from build.fold_teacher import fold, ordinary_token, write_serving_tokenizer
from ranking.card import ScoreCard
from ranking.errors import InputError
from ranking.text import TeacherFormat
from tests.helpers.tiny_teacher import FAMILIES, make_teacher, make_tokenizer

PAIRS = (["running shoes", "größe 44", ""], ["light shoes</s>", "", "Schuhe"], ["<unused0> " * 9, "a b c", "x" * 999])


def token_ids(checkpoint) -> list[list[int]]:
    layout = TeacherFormat.of_checkpoint(checkpoint)
    return [layout.tokenizer.encode(pair.text).ids for pair in layout.texts(*PAIRS)]


def classifier_scores(model, rows) -> list[float]:
    with torch.inference_mode():
        return [float(model(torch.tensor([ids])).logits[0, 0]) for ids in rows]


def folded_scores(folder, token, rows, dtype=torch.float32) -> list[float]:
    """Raw logits of the score token after each prompt, from what was written to disk."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not report["missing_keys"]  # a server would make them up
    with torch.inference_mode():
        return [float(model.eval()(torch.tensor([ids])).logits[0, -1, token]) for ids in rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logit_of_the_score_token_is_the_classifiers_score(family, tmp_path):
    checkpoint = make_teacher(tmp_path / "teacher", family)
    rows = token_ids(checkpoint)
    expected = classifier_scores(AutoModelForSequenceClassification.from_pretrained(checkpoint).eval(), rows)
    teacher = fold(checkpoint, tmp_path / "folded")
    assert folded_scores(tmp_path / "folded", teacher.score_token_id, rows) == pytest.approx(expected, abs=1e-5)
    assert teacher.score_token_id not in {number for ids in rows for number in ids[-1:]}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_served_tokenizer_gives_the_token_ids_of_training_whatever_class_the_family_has(family, tmp_path):
    checkpoint = make_teacher(tmp_path / "teacher", family)
    write_serving_tokenizer(checkpoint, tmp_path / "tokenizer")
    served = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    texts = [pair.text for pair in TeacherFormat.of_checkpoint(checkpoint).texts(*PAIRS)]
    assert [served(text)["input_ids"] for text in texts] == token_ids(checkpoint)


def test_an_ordinary_token_that_a_setting_names_is_not_split_off_when_served(tmp_path):
    """Seen: Qwen's base models were padded with "!", so vLLM read "!!" as two tokens and training as one."""
    checkpoint = make_teacher(tmp_path / "teacher")
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "n"}))
    write_serving_tokenizer(checkpoint, tmp_path / "tokenizer")
    served = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    texts = [pair.text for pair in TeacherFormat.of_checkpoint(checkpoint).texts(*PAIRS)]
    assert [served(text)["input_ids"] for text in texts] == token_ids(checkpoint)
    assert (served.bos_token, served.eos_token) == ("<s>", "</s>")


def test_a_family_with_a_tied_head_uses_a_token_that_no_text_contains_and_no_soft_cap(tmp_path):
    checkpoint = make_teacher(tmp_path / "teacher", "gemma2")
    assert json.loads((checkpoint / "config.json").read_text())["final_logit_softcapping"] == 30.0
    teacher = fold(checkpoint, tmp_path / "folded")
    assert teacher.score_token_id == make_tokenizer().convert_tokens_to_ids("<unused0>")
    assert teacher.score_token_id not in {number for ids in token_ids(checkpoint) for number in ids}
    config = json.loads((tmp_path / "folded" / "config.json").read_text())
    assert (config["final_logit_softcapping"], config["tie_word_embeddings"]) == (None, True)


def test_a_lora_checkpoint_is_merged_with_its_own_head(tmp_path):
    from peft import LoraConfig, TaskType, get_peft_model

    base = make_teacher(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base)
    settings = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules="all-linear", modules_to_save=["score"])
    adapted = get_peft_model(model, settings).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if weight.requires_grad:  # the adapter and the copy of the head that trains
                weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    adapter = tmp_path / "adapter"
    adapted.save_pretrained(adapter)
    for name in ("tokenizer.json", "tokenizer_config.json", "ranker.json"):
        (adapter / name).write_bytes((base / name).read_bytes())
    rows = token_ids(base)
    teacher = fold(adapter, tmp_path / "folded")
    served = folded_scores(tmp_path / "folded", teacher.score_token_id, rows)
    assert served == pytest.approx(classifier_scores(adapted, rows), abs=1e-4)
    untrained = classifier_scores(AutoModelForSequenceClassification.from_pretrained(base).eval(), rows)
    assert served != pytest.approx(untrained, abs=1e-2)


def test_what_is_published_says_what_it_is_and_a_new_version_replaces_the_old(tmp_path):
    checkpoint = make_teacher(tmp_path / "teacher")
    repository = tmp_path / "model_repository"
    main(Config(checkpoint, repository=repository, engine_args={"gpu_memory_utilization": 0.5}))
    main(Config(checkpoint, repository=repository, dtype="bfloat16"))
    assert sorted(p.name for p in repository.iterdir()) == ["teacher"]
    assert sorted(p.name for p in (repository / "teacher").iterdir()) == ["2", "config.pbtxt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model_repository", "teacher"]  # nothing is left beside it

    config = text_format.Parse((repository / "teacher" / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert not config.HasField("dynamic_batching")  # its queue would keep an unload waiting (docs/decisions.md)
    assert config.backend == "vllm"
    published = repository / "teacher" / "2" / "checkpoint"
    assert ScoreCard.from_json(config.parameters["ranker_card"].string_value, "config") == ScoreCard.load(checkpoint)
    assert ScoreCard.load(published).head == "folded"

    arguments = json.loads((repository / "teacher" / "2" / "model.json").read_text())
    assert config.parameters["teacher_id"].string_value == teacher_id(published, arguments)
    assert config.parameters["head_dtype"].string_value == "float32"  # of a bfloat16 teacher
    assert (arguments["model"], arguments["tokenizer"]) == (str(published), str(published.parent / "tokenizer"))
    assert arguments["max_model_len"] == TeacherFormat.of_checkpoint(checkpoint).max_tokens() + 1
    assert (arguments["dtype"], arguments["hf_overrides"]) == ("bfloat16", {"head_dtype": "float32"})
    assert (arguments["enable_prefix_caching"], arguments["logprobs_mode"]) == (True, "raw_logits")
    # model.json has to say where the server finds the checkpoint; nothing else tells a path
    told = [path for path in repository.rglob("*") if path.is_file() and str(tmp_path).encode() in path.read_bytes()]
    assert [path.name for path in told] == ["model.json"]


def test_the_teacher_id_changes_with_whatever_moves_a_score_and_not_with_the_place_or_the_speed(tmp_path):
    checkpoint = make_teacher(tmp_path / "teacher")

    def published_id(place: str, **changes) -> str:
        main(Config(checkpoint, repository=tmp_path / place, **changes))
        text = (tmp_path / place / "teacher" / "config.pbtxt").read_text()
        return text_format.Parse(text, model_config_pb2.ModelConfig()).parameters["teacher_id"].string_value

    plain = published_id("a")
    assert published_id("b", engine_args={"gpu_memory_utilization": 0.5, "max_num_seqs": 8}) == plain
    moved = [
        published_id("c", dtype="bfloat16"),
        published_id("d", engine_args={"kv_cache_dtype": "fp8"}, accept_quantised="tau 0.99"),
        published_id("e", engine_args={"quantization": "fp8"}, accept_quantised="tau 0.99"),
        published_id("f", engine_args={"an_argument_of_a_later_release": 1}),
    ]
    assert len({plain, *moved}) == 5


def test_a_quantised_teacher_is_published_only_with_a_word_on_its_scores(tmp_path):
    settings = {"repository": tmp_path / "models", "engine_args": {"quantization": "fp8", "kv_cache_dtype": "auto"}}
    with pytest.raises(ValueError, match=r"sets quantization, which moves scores: .*parity --engine-args.quant"):
        Config(tmp_path / "teacher", **settings)
    main(Config(make_teacher(tmp_path / "teacher"), **settings, accept_quantised="tau 0.992 on MSRD"))
    text = (tmp_path / "models" / "teacher" / "config.pbtxt").read_text()
    parameters = text_format.Parse(text, model_config_pb2.ModelConfig()).parameters
    assert parameters["accept_quantised"].string_value == "tau 0.992 on MSRD"


def test_only_a_teacher_with_its_head_and_its_tokenizer_is_published(tmp_path):
    checkpoint = make_teacher(tmp_path / "teacher")
    card = ScoreCard.load(checkpoint)
    for changes, reason in (
        ({"role": "student"}, "is a student, a teacher is needed"),
        ({"pooling": "mean"}, "pooling 'mean'"),
        ({"head": "folded"}, "head 'folded'"),
        ({"vocabulary": "0" * 16}, "not the tokenizer that the score card names"),
    ):
        replace(card, **changes).save(checkpoint)
        with pytest.raises(InputError, match=reason):
            main(Config(checkpoint, repository=tmp_path / "model_repository"))
    assert list((tmp_path / "model_repository").iterdir()) == []


def test_a_checkpoint_without_score_head_is_refused_not_given_a_random_one(tmp_path):
    checkpoint = make_teacher(tmp_path / "teacher")
    classifier = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    classifier.model.save_pretrained(checkpoint)  # the body alone, under the same card
    with pytest.raises(InputError, match=r"score\.weight"):
        fold(checkpoint, tmp_path / "folded")


@pytest.mark.parametrize("name", ["logprobs_mode", "model", "dtype", "enable_lora"])
def test_engine_arguments_that_would_change_the_score_are_refused(name):
    with pytest.raises(ValueError, match=name):
        Config("teacher", engine_args={name: "x"})


def test_a_shorter_context_than_the_longest_pair_is_refused(tmp_path):
    with pytest.raises(InputError, match="max_model_len 50 is below"):
        main(
            Config(
                make_teacher(tmp_path / "teacher"),
                repository=tmp_path / "repository",
                engine_args={"max_model_len": 50},
            )
        )


def test_the_score_token_is_a_whole_character(tmp_path):
    tokenizer = make_tokenizer().backend_tokenizer
    token = ordinary_token(tokenizer)
    assert tokenizer.decode([token]).strip().isalnum()


def test_the_program_prints_one_line_for_bad_input(tmp_path):
    command = [sys.executable, "build/build_teacher.py", "--checkpoint", str(tmp_path)]
    done = subprocess.run([*command, "--repository", str(tmp_path / "m")], capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        done.stderr.strip().splitlines()[-1] == f"error: {tmp_path}: no ranker.json; this is not a DisRanker checkpoint"
    )
