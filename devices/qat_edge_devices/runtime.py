"""Interface between `validate` and the code that runs an artifact on a device: token ids in, results out.

`Runtime` has the calls; the dataclasses before it are their results. Logits stay in files, which can be larger than
memory; everything else is a value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Protocol


@dataclass(frozen=True)
class LoadStats:
    """The runtime that ran an artifact, and the cost of loading it.

    Attributes:
        runtime: name of the runtime, as its package is called.
        runtime_version: version of that package.
        threads: CPUs the process was pinned to: those requested, or fewer if the device has fewer.
        pool_threads: threads in the runtime's own pool; None if it does not report them.
        context_length: tokens the KV cache holds; None if the artifact does not state it.
        load_ms: time until the first token can be requested; the file may be in the system's cache already.
        baseline_rss_bytes: resident memory with the runtime imported and no artifact loaded.
        peak_rss_bytes: peak resident memory from then on, including the logits of `score`.
        peak_includes_import: True if the kernel could not reset the peak after the import, so it may be the import's.
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
        """Peak memory minus that of the bare runtime."""
        return self.peak_rss_bytes - self.baseline_rss_bytes


@dataclass(frozen=True)
class ScoredSequence:
    """Logits of one sequence.

    Attributes:
        index: position of the sequence in the request.
        logits: .npy file, float32 (tokens, vocabulary); row t predicts token t + 1.
        load: the runtime that computed them.
    """

    index: int
    logits: Path
    load: LoadStats


@dataclass(frozen=True)
class TracedSequence:
    """All outputs of an artifact for one sequence, except its KV cache.

    Attributes:
        outputs: .npz file of float32 arrays (tokens, features).
        names: names of the arrays in their order; the first is "logits".
    """

    outputs: Path
    names: tuple[str, ...]


@dataclass(frozen=True)
class GeneratedTokens:
    """Greedy continuation of one prompt.

    Attributes:
        ids: token ids, without the end token.
        stopped: reason it ended: "eos", "length" or "context".
        ttft_ms: time to first token, in milliseconds.
    """

    ids: tuple[int, ...]
    stopped: str
    ttft_ms: float


@dataclass(frozen=True)
class GenerationResult:
    """Completions of all prompts.

    Attributes:
        completions: one per prompt, in the order of the request.
        load: the runtime that generated them.
    """

    completions: tuple[GeneratedTokens, ...]
    load: LoadStats


@dataclass(frozen=True)
class MachineState:
    """Clocks, heat and battery of a machine at one moment, as far as it reports them.

    Attributes:
        clocks_khz: current clock of each CPU that the process may use.
        permitted_khz: maximum clock of each of them; the system lowers it when the CPU gets hot.
        times_slowed: number of times the CPUs were slowed for heat since the machine started (Intel only).
        celsius: temperature of the hottest sensor.
        battery_percent: charge of the battery.
    """

    clocks_khz: tuple[int, ...]
    permitted_khz: tuple[int, ...]
    times_slowed: int | None
    celsius: float | None
    battery_percent: int | None

    def __str__(self) -> str:
        parts = []
        clocks = sorted({f"{khz / 1e6:.1f}" for khz in self.clocks_khz})
        if clocks:
            lowest_and_highest = clocks if len(clocks) == 1 else [clocks[0], clocks[-1]]
            parts.append(f"clocks {' to '.join(lowest_and_highest)} GHz")
        if self.celsius is not None:
            parts.append(f"{self.celsius:.0f} °C")
        if self.battery_percent is not None:
            parts.append(f"battery {self.battery_percent}%")
        return ", ".join(parts)


@dataclass(frozen=True)
class TimedRun:
    """Speed of prefill and decode over several repeats, without the warm-up.

    Attributes:
        prefill_tokens_per_s: prompt tokens per second, one figure per repeat.
        decode_tokens_per_s: decoded tokens per second, one figure per repeat.
        ttft_ms: time to first token in milliseconds, one figure per repeat.
        step_ms: milliseconds of every decoded token of all repeats.
        cores_busy: CPU seconds per second during the repeats; well below `load.threads` if other work held the CPUs.
        before: state of the machine before the repeats.
        after: state of the machine after them.
        load: the runtime that was timed.
    """

    prefill_tokens_per_s: tuple[float, ...]
    decode_tokens_per_s: tuple[float, ...]
    ttft_ms: tuple[float, ...]
    step_ms: tuple[float, ...]
    cores_busy: float
    before: MachineState
    after: MachineState
    load: LoadStats

    @property
    def throttled(self) -> bool:
        """True if the system reports that it slowed the CPUs for heat during the repeats."""
        # Lists of another length come from a machine whose CPUs went offline: compare those that remain.
        permitted = zip(self.before.permitted_khz, self.after.permitted_khz, strict=False)
        lowered = any(earlier > later for earlier, later in permitted)
        return lowered or (self.after.times_slowed or 0) > (self.before.times_slowed or 0)

    def step_percentile(self, percent: int) -> float:
        """Return the milliseconds within which `percent` of the tokens were decoded, interpolated."""
        return quantiles(self.step_ms, n=100, method="inclusive")[percent - 1]

    def remarks(self) -> tuple[str, ...]:
        """Return phrases to print next to the figures."""
        remarks = [
            f"a token was decoded in {self.step_percentile(50):.2f} ms (p50), {self.step_percentile(95):.2f} ms (p95)"
        ]
        if self.throttled:
            remarks.append("throttled: the system slowed its CPUs while speed was measured")
        if str(self.before) and str(self.after):
            remarks.append(f"before timing {self.before}; after it {self.after}")
        return tuple(remarks)


class Runtime(Protocol):
    """One artifact on one device. Call `prepare` first; each later call starts a new process on the device."""

    def prepare(self, artifact: Path) -> None:
        """Send everything that is needed to run the export folder `artifact`."""

    def score(self, sequences: Sequence[Sequence[int]], decode_from: int | None = None) -> Iterator[ScoredSequence]:
        """Yield the logits of each sequence in turn. A file is deleted when the next one is requested.

        Args:
            sequences: token ids.
            decode_from: position from which tokens are fed one at a time, as in generation; None for never.
        """

    def trace(self, sequences: Sequence[Sequence[int]], decode_from: int) -> Iterator[TracedSequence]:
        """Yield all outputs of the artifact for each sequence in turn, with tokens fed as in `score`."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        eos_ids: Sequence[int],
        max_new_tokens: int,
        *,
        constrained: bool = False,
    ) -> GenerationResult:
        """Continue each prompt greedily, up to one of `eos_ids` or `max_new_tokens`.

        constrained: choose among the tokens that the artifact's grammar permits. A runtime without grammars refuses.
        """

    def speed(self, prefill: int, decode: int, repeats: int) -> TimedRun:
        """Time a prompt of `prefill` tokens and `decode` steps after its first new token, `repeats` times."""
