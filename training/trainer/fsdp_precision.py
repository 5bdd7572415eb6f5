"""Number formats under FSDP: layers compute in bf16, while gradients are added up and scores come out in float32.

Accelerate's own policy for bf16 makes everything 16 bits wide. A score then leaves the model in steps of 1/128 of its
size, in the loss, in NDCG and in the score card, although its head computes in float32; and gradients of all processes
are summed in bf16, which loses what each process adds.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import MixedPrecisionPolicy

from ranking.errors import InputError

SCORE_POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)


def use_score_policy(accelerator: Accelerator) -> None:
    """Make FSDP prepare the model with SCORE_POLICY; nothing changes without FSDP or without bf16.

    To be called before the model is prepared. InputError for FSDP's first version, which has no type for outputs.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or accelerator.mixed_precision != "bf16":
        return
    if plugin.fsdp_version != 2:
        raise InputError("fsdp_version 1 cannot keep scores in float32: set fsdp_version to 2 in accelerate's config")
    plugin.mixed_precision_policy = SCORE_POLICY
