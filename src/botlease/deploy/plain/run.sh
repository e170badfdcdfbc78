#!/bin/sh
# A second start on this machine is refused while the first one runs; BOTLEASE_DEPLOYMENT=2 ./run.sh takes over.
set -eu
cd "$(dirname "$0")"
exec botlease run -- @START@
