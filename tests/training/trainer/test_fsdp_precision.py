"""Sharded over two processes, a teacher gives the float32 logits of one process. FSDP itself on the CPU, over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForSequenceClassification, LlamaConfig

from ranking.errors import InputError
from training.teacher.score_head import install_pooling
from training.trainer.fsdp_precision import SCORE_POLICY, use_score_policy

POLICIES = ("one process", "ours", "accelerate's")


def accelerates_policy():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    return plugin


def logits(policy: str) -> torch.Tensor:
    """A random teacher's logits [6, 1] under bf16 autocast; sharded over all processes unless policy is the first."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_labels=1
    )
    model = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    install_pooling(model, "last_token")
    if policy != "one process":
        chosen = SCORE_POLICY if policy == "ours" else accelerates_policy().mixed_precision_policy
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=chosen)
        fully_shard(model, mesh=mesh, mp_policy=chosen)
    ids = torch.randint(3, 100, (6, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def main(out: Path) -> None:
    """What each of the two processes runs; the first one writes the logits of every policy."""
    torch.distributed.init_process_group("gloo")
    found = {policy: logits(policy) for policy in POLICIES}
    if torch.distributed.get_rank() == 0:
        assert {policy: value.dtype for policy, value in found.items()} == {
            "one process": torch.float32, "ours": torch.float32, "accelerate's": torch.bfloat16,
        }  # fmt: skip
        np.savez(out, **{policy: value.float().numpy() for policy, value in found.items()})
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_logits_of_one(tmp_path):
    out = tmp_path / "logits.npz"
    root = Path(__file__).parents[3]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", __file__, str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environment, timeout=400, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = dict(np.load(out))
    errors = {policy: np.abs(found[policy] - found["one process"]).max() for policy in POLICIES[1:]}
    # bf16 states and a bf16 copy of the head's weights remain; a rounded logit costs more and makes ties
    spread = found["one process"].std()
    assert errors["ours"] < 0.02 * spread, (errors, spread)
    rounded = torch.from_numpy(found["ours"]).bfloat16().float().numpy()
    assert (rounded != found["ours"]).any() and errors["ours"] < errors["accelerate's"]


def test_the_trainer_gives_accelerate_the_policy():
    plugin = accelerates_policy()
    assert plugin.mixed_precision_policy.reduce_dtype == plugin.mixed_precision_policy.output_dtype == torch.bfloat16
    use_score_policy(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="bf16"))
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
    old = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))
    with pytest.raises(InputError, match="set fsdp_version to 2"):
        use_score_policy(SimpleNamespace(state=old, mixed_precision="bf16"))
    use_score_policy(SimpleNamespace(state=SimpleNamespace(), mixed_precision="bf16"))  # no FSDP


if __name__ == "__main__":
    main(Path(sys.argv[1]))
