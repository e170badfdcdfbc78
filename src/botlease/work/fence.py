"""The kernel fence: a timer of the kernel that kills this process with SIGKILL at the end of trust (R2).

It needs neither the event loop nor the interpreter nor a scheduled process: a process stopped with
SIGSTOP, starved, or stuck in C code under the GIL is killed to the millisecond. It counts suspended
time (``CLOCK_BOOTTIME``). Arming costs some 2 to 5 us and needs no privilege (measured).

The first process of a pid namespace, as a container's is that has no init, cannot be killed by itself: the kernel drops
a SIGKILL that comes from within (``SIGNAL_UNKILLABLE``, ``sig_task_ignored``). There the timer sends a signal whose
handler is the C library's ``_exit``, which needs neither the interpreter nor its lock. A process that was stopped ends
by it as the first thing it does when it goes on.
"""

from __future__ import annotations

import ctypes
import os

from botlease import clock

TYPE_CHECKING = False  # the reaper is forked before typing is loaded: half a megabyte for each process
if TYPE_CHECKING:
    import signal
    from typing import Any
else:  # nor its enumerations
    import _signal as signal

_CLOCK_BOOTTIME = 7
_TIMER_ABSTIME = 1


class _SigEvent(ctypes.Structure):
    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),  # 0: SIGEV_SIGNAL
        ("pad", ctypes.c_char * 48),
    )


class _ITimerSpec(ctypes.Structure):
    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


def _library() -> Any:
    if os.uname().sysname != "Linux":
        return None
    for name in (None, "librt.so.1"):  # glibc before 2.34 keeps the timers in librt
        try:
            library = ctypes.CDLL(name, use_errno=True)
            _ = library.timer_create
        except (OSError, AttributeError):
            continue
        return library
    return None


def _deadly(library: Any) -> int:
    """The number of a signal of our own timer that ends this process whatever it does."""
    if os.getpid() != 1:
        return int(signal.SIGKILL)
    number = int(signal.SIGRTMAX)
    library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    library.signal.restype = ctypes.c_void_p
    library.signal(number, ctypes.cast(library._exit, ctypes.c_void_p))  # and so its number is the exit code
    return number


class Fence:
    """One timer for this process. Timers are not inherited by fork: every process arms its own."""

    def __init__(self) -> None:
        self._library = _library()
        self._timer = ctypes.c_void_p()
        self._spec = _ITimerSpec(0, 0, 0, 0)
        self._its = ctypes.byref(self._spec)
        self.kernel = False
        """True if the end is a kernel timer's that counts suspended time: the full promise."""
        if self._library is not None:
            event = _SigEvent(None, _deadly(self._library), 0, b"")
            if self._library.timer_create(_CLOCK_BOOTTIME, ctypes.byref(event), ctypes.byref(self._timer)) != 0:
                code = ctypes.get_errno()
                raise OSError(code, f"no kernel timer for the fence ({os.strerror(code)}): see `ulimit -i`")
            self.kernel = True

    def arm(self, until: float) -> None:
        """Be killed at ``until``; at once if that has passed."""
        if self.kernel:
            nanoseconds = max(1, int(until * 1e9))
            self._spec.value_s, self._spec.value_ns = divmod(nanoseconds, 1_000_000_000)
            if self._library.timer_settime(self._timer, _TIMER_ABSTIME, self._its, None) != 0:
                raise OSError(ctypes.get_errno(), "timer_settime failed: the fence cannot be armed")
            return
        # Elsewhere: SIGALRM, whose default action ends the process. It does not count suspended time.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, max(1e-3, until - clock.now()))

    def close(self) -> None:
        """Give the kernel its timer back. The fence cannot be armed again."""
        self.disarm()
        if self.kernel:
            self._library.timer_delete(self._timer)
            self.kernel = False

    def disarm(self) -> None:
        if self.kernel:
            self._library.timer_settime(self._timer, 0, ctypes.byref(_ITimerSpec(0, 0, 0, 0)), None)
        else:
            signal.setitimer(signal.ITIMER_REAL, 0)
