"""End a program together with all processes that it started: by process group, on Windows by job object."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress

if sys.platform == "win32":
    import ctypes
    from ctypes import wintypes
else:
    import os
    import signal

# Flag of `Popen`, besides start_new_session=True: Ctrl-C then reaches only this process on Windows, too.
NEW_GROUP = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
PROCESS_TERMINATE, PROCESS_SET_QUOTA = 0x0001, 0x0100  # rights that AssignProcessToJobObject needs
KILLED = 1  # exit code of processes that `kill` ends on Windows


class ProcessGroup:
    """A program and all processes that it starts.

    On Windows, a process that the program starts in the first moment, before it is added to the job, is not in it.

    Args:
        process: the program, started a moment ago with start_new_session=True and `NEW_GROUP`.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        if sys.platform == "win32":
            self._kernel = _load_kernel()
            self._job = self._kernel.CreateJobObjectW(None, None)
            # A program that has ended already cannot be added, and need not be.
            handle = self._kernel.OpenProcess(PROCESS_TERMINATE | PROCESS_SET_QUOTA, False, process.pid)
            if handle:
                self._kernel.AssignProcessToJobObject(self._job, handle)
                self._kernel.CloseHandle(handle)

    def kill(self) -> None:
        """End every process of the group; the program itself may have ended before."""
        if sys.platform == "win32":
            if self._job:
                self._kernel.TerminateJobObject(self._job, KILLED)
            self.process.kill()
        else:
            kill_group(self.process.pid)

    def close(self) -> None:
        """Release what Windows keeps for the group. Processes that still run are left alone."""
        if sys.platform == "win32" and self._job:
            self._kernel.CloseHandle(self._job)
            self._job = None


def kill_group(pid: int) -> None:
    """Kill the process group that the process `pid` leads; where there are no such groups, do nothing."""
    if sys.platform != "win32":
        with suppress(ProcessLookupError, PermissionError):  # macOS answers EPERM for a group of zombies
            os.killpg(pid, signal.SIGKILL)


if sys.platform == "win32":

    def _load_kernel() -> ctypes.WinDLL:
        """Return kernel32 with the types of the functions that are used: a handle has the size of a pointer.

        https://learn.microsoft.com/windows/win32/procthread/job-objects
        """
        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel.CreateJobObjectW.argtypes = (wintypes.LPVOID, wintypes.LPCWSTR)
        kernel.CreateJobObjectW.restype = wintypes.HANDLE
        kernel.OpenProcess.argtypes = (wintypes.DWORD, wintypes.BOOL, wintypes.DWORD)
        kernel.OpenProcess.restype = wintypes.HANDLE
        kernel.AssignProcessToJobObject.argtypes = (wintypes.HANDLE, wintypes.HANDLE)
        kernel.TerminateJobObject.argtypes = (wintypes.HANDLE, wintypes.UINT)
        kernel.CloseHandle.argtypes = (wintypes.HANDLE,)
        return kernel
