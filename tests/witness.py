"""A bot that does nothing but leave witness: it appends "pid term boottime" every few milliseconds.

One clock domain, one machine, O_APPEND: overlaps between two of them are exact. Options:
--deaf (ignores SIGTERM), --slow S (needs S seconds to stop), --daemon (double-forks and lets the grandchild
leave witness), --exit N (ends with N after --for S seconds), --plain (stdlib only: no botlease import).
"""

import os
import signal
import sys
import time

args = sys.argv[1:]
path = args.pop(0)
option = dict(zip(args[::2], args[1::2], strict=False))
fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
stopping = []


def stop(number, frame):
    if "--deaf" in option:
        return
    stopping.append(time.clock_gettime(time.CLOCK_BOOTTIME) + float(option.get("--slow", 0)))


signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
if "--daemon" in option and os.fork():
    pass
elif "--daemon" in option:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork():
        os._exit(0)
ends = time.clock_gettime(time.CLOCK_BOOTTIME) + float(option.get("--for", 1e9))
term = os.environ.get("BOTLEASE_TERM", "0")
while True:
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    if stopping and now >= stopping[0]:
        os.write(fd, f"{os.getpid()} {term} {now:.6f}\n".encode())
        os._exit(int(option.get("--stop-code", 0)))
    if now >= ends:
        os._exit(int(option.get("--exit", 0)))
    os.write(fd, f"{os.getpid()} {term} {now:.6f}\n".encode())
    time.sleep(0.002)
