"""The same BERT as a graph that a GPU engine runs with less work: fused attention inputs, and a layout without padding.

PaddedEncoder takes the three tensors of ranking/encoder_inputs.py. PackedEncoder takes the tokens of all pairs one
after the other, with no padding between them. Both compute what transformers' BertForSequenceClassification computes:

- query, key and value come from one matrix product instead of three;
- the factor 1/sqrt(head width) is folded into the query's weights, so that attention is product, mask, softmax and
  product, which engines recognise and fuse;
- the mask chooses by a Boolean between a logit and MASKED. The additive mask of -3.4e38 has no place in fp16, and
  would keep every addition of a mask in fp32.

In the packed layout, matrix products, LayerNorm and GELU see real tokens alone. Attention reads each pair through a
window of the longest pair's length (a gather), and puts its result back (a second gather): plain ONNX operators, since
no engine's ragged attention can be named from PyTorch. Attention is a few percent of the work at these lengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from ranking.encoder_inputs import INPUTS

MASKED = -1e4  # far below any attention logit, its exponential is exactly zero in fp32, and fp16 can hold it


class EngineEncoder(nn.Module):
    """What both layouts share: the trained modules, with query, key and value in one product per layer."""

    inputs = INPUTS  # of the same model's padded graph

    def __init__(self, model: BertForSequenceClassification):
        super().__init__()
        self.model = model
        self.heads = model.config.num_attention_heads
        layers: Any = model.bert.encoder.layer
        self.joint = nn.ModuleList(joint_projection(layer.attention.self) for layer in layers)

    def embed(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Int tensors of one shape (position_ids may broadcast to it) -> states [..., width]."""
        tables = self.model.bert.embeddings
        words = tables.word_embeddings(input_ids) + tables.token_type_embeddings(token_type_ids)
        return tables.LayerNorm(words + tables.position_embeddings(position_ids))

    def attend(self, joint: Tensor, inside: Tensor) -> Tensor:
        """joint: [rows, length, 3 x width], queries already scaled; inside: bool [rows, length], tokens that exist.

        Returns [rows, length, width].
        """
        rows, length, _ = joint.shape
        query, key, value = joint.view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        logits = query @ key.transpose(2, 3)
        weights = torch.where(inside[:, None, None, :], logits, MASKED).softmax(-1)
        return (weights @ value).transpose(1, 2).reshape(rows, length, -1)

    def finish_layer(self, number: int, states: Tensor, context: Tensor) -> Tensor:
        """Attention's output projection and the feed-forward part of a layer, each with its residual and LayerNorm."""
        layer: Any = self.model.bert.encoder.layer[number]
        attended = layer.attention.output(context, states)
        return layer.output(layer.intermediate(attended), attended)

    def score(self, first_states: Tensor) -> Tensor:
        """States of the first token of each pair [rows, width] -> raw logits [rows, 1]."""
        pool: Any = self.model.bert.pooler
        return self.model.classifier(pool(first_states[:, None]))


class PaddedEncoder(EngineEncoder):
    """input_ids, attention_mask, token_type_ids: int [rows, length] -> raw logits float32 [rows, 1]."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Raw logits, float32 [rows, 1]."""
        inside = attention_mask > 0
        positions = self.model.bert.embeddings.position_ids[:, : input_ids.shape[1]]
        states = self.embed(input_ids, token_type_ids, positions)
        for number, project in enumerate(self.joint):
            states = self.finish_layer(number, states, self.attend(project(states), inside))
        return self.score(states[:, 0])


class PackedEncoder(EngineEncoder):
    """The tokens of all pairs in one row, and each pair's length -> raw logits float32 [pairs].

    longest: tokens of the longest pair that may come; attention reads every pair through a window of this length.
    """

    window: Tensor  # int [longest]: 0, 1, 2, ...

    def __init__(self, model: BertForSequenceClassification, longest: int):
        super().__init__(model)
        self.register_buffer("window", torch.arange(longest), persistent=False)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor, lengths: Tensor) -> Tensor:
        """input_ids, token_type_ids, position_ids: int [tokens]; lengths: int [pairs], adding up to `tokens`.

        position_ids counts from 0 within each pair. Requests that Triton concatenates stay correct, because nothing
        here counts from the start of a request. Returns raw logits, float32 [pairs].
        """
        tokens, longest = input_ids.shape[0], self.window.shape[0]
        ends = lengths.long().cumsum(0)
        starts = ends - lengths
        # pair and place in the window -> token; places behind a pair's end read some token, which the mask hides
        token_at = (starts[:, None] + self.window).clamp(max=tokens - 1)
        inside = self.window < lengths[:, None]
        pair_of_token = (position_ids == 0).long().cumsum(0) - 1
        place = pair_of_token * longest + position_ids
        states = self.embed(input_ids, token_type_ids, position_ids)
        for number, project in enumerate(self.joint):
            context = self.attend(project(states)[token_at], inside)
            states = self.finish_layer(number, states, context.flatten(0, 1)[place])
        return self.score(states[starts])[:, 0]


def joint_projection(attention: Any) -> nn.Linear:
    """Query, key and value weights of a self-attention as one linear layer, the query's divided by sqrt(head width)."""
    parts: Sequence[nn.Linear] = (attention.query, attention.key, attention.value)
    scales = (1 / math.sqrt(attention.attention_head_size), 1.0, 1.0)
    joint = nn.Linear(parts[0].in_features, sum(part.out_features for part in parts))
    with torch.no_grad():
        joint.weight.copy_(torch.cat([part.weight * scale for part, scale in zip(parts, scales)]))
        joint.bias.copy_(torch.cat([part.bias * scale for part, scale in zip(parts, scales)]))
    return joint
