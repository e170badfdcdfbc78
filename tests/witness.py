"""A bot that does nothing but leave witness: it appends "pid term boottime" every few milliseconds.

One clock domain, one machine, O_APPEND: overlaps between two of them are exact. Options:
--deaf (ignores SIGTERM), --slow S (needs S seconds to stop), --daemon (double-forks and lets the grandchild
leave witness), --exit N (ends with N after --for S seconds). --start S (needs S seconds before its gate), --gate fd
or url (waits there), --touch FILE (touches it at each stamp), --hang S (goes on after S seconds but touches nothing),
--say TEXT (prints it each time instead), --warned FILE (writes the names of the signals USR1 and USR2 there).
--who 1 (writes the instance and the first process of this work instead of its pid), --spawn S (every S seconds a
double-forked process of its own session that leaves witness, too; eight at most, as sixty of them took both cores from
five worlds for a minute), --user N (drops its privileges first).
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
if "--user" in option:
    os.setresuid(*(int(option["--user"]),) * 3)
first = f"{os.environ.get('BOTLEASE_INSTANCE_ID')}/{os.getpid()}"
if "--daemon" in option and os.fork():
    pass
elif "--daemon" in option:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork():
        os._exit(0)
ends = time.clock_gettime(time.CLOCK_BOOTTIME) + float(option.get("--for", 1e9))
time.sleep(float(option.get("--start", 0)))
term = os.environ.get("BOTLEASE_TERM", "")
if not term and option.get("--gate") == "fd":
    gate = int(os.environ["BOTLEASE_GATE_FD"])
    os.write(gate, b"ready\n")
    term = os.read(gate, 64).decode().strip()
    if not term:  # the other end is gone: no term will come
        os._exit(1)
elif not term and option.get("--gate") == "url":
    import json
    import urllib.request

    with urllib.request.urlopen(os.environ["BOTLEASE_GATE_URL"]) as answer:
        term = str(json.load(answer)["term"])
term = term or "0"
began = time.clock_gettime(time.CLOCK_BOOTTIME)
who = first if "--who" in option else str(os.getpid())
escapes = began + float(option.get("--spawn", 1e9))
left = 8


def warned(number, frame):
    with open(option["--warned"], "a") as f:
        f.write(signal.Signals(number).name + "\n")


if "--warned" in option:
    signal.signal(signal.SIGUSR1, warned)
    signal.signal(signal.SIGUSR2, warned)


def prove():
    if time.clock_gettime(time.CLOCK_BOOTTIME) - began > float(option.get("--hang", 1e9)):
        return
    if "--touch" in option:
        with open(option["--touch"], "w"):
            pass
    if "--say" in option:
        print(option["--say"], flush=True)


while True:
    prove()
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    if stopping and now >= stopping[0]:
        os.write(fd, f"{who} {term} {now:.6f}\n".encode())
        os._exit(int(option.get("--stop-code", 0)))
    if now >= ends:
        os._exit(int(option.get("--exit", 0)))
    if now >= escapes and left:
        escapes = now + float(option["--spawn"])
        left -= 1
        if os.fork() == 0:
            escapes = 1e9
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if os.fork():
                os._exit(0)
        else:
            os.wait()
    os.write(fd, f"{who} {term} {now:.6f}\n".encode())
    time.sleep(0.002)
