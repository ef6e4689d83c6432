"""Memory of this process and of the machine on Windows, by kernel32: the standard library has no function for it."""

from __future__ import annotations

import ctypes
import sys
from ctypes import wintypes

if sys.platform == "win32":

    class ProcessMemoryCounters(ctypes.Structure):
        """PROCESS_MEMORY_COUNTERS: https://learn.microsoft.com/windows/win32/api/psapi/"""

        _fields_ = (
            ("cb", wintypes.DWORD), ("PageFaultCount", wintypes.DWORD),
            ("PeakWorkingSetSize", ctypes.c_size_t), ("WorkingSetSize", ctypes.c_size_t),
            ("QuotaPeakPagedPoolUsage", ctypes.c_size_t), ("QuotaPagedPoolUsage", ctypes.c_size_t),
            ("QuotaPeakNonPagedPoolUsage", ctypes.c_size_t), ("QuotaNonPagedPoolUsage", ctypes.c_size_t),
            ("PagefileUsage", ctypes.c_size_t), ("PeakPagefileUsage", ctypes.c_size_t),
        )  # fmt: skip

    class MemoryStatus(ctypes.Structure):
        """MEMORYSTATUSEX: https://learn.microsoft.com/windows/win32/api/sysinfoapi/"""

        _fields_ = (
            ("dwLength", wintypes.DWORD), ("dwMemoryLoad", wintypes.DWORD),
            ("ullTotalPhys", ctypes.c_uint64), ("ullAvailPhys", ctypes.c_uint64),
            ("ullTotalPageFile", ctypes.c_uint64), ("ullAvailPageFile", ctypes.c_uint64),
            ("ullTotalVirtual", ctypes.c_uint64), ("ullAvailVirtual", ctypes.c_uint64),
            ("ullAvailExtendedVirtual", ctypes.c_uint64),
        )  # fmt: skip

    def resident_bytes() -> int:
        """Return the working set of this process: its memory that is resident now."""
        return int(_counters().WorkingSetSize)

    def peak_bytes() -> int:
        """Return the peak of the working set of this process."""
        return int(_counters().PeakWorkingSetSize)

    def machine_bytes() -> tuple[int, int]:
        """Return the bytes of installed memory, and of memory available now."""
        status = MemoryStatus(dwLength=ctypes.sizeof(MemoryStatus))
        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel.GlobalMemoryStatusEx.argtypes = (ctypes.POINTER(MemoryStatus),)
        if not kernel.GlobalMemoryStatusEx(ctypes.byref(status)):
            raise ctypes.WinError(ctypes.get_last_error())
        return int(status.ullTotalPhys), int(status.ullAvailPhys)

    def _counters() -> ProcessMemoryCounters:
        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel.GetCurrentProcess.restype = wintypes.HANDLE
        read = kernel.K32GetProcessMemoryInfo
        read.argtypes = (wintypes.HANDLE, ctypes.POINTER(ProcessMemoryCounters), wintypes.DWORD)
        counters = ProcessMemoryCounters(cb=ctypes.sizeof(ProcessMemoryCounters))
        if not read(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.cb):
            raise ctypes.WinError(ctypes.get_last_error())
        return counters
