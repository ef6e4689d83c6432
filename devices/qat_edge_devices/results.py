"""What comes back from a device, typed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LoadFigures:
    """The runtime that ran an artifact, and what loading it cost.

    threads: CPUs the process was pinned to (what was asked, or fewer where the device has fewer).
    pool_threads: threads in the runtime's own pool, None where it does not say.
    load_ms: until the first token can be asked for; the file may lie in the system's cache already.
    context_length: tokens the KV cache holds, None where the artifact does not say.
    baseline_rss_bytes: resident memory with the runtime imported and nothing loaded.
    peak_rss_bytes: most memory resident from then on, the logits held for `score` included.
    peak_includes_import: the kernel could not forget what importing took, so the peak may be the import's.
    """

    runtime: str
    runtime_version: str
    threads: int
    pool_threads: int | None
    context_length: int | None
    load_ms: float
    baseline_rss_bytes: int
    peak_rss_bytes: int
    peak_includes_import: bool

    @property
    def artifact_rss_bytes(self) -> int:
        """Peak memory beyond the bare runtime's."""
        return self.peak_rss_bytes - self.baseline_rss_bytes


@dataclass(frozen=True)
class Scored:
    """Logits of one sequence: a .npy file, float32, (tokens, vocabulary); row t predicts token t + 1."""

    index: int
    logits: Path
    load: LoadFigures


@dataclass(frozen=True)
class Answer:
    """Greedy continuation of one prompt, without the end token. stopped: "eos", "length" or "context"."""

    ids: tuple[int, ...]
    stopped: str
    ttft_ms: float


@dataclass(frozen=True)
class Generated:
    """One answer a prompt, in the order asked."""

    answers: tuple[Answer, ...]
    load: LoadFigures


@dataclass(frozen=True)
class Speed:
    """Timed repeats, the warm-up left out.

    cores_busy: CPU seconds per second while they ran; well under `load.threads`, other work held the CPUs.
    """

    prefill_tokens_per_s: tuple[float, ...]
    decode_tokens_per_s: tuple[float, ...]
    ttft_ms: tuple[float, ...]
    cores_busy: float
    load: LoadFigures
