"""First step of the ensemble variant: text to one padded batch; the encoder is the second step. No length buckets."""

from __future__ import annotations

import triton_python_backend_utils as pb_utils
from front import TritonPythonModel as Front
from request_fields import read_fields

from ranking.encoder_inputs import pad


class TritonPythonModel(Front):
    """The front without its calls to the encoder: it answers with the padded tensors."""

    async def _answer(self, request):
        encoder = self.encoder
        pairs = encoder.text.encode_together(*read_fields(request, self.max_documents))
        length = next(edge for edge in encoder.edges if edge >= pairs.lengths.max())
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, values) for name, values in pad(pairs, length, encoder.text.pad_id).items()]
        )
