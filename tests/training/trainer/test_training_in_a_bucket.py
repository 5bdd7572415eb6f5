"""Training whose dataset and checkpoints are on s3:// (moto's server): a kill -9, and nodes that share nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from ranking.card import ScoreCard
from ranking.limits import FieldLimits
from ranking.object_store import RECORD_NAME, Remote
from serving.temporary_server import free_ports
from tests.helpers.bucket_server import bucket_server
from training.world.dataset import WorldConfig, write_world

KNOBS = {
    "size": "tiny-2", "vocabulary_size": 800, "limits": FieldLimits(8, 8, 12), "epochs": 8, "learning_rate": 3e-3,
    "batch_groups": 8, "precision": "fp32", "log_steps": 1,
}  # fmt: skip
# A loss of score differences does not depend on these, nor does attention: their gradients are rounding alone, of which
# Adam makes whole steps.
UNSEEN = ("classifier.bias", "attention.self.key.bias")
SECONDS = 400  # two starts of torch on a busy machine


@pytest.fixture(scope="module")
def bucket():
    with bucket_server() as url:
        yield url


@pytest.fixture(scope="module")
def reference(bucket, tmp_path_factory) -> Path:
    """What one process trains on its own disk in one go; its dataset is also in the bucket."""
    folder = tmp_path_factory.mktemp("reference")
    world = WorldConfig.small(train_queries=24, dev_queries=12, test_queries=4, unlabelled_queries=40)
    write_world(world, folder / "data")
    Remote(f"{bucket}/data", folder / "data").publish()
    with training(folder / "own", folder / "data", folder / "out") as through:
        through.ends_well()
    return folder / "out"


@dataclass
class Training:
    """A training in processes of its own, and what they print."""

    process: subprocess.Popen
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def ends_well(self) -> None:
        assert self.process.wait(SECONDS) == 0, self.log[-3000:]


@contextmanager
def training(
    folder: Path, data: str | Path, out: str | Path, *flags: str, launcher: tuple[str, ...] = ()
) -> Iterator[Training]:
    """train_baseline, with working and temporary folders that no other has; its processes end with the block."""
    folder.mkdir()
    words = [f"--{k.replace('_', '-')}={json.dumps(asdict(v)) if k == 'limits' else v}" for k, v in KNOBS.items()]
    command = [sys.executable, *launcher, "-m", "training.train_baseline", "--data", str(data), "--out", str(out)]
    # one thread each: a sum of floats depends on how many threads share it
    own = {"TMPDIR": str(folder), "DISRANKER_PUBLISH_SECONDS": "0.1", "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, *words, *flags], cwd=folder, env=os.environ | own, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield Training(process, folder / "log")
    finally:
        with suppress(ProcessLookupError):  # the launcher's children, too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def losses(out: Path) -> list[float]:
    states = sorted(
        out.glob("training/checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name.split("-")[1])
    )
    return [entry["loss"] for entry in json.loads(states[-1].read_text())["log_history"] if "loss" in entry]


def assert_same_training(found: Path, reference: Path, atol: float) -> None:
    assert len(losses(found)) == len(losses(reference)) == 24
    np.testing.assert_allclose(losses(found), losses(reference), rtol=0, atol=atol)
    assert ScoreCard.load(found).metrics == pytest.approx(ScoreCard.load(reference).metrics, rel=0, abs=atol)
    weights, wanted = (load_file(folder / "model.safetensors") for folder in (found, reference))
    assert weights.keys() == wanted.keys()
    for name in wanted:
        if not (atol and name.endswith(UNSEEN)):
            np.testing.assert_allclose(weights[name], wanted[name], rtol=0, atol=atol, err_msg=name)
    vocabularies = [(folder / "tokenizer.json").read_text() for folder in (found, reference)]
    assert vocabularies[0] == vocabularies[1]


def fetched(url: str, folder: Path) -> Path:
    copy = Remote(url, folder)
    copy.fetch()
    return copy.local


def test_a_killed_and_resumed_training_in_a_bucket_equals_one_that_ran_through_on_a_disk(bucket, reference, tmp_path):
    out = f"{bucket}/killed"
    record = Remote(f"{out}/{RECORD_NAME}", tmp_path / "record")
    with training(tmp_path / "first", f"{bucket}/data", out) as cut:
        until, published = time.monotonic() + SECONDS, []
        while not any("trainer_state.json" in name for name in published):
            assert cut.process.poll() is None and time.monotonic() < until, cut.log[-3000:]
            record.fetch()
            if record.local.is_file():
                with suppress(ValueError):  # it is cut where its next state came while it was read
                    published = json.loads(record.local.read_text())["files"]
            time.sleep(0.05)
        cut.process.send_signal(signal.SIGKILL)
        cut.process.wait(30)
    assert not (fetched(out, tmp_path / "cut") / "ranker.json").exists()
    done = len(losses(tmp_path / "cut"))

    with training(tmp_path / "second", f"{bucket}/data", out, "--resume") as resumed:
        resumed.ends_well()
    assert f"step {done}:" not in resumed.log  # it did not begin again
    assert_same_training(fetched(out, tmp_path / "out"), reference, atol=0)


def test_two_nodes_that_share_nothing_but_a_bucket_train_as_one_process(bucket, reference, tmp_path):
    out = f"{bucket}/nodes"
    (port,) = free_ports(1)
    with ExitStack() as running:
        nodes = []
        for index in range(2):
            launcher = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={index}")
            where = ("--master-addr=127.0.0.1", f"--master-port={port}")
            node = training(tmp_path / f"node-{index}", f"{bucket}/data", out, launcher=launcher + where)
            nodes.append(running.enter_context(node))
        for node in nodes:
            node.ends_well()
    # the sums of two processes are added up in another order
    assert_same_training(fetched(out, tmp_path / "out"), reference, atol=1e-5)
