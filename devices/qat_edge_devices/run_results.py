"""What comes back from a device, typed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles


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
class Traced:
    """All that an artifact returned for one sequence but its cache: an .npz file of float32 (tokens, features).

    names: of its arrays, in their order; the first is "logits".
    """

    outputs: Path
    names: tuple[str, ...]


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
class Condition:
    """What a machine says of itself at one moment, as far as it does.

    clocks_khz, permitted_khz: of each CPU that the process may use, now and at most; the system lowers the second where
        it gets hot. times_slowed: by heat, since the machine was started (Intel). celsius: of the hottest sensor.
    """

    clocks_khz: tuple[int, ...]
    permitted_khz: tuple[int, ...]
    times_slowed: int | None
    celsius: float | None
    battery_percent: int | None

    def __str__(self) -> str:
        clocks = sorted({f"{khz / 1e6:.1f}" for khz in self.clocks_khz})
        said = [f"clocks {' to '.join(clocks[:: max(len(clocks) - 1, 1)])} GHz"] if clocks else []
        said += [] if self.celsius is None else [f"{self.celsius:.0f} °C"]
        said += [] if self.battery_percent is None else [f"battery {self.battery_percent}%"]
        return ", ".join(said)


@dataclass(frozen=True)
class Speed:
    """Timed repeats, the warm-up left out.

    step_ms: of every decoded token. cores_busy: CPU seconds per second while they ran; well under `load.threads`, other
    work held the CPUs. before, after: the machine's state at both ends of them.
    """

    prefill_tokens_per_s: tuple[float, ...]
    decode_tokens_per_s: tuple[float, ...]
    ttft_ms: tuple[float, ...]
    step_ms: tuple[float, ...]
    cores_busy: float
    before: Condition
    after: Condition
    load: LoadFigures

    @property
    def throttled(self) -> bool:
        """Whether the system says that it slowed the CPUs for heat meanwhile."""
        lowered = any(
            then > now for then, now in zip(self.before.permitted_khz, self.after.permitted_khz, strict=False)
        )
        return lowered or (self.after.times_slowed or 0) > (self.before.times_slowed or 0)

    def step_percentile(self, percent: int) -> float:
        """Milliseconds within which so many percent of the tokens were decoded, interpolated."""
        return quantiles(self.step_ms, n=100, method="inclusive")[percent - 1]

    def remarks(self) -> tuple[str, ...]:
        """What to know beside the figures, in phrases."""
        said = [
            f"a token was decoded in {self.step_percentile(50):.2f} ms (p50), {self.step_percentile(95):.2f} ms (p95)"
        ]
        if self.throttled:
            said.append("throttled: the system slowed its CPUs while speed was measured")
        if str(self.before) and str(self.after):
            said.append(f"before timing {self.before}; after it {self.after}")
        return tuple(said)
