"""Spark Connect: what prepare_clicks and sample_candidates make at a server is what DuckDB makes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ranking import spark_engine
from ranking.errors import InputError
from ranking.query_engine import QueryEngineSettings
from ranking.schema import TABLES
from serving.temporary_server import free_ports
from tests.helpers.messy_log import good_events, write_messy_log, write_pool

SECONDS = 500


@pytest.fixture(scope="module")
def connect_server(tmp_path_factory) -> Iterator[str]:
    """A Spark Connect server, as `start-connect-server.sh` starts it; its address."""
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java: apt-get install openjdk-17-jre-headless")
    pyspark = pytest.importorskip("pyspark", reason="Spark is an extra: pip install 'disranker[spark]'")

    (port,), folder = free_ports(1), tmp_path_factory.mktemp("server")
    settings = {
        "spark.connect.grpc.binding.address": "127.0.0.1", "spark.connect.grpc.binding.port": str(port),
        "spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1", "spark.ui.enabled": "false",
        "spark.log.level": "ERROR", "spark.sql.shuffle.partitions": "2", "spark.sql.codegen.wholeStage": "false",
        "spark.sql.adaptive.enabled": "false",
        "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
    }  # fmt: skip
    command = [str(Path(pyspark.__file__).parent / "bin" / "spark-submit"), "--master", "local[2]"]
    command += ["--class", "org.apache.spark.sql.connect.service.SparkConnectServer"]
    command += [word for pair in settings.items() for word in ("--conf", "=".join(pair))]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "spark-internal"], cwd=folder, env=os.environ | {"SPARK_LOCAL_IP": "127.0.0.1"}, stdout=log,
            stderr=log,
        )  # fmt: skip
    try:
        until = time.monotonic() + SECONDS
        while True:
            with closing(socket.socket()) as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None and time.monotonic() < until, (folder / "log").read_text()[-3000:]
            time.sleep(0.2)
        yield f"sc://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


def run(program: str, *flags: str | Path) -> subprocess.CompletedProcess:
    """The program in a process of its own: what speaks to Spark Connect once does so in every later session."""
    command = [sys.executable, "-m", f"training.{program}", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)


def test_clicks_and_samples_made_at_a_server_are_duckdbs(connect_server, tmp_path):
    log, pool, events = write_messy_log(tmp_path / "log"), write_pool(tmp_path / "pool"), tmp_path / "events.parquet"
    pq.write_table(pa.Table.from_pylist(good_events(), TABLES["events"].schema), events)
    of_clicks = ["--events", log, "--on-bad-row", "reject", "--min-impressions", 3, "--privacy.min-users", 4]
    of_sample = ["--pool", pool, "--events", events, "--on-bad-row", "reject", "--queries", 4]
    made = []
    for engine, flags in ("duckdb", []), ("spark", ["--spark-master", connect_server]):
        out = tmp_path / f"by {engine} [1]"
        out.mkdir()
        flags = ["--engine", engine, *flags, "--out"]
        for done in (
            run(
                "prepare_clicks", *of_clicks, "--shown-documents", out / "shown.parquet", *flags, out / "clicks.parquet"
            ),
            run("sample_candidates", *of_sample, *flags, out / "sample.parquet"),
        ):
            assert done.returncode == 0, done.stderr[-3000:]
        reports = [json.loads((out / f"{name}.report.json").read_text()) for name in ("clicks", "sample")]
        assert connect_server not in json.dumps(reports[0].pop("settings"))  # it may hold a token
        tables = [pq.read_table(out / f"{name}.parquet") for name in ("clicks", "shown", "sample")]
        made.append((reports, tables, sorted(path.name for path in out.iterdir())))
    assert made[0] == made[1]
    assert [len(table) > 10 for table in made[0][1]] == [True] * 3


def test_a_server_that_is_not_there_and_an_address_that_is_none_are_told_without_the_token(tmp_path, monkeypatch):
    pytest.importorskip("pyspark", reason="Spark is an extra: pip install 'disranker[spark]'")
    monkeypatch.setattr(spark_engine, "ANSWER_SECONDS", 0.5)
    nobody = f"sc://127.0.0.1:{free_ports(1)[0]}"
    for master, said in (
        (f"{nobody}/;token=secret", f"{nobody}: no Spark Connect server answers"),
        ("sc:///;token=secret", "no session of Spark Connect: .*Hostname is missing"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            QueryEngineSettings(engine="spark", spark_master=master).open_engine(tmp_path)
        assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
