"""What a prefix cache saves: only whole blocks of what neighbouring prompts share."""

from __future__ import annotations

from benchmarks.teacher.prefix_cache import prefix_savings


def test_a_common_beginning_shorter_than_a_block_saves_nothing():
    prompts = [[1] * 20 + [n] * 30 for n in range(2, 6)]  # 200 tokens, 20 in common
    assert prefix_savings(prompts, [16, 32]) == {
        "median tokens of a prompt": 50, "median tokens in common": 20, "saved by blocks of 16": 48 / 200,
        "saved by blocks of 32": 0,
    }  # fmt: skip
