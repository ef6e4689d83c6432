"""The seam between `validate` and whatever runs an artifact on a device: token ids in, files and figures out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from qat_edge_devices.run_results import Generated, Scored, Speed, Traced


class Runtime(Protocol):
    """One artifact on one device. `prepare` comes first; each later call is a process of its own there."""

    def prepare(self, artifact: Path) -> None:
        """Send what is needed to run the export folder `artifact`."""

    def score(self, sequences: Sequence[Sequence[int]], decode_from: int | None = None) -> Iterator[Scored]:
        """Logits of each sequence in turn; a file lives until the next is asked for.

        decode_from: the place in a sequence from which on tokens are given one at a time, as an answer's are.
        """

    def trace(self, sequences: Sequence[Sequence[int]], decode_from: int) -> Iterator[Traced]:
        """All that the artifact returns for each sequence in turn, asked in the same way."""

    def generate(self, prompts: Sequence[Sequence[int]], eos_ids: Sequence[int], max_new_tokens: int) -> Generated:
        """Greedy continuations, each ended by one of `eos_ids` or by its length."""

    def speed(self, prefill: int, decode: int, repeats: int) -> Speed:
        """Timed repeats of a prompt of `prefill` tokens and `decode` steps after its first new token."""
