#!/bin/sh
# A worker: a service of type web must open a port, and may be put to sleep.
set -eu
koyeb service create @APP@ --app @APP@ --type worker --git "${REPOSITORY:?github.com/you/@APP@}" --git-branch main \
  --git-run-command "botlease run -- @START@" --min-scale 1 --max-scale 1 --deployment-strategy rolling
