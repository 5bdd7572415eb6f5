"""Small versions of what benchmarks/teacher/labelling.py measures: two servers against one, memory against corpus
size."""

from __future__ import annotations

from benchmarks.teacher.labelling_corpus import label, stub_servers, write_candidates


def test_two_servers_label_nearly_twice_as_fast(teacher_folder, tmp_path):
    path = write_candidates(tmp_path / "candidates.parquet", 480, seed=0)
    rates = []
    for count in (1, 2):
        with stub_servers(count, teacher_folder, "--latency=0.2", "--capacity=16") as urls:
            timed = label(path, tmp_path / str(count), urls, teacher_folder, "--in-flight=16", "--shard-rows=160")
        rates.append(timed.pairs_per_second)
    assert rates[0] <= 85  # 16 places of 200 ms
    assert rates[1] > 1.3 * rates[0]  # 1.9 and more on a quiet machine: docs/results/labelling.md


def test_memory_does_not_grow_with_the_corpus(teacher_folder, tmp_path):
    peaks = []
    with stub_servers(1, teacher_folder) as urls:
        for rows in (4_000, 40_000):
            path = write_candidates(tmp_path / f"{rows}.parquet", rows, seed=0)
            flags = ("--shard-rows=1000", "--in-flight=64")
            peaks.append(label(path, tmp_path / str(rows), urls, teacher_folder, *flags).peak_mb)
    assert peaks[0] > 50 and peaks[1] - peaks[0] < 60
