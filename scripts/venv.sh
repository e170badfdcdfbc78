# Sourced by the other scripts: makes .venv on a fresh machine with Python 3.11 or newer, from the
# hashed lists in requirements/. Uses uv where there is one, else puts one into .venv.
# shellcheck shell=sh
# Images of Python often set it. Without compiled modules each supervisor that is started compiles its own anew, which
# doubles the time that a start takes; of the tests there are thousands.
unset PYTHONDONTWRITEBYTECODE
venv() {
  list=requirements/$1.txt
  stamp=.venv/.installed-$1
  if [ -f "$stamp" ] && [ ! "$list" -nt "$stamp" ] && [ ! pyproject.toml -nt "$stamp" ]; then return 0; fi
  python=${PYTHON:-python3}
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "botlease needs Python 3.11 or newer; set PYTHON=/path/to/python3.11 ('$python' is not)" >&2
    return 1
  fi
  uv=$(command -v uv || true)
  # One that was begun and not finished, for want of python3-venv say, has a python and nothing to install with.
  [ -x .venv/bin/python ] && { [ -n "$uv" ] || [ -x .venv/bin/uv ] || [ -x .venv/bin/pip ]; } || "$python" -m venv .venv || {
    echo "cannot make .venv: on Debian and Ubuntu, apt-get install python3-venv" >&2
    return 1
  }
  if [ -z "$uv" ]; then
    [ -x .venv/bin/uv ] || .venv/bin/python -m pip install --quiet --require-hashes -r requirements/uv.txt || return 1
    uv=.venv/bin/uv
  fi
  echo "installing $list into .venv (once)" >&2
  "$uv" pip install --quiet --compile-bytecode --python .venv/bin/python --require-hashes -r "$list" || return 1
  "$uv" pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation -e . || return 1
  touch "$stamp"
}

# The Node frameworks among the test bots. Where there is no npm, their tests say that they were skipped.
node_bots() {
  if [ -f tests/bots/node/node_modules/.package-lock.json ]; then return 0; fi
  if ! command -v npm >/dev/null && [ "${CI:-}" = true ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get update && apt-get install -y --no-install-recommends nodejs npm; } >/dev/null 2>&1 || true
  fi
  command -v npm >/dev/null || return 0
  echo "installing the Node bots into tests/bots/node (once)" >&2
  (cd tests/bots/node && npm ci --omit=optional --no-audit --no-fund --loglevel=error >/dev/null) || true
}

# What is compared with, in an environment of its own: nothing of it may come near to what we depend on.
peers() {
  stamp=.venv-peers/.installed
  if [ -f "$stamp" ] && [ ! requirements/peers.txt -nt "$stamp" ]; then return 0; fi
  [ -x .venv-peers/bin/python ] || .venv/bin/python -m venv .venv-peers || return 1
  echo "installing requirements/peers.txt into .venv-peers (once)" >&2
  "${uv:-$(command -v uv || echo .venv/bin/uv)}" pip install --quiet --compile-bytecode --python .venv-peers/bin/python \
    --require-hashes -r requirements/peers.txt || return 1
  touch "$stamp"
}
