"""A small process that starts the child, so that the floor has no more in it than the child's own start: the bench is a
large program with threads, and to fork that takes longer than what is measured.

On each line of standard input it starts the command that the line names (words divided by NUL) and says when, by
CLOCK_BOOTTIME; on an empty one it kills what it has started.
"""

import os
import sys
import time

pid = 0
for line in sys.stdin:
    if line == "\n":
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        print("gone", flush=True)
        continue
    words = line.rstrip("\n").split("\0")
    began = time.clock_gettime(time.CLOCK_BOOTTIME)
    pid = os.posix_spawn(words[0], words, os.environ)
    print(f"{began:.6f}", flush=True)
