"""TensorRT plans, profiles and loaders, as far as they go without a GPU."""

from __future__ import annotations

import numpy as np
import pytest

from build.engine_inspector import read_attention, softmax_nodes
from build.runners import pad_to_longest
from build.tensorrt_engine import (
    EnginePlan,
    PackedPlan,
    build_engine,
    builder,
    engine_information,
    engine_runner,
    is_available,
    plan_for,
    profiles,
)
from build.triton_config import ServingLimits, bucket_lengths
from ranking.errors import InputError
from ranking.text import EncodedPair

NEEDS_TENSORRT = pytest.mark.skipif(not is_available(), reason="TensorRT is not installed")

PLAN = EnginePlan(lengths=(32, 64, 128), max_batch=64, optimal_batch=48)


def test_every_bucket_length_has_its_own_profile_and_they_do_not_overlap():
    shapes = PLAN.shapes()
    assert [s["input_ids"] for s in shapes] == [((1, n), (48, n), (64, n)) for n in (32, 64, 128)]
    found = profiles(PLAN)
    for profile, length in zip(found, (32, 64, 128)):
        assert set(profile) == {"input_ids", "attention_mask", "token_type_ids"}
        assert tuple(profile["token_type_ids"].max) == (64, length)
        assert tuple(profile["attention_mask"].min) == (1, length)


def test_the_builder_is_made_without_tensorrt(exported, tmp_path):
    loader = builder(exported, PLAN, tmp_path / "timing.cache")
    config = loader._config  # Polygraphy keeps what it was given until it is called
    assert len(config.profiles) == 3 and loader._network.strongly_typed
    assert loader.timing_cache_path == str(tmp_path / "timing.cache")
    assert not config.fp16 and not config.int8


@pytest.mark.parametrize("longest", [60, 100, 185, 193, 200, 260])
def test_a_padded_batch_always_fits_the_last_bucket(longest):
    plan = EnginePlan(tuple(bucket_lengths(ServingLimits(), "tensorrt", longest)), max_batch=64, optimal_batch=48)
    for length in range(1, longest + 1):
        feed = pad_to_longest([EncodedPair([5] * length, 0)], pad_id=0)
        number, edge = plan.profile_for(feed["input_ids"].shape[1])
        assert length <= edge <= plan.lengths[-1] and plan.lengths[number] == edge


def test_a_batch_that_is_too_long_is_refused_with_its_length():
    with pytest.raises(InputError, match="a batch of 136 tokens: the engine's longest profile holds 128"):
        PLAN.profile_for(136)


def test_a_packed_engine_has_one_profile_that_holds_every_merge_of_full_lists():
    limits = ServingLimits(graph="packed").for_target("tensorrt")
    lengths = bucket_lengths(limits, "tensorrt", 130)
    plan = plan_for(limits, lengths, workspace_gib=1.0)
    assert isinstance(plan, PackedPlan) and lengths == [136]
    (profile,) = profiles(plan)
    assert tuple(profile["input_ids"].max) == tuple(profile["position_ids"].max) == (4 * 16384,)
    assert tuple(profile["lengths"].opt) == (48,) and tuple(profile["lengths"].max) == (4 * 256,)


def test_calls_of_both_plans_hold_every_row_once():
    pairs = [EncodedPair([5 + n] * n, 0) for n in range(3, 33)]
    feed = pad_to_longest(pairs, pad_id=0)
    padded = EnginePlan(lengths=(16, 48), max_batch=8, optimal_batch=8).calls(feed)
    assert [(number, call["input_ids"].shape) for number, call in padded] == [(1, (8, 48))] * 3 + [(1, (6, 48))]
    packed = PackedPlan(longest=32, max_tokens=320, max_pairs=16, optimal_pairs=8).calls(feed)
    assert [len(call["lengths"]) for _, call in packed] == [10, 10, 10]
    tokens = np.concatenate([call["input_ids"] for _, call in packed])
    assert tokens.tolist() == [token for pair in pairs for token in pair.ids]
    with pytest.raises(InputError, match="a pair of 32 tokens: the engine's window holds 24"):
        PackedPlan(longest=24, max_tokens=320, max_pairs=16, optimal_pairs=8).calls(feed)


@pytest.mark.gpu
@NEEDS_TENSORRT
def test_the_engine_scores_as_the_graph_does(exported, checkpoint, tmp_path):
    from build.export_onnx import example_inputs, load_encoder, torch_runner

    path = build_engine(exported, tmp_path, PLAN, tmp_path / "timing.cache")
    encoder = load_encoder(checkpoint)
    feed = example_inputs(70, 40, encoder.model.config.vocab_size)
    np.testing.assert_allclose(engine_runner(path, PLAN)(feed), torch_runner(encoder)(feed), atol=1e-3)
    report = read_attention(engine_information(path), softmax_nodes(exported))
    assert report.layers > 0 and report.softmaxes == 2, report.line()


@pytest.mark.skipif(is_available(), reason="TensorRT is installed")
def test_without_tensorrt_the_build_says_so(exported, tmp_path):
    with pytest.raises((InputError, ImportError), match=r"tensorrt|TensorRT"):
        build_engine(exported, tmp_path, PLAN, tmp_path / "timing.cache")
