"""Code in a process that has imported torch alone: a fork of one, for that import takes a second."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

SERVER = """
import json, os, sys
import torch
for line in sys.stdin:
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
code, folder, environment, files = json.loads(line)
for number, path in enumerate((os.devnull, *files)):
    os.dup2(os.open(path, os.O_RDWR), number)
os.chdir(folder)
os.environ.clear()
os.environ.update(environment)
exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    words = [sys.executable, "-c", SERVER]
    server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    atexit.register(server.communicate)  # which closes its input, and so ends it
    return server


def run(
    code: str, folder: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """As `python -c CODE` in a folder and with an environment, by default with those of this process.

    What Python and torch themselves read of the environment is that of the first call.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        given = code, str(folder or Path.cwd()), dict(environment or os.environ), (out.name, err.name)
        server.stdin.write(json.dumps(given) + "\n")
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(code, status, out.read(), err.read())
