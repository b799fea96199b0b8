#!/bin/sh
# setup.sh VENV ARGUMENT...: make the virtual environment VENV, or go on with it, and `pip install ARGUMENT...` in it.
# What is missing is one line. PYTHON names the interpreter (default: that of VENV, else python3), CXX the compiler.
set -u
cd "$(dirname "$0")" || exit 1
venv=$1 python=$1/bin/python unfinished=$1/.unfinished log=build/setup.log
shift

fail() {
  echo "setup: $*" >&2
  exit 1
}

version_of() { # INTERPRETER
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

usable() { # whether VENV is complete and of the interpreter that was asked for
  [ ! -e "$unfinished" ] && "$python" -m pip --version >/dev/null 2>&1 &&
    [ "$(version_of "${PYTHON:-$python}")" = "$(version_of "$python")" ]
}

bounds=$(sed -n 's/^requires-python = ">=3\.\([0-9]*\),<3\.\([0-9]*\)"$/\1 \2/p' pyproject.toml)
least=${bounds% *} most=$((${bounds#* } - 1))
supported="Python 3.$least to 3.$most"
usable && PYTHON=$python
PYTHON=${PYTHON:-python3}
found=$(version_of "$PYTHON") ||
  fail "there is no $PYTHON; install $supported, or name it: make PYTHON=python3.$least"
minor=${found#3.}
[ "$found" != "$minor" ] && [ "$minor" -ge "$least" ] && [ "$minor" -le "$most" ] ||
  fail "$PYTHON is Python $found, and $supported is needed; name another: make PYTHON=python3.$least"
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "$PYTHON cannot make virtual environments; install its venv module (Debian, Ubuntu: python$found-venv)"
"$PYTHON" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null ||
  fail "$PYTHON has no C headers; install them (Debian, Ubuntu: python$found-dev)"

compiler=${CXX:-}
for name in c++ g++ clang++; do # CMake's order
  [ -n "$compiler" ] || ! command -v "$name" >/dev/null || compiler=$name
done
[ -n "$compiler" ] || fail "there is no C++ compiler; install one (Debian, Ubuntu: g++), or name it: CXX=..."
# CXX may hold options, so it is split into words.
echo '#include <span>' | $compiler -std=c++20 -x c++ -fsyntax-only - >/dev/null 2>&1 ||
  fail "$compiler does not compile C++20; install GCC 11 or Clang 14 or newer, or name one: CXX=..."

mkdir -p build
if ! usable; then
  echo "setup: $venv with Python $found; this takes minutes"
  "$PYTHON" -m venv --clear "$venv" >"$log" 2>&1 || fail "$PYTHON cannot make $venv: $(tail -n 1 "$log")"
fi
touch "$unfinished" # what is interrupted is begun anew: pip takes a half-copied package for an installed one
if ! "$python" -m pip install -q -c constraints.txt "$@" >"$log" 2>&1; then
  lacks=$(sed -n 's/.*No matching distribution found for //p' "$log" | tail -n 1)
  if [ -n "$lacks" ] || grep -qE 'NewConnectionError|Timeout|NameResolutionError|ProxyError|SSLError' "$log"; then
    rm "$unfinished" # it had not begun to copy
    fail "pip cannot get ${lacks:-packages}: go online, or set PIP_INDEX_URL or PIP_PROXY; all it said: $log"
  fi
  fail "pip: $(sed -n 's/^ *ERROR: //p' "$log" | tail -n 1); all it said: $log"
fi
rm "$unfinished"
