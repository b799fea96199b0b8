"""JAX set-up: memory, the cache of compiled programs, and a sign of life while compiling.

`setup` has to run before anything imports jax, so this module imports it inside functions.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Resets and steps take longer to compile; the many one-line helpers of JAX do not and are not worth a file.
_CACHED_ABOVE_SECONDS = 0.2


@functools.cache
def setup() -> None:
    """Leave GPU memory to torch and keep compiled programs between processes. Does its work once."""
    too_late = _started()
    preallocate = os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "true" if too_late else "false")

    import jax

    if too_late and preallocate.lower() in ("true", "1") and jax.default_backend() == "gpu":
        warnings.warn(
            "jax was used before brc_fast.envs and will take most of the GPU's memory from torch; "
            "set XLA_PYTHON_CLIENT_PREALLOCATE=false before",
            RuntimeWarning,
            stacklevel=2,
        )
    if jax.config.jax_compilation_cache_dir is None:
        from jax.experimental.compilation_cache import compilation_cache

        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))
        # A cache that was looked for before it had a folder stays off until it is reset.
        compilation_cache.reset_cache()
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _CACHED_ABOVE_SECONDS)


def _started() -> bool:
    """Whether JAX has its devices: until then, imported or not, it takes what is set for their memory."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    started = getattr(bridge, "backends_are_initialized", lambda: "jax" in sys.modules)
    return bool(started())


def cache_folder() -> Path:
    """Where compiled and traced programs are kept: $XDG_CACHE_HOME/brc_fast, by default in ~/.cache. A user
    without a home has a folder that is gone at the end."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "brc_fast"
    try:
        return Path.home() / ".cache" / "brc_fast"
    except RuntimeError:
        return Path(_temporary().name)


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="brc_fast-", ignore_cleanup_errors=True)


def write_atomically(path: Path, data: bytes) -> None:
    """A reader finds all of the file or none; OSError where it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    Path(file.name).replace(path)


@contextmanager
def progress(label: str, quiet: bool = False) -> Iterator[None]:
    """Show on stderr that `label` is under way: every second on a terminal, else when it starts and ends.

    Prints nothing for what takes less than a second.
    """
    if quiet or sys.stderr is None:
        yield
        return
    terminal = sys.stderr.isatty()
    started = time.monotonic()
    finished = threading.Event()

    def report() -> None:
        while not finished.wait(1.0):
            if terminal:
                print(
                    f"\r{label} ... {time.monotonic() - started:.0f} s", end="", file=sys.stderr, flush=True
                )
            else:
                print(f"{label} ...", file=sys.stderr, flush=True)
                return

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        finished.set()
        reporter.join()
        seconds = time.monotonic() - started
        if seconds >= 1.0:
            start = "\r" if terminal else ""
            print(f"{start}{label} ... took {seconds:.1f} s", file=sys.stderr, flush=True)
