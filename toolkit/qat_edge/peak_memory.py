"""Peak resident memory of this process and of commands that it runs, and errors where there was not enough."""

from __future__ import annotations

import subprocess
import sys

if sys.platform == "win32":
    from contextlib import suppress
    from threading import Event, Thread

    import psutil
else:
    import os
    import resource

# In the message of a RuntimeError of torch: the CPU's allocator has no class of its own.
OUT_OF_MEMORY = ("can't allocate memory", "out of memory")
POLL_S = 0.5  # between two readings of a command's memory on Windows


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether Python, torch's allocator for the CPU or one for a GPU had no memory left."""
    in_text = any(text in str(error) for text in OUT_OF_MEMORY)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and in_text)


def own_peak_bytes() -> int:
    """Return the peak of this process so far."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    else:
        return _peak_bytes(resource.getrusage(resource.RUSAGE_SELF))


def wait_for(process: subprocess.Popen[bytes]) -> int:
    """Wait for a command, set its exit code, and return the peak of its largest process."""
    if sys.platform == "win32":
        return _wait_and_poll(process)
    else:
        # wait4 tells the peak memory, too.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        return _peak_bytes(usage)


if sys.platform == "win32":

    def _wait_and_poll(process: subprocess.Popen[bytes]) -> int:
        """Wait for a command while a thread reads the memory of its processes.

        Python in a virtual environment is a small program there that starts the real one.
        """
        peaks, ended = [0], Event()

        def poll() -> None:
            while not ended.wait(POLL_S):
                # A process may end while it is being read.
                with suppress(psutil.Error):
                    started = psutil.Process(process.pid)
                    for each in (started, *started.children(recursive=True)):
                        with suppress(psutil.Error):
                            peaks.append(int(each.memory_info().peak_wset))

        reader = Thread(target=poll, daemon=True)
        reader.start()
        try:
            process.wait()
        finally:
            ended.set()
            reader.join()
        return max(peaks)

else:

    def _peak_bytes(usage: resource.struct_rusage) -> int:
        return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # Linux counts in KiB
