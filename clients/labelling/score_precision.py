"""Notices a server that rounds scores to 16 bits although its model asks for a 32-bit head.

vLLM before 0.26 ignores `head_dtype` for generation and says nothing: labels would come in steps (0.03 apart for bf16
scores of 4 to 8), with ties between documents. The server does not tell its version, but such scores are easily told:
the low bits of every float32 are zero.
"""

from __future__ import annotations

import struct

from ranking.errors import InputError

ENOUGH_SCORES = 64  # a score of full precision looks rounded once in 8,192 times
LOW_BITS = (1 << 13) - 1  # mantissa bits of a float32 that neither bf16 nor fp16 has


class PrecisionCheck:
    """Watches the first scores of one server. head_dtype: what the model's config promises, "" for nothing."""

    def __init__(self, head_dtype: str, where: str):
        self._where, self._left = where, ENOUGH_SCORES if head_dtype == "float32" else 0

    def see(self, score: float) -> None:
        """InputError once ENOUGH_SCORES scores are there and every one is rounded to 16 bits."""
        if not self._left:
            return
        (bits,) = struct.unpack("<I", struct.pack("<f", score))
        if bits & LOW_BITS:
            self._left = 0
            return
        self._left -= 1
        if not self._left:
            raise InputError(
                f"{self._where}: all of {ENOUGH_SCORES} scores are rounded to 16 bits, though the model asks for a "
                "float32 head: its vLLM is older than 0.26. Serve with a newer image (compose.yaml names one), or "
                "publish the teacher with --dtype float32"
            )
