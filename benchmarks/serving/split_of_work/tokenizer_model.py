"""First step of the ensemble variant: text to one padded batch; the encoder is the second step. No length buckets."""

from __future__ import annotations

import triton_python_backend_utils as pb_utils
from front import TritonPythonModel as Front
from front import pad, read_fields


class TritonPythonModel(Front):
    """The front without its calls to the encoder: it answers with the padded tensors."""

    async def _answer(self, request):
        pairs = self.text.encode(*read_fields(request, self.max_documents))
        length = next(edge for edge in self.edges if edge >= max(len(pair.ids) for pair in pairs))
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, values) for name, values in pad(pairs, length, self.text.pad_id).items()]
        )
