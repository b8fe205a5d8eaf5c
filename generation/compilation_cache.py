"""Compiled programs kept on disk, so that a fresh process starts at once."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

ENVIRONMENT = "JAXMODELS_COMPILATION_CACHE"  # `off`, or the folder
MAX_BYTES = 2 << 30


@functools.cache
def enable_compilation_cache() -> str | None:
    """Switch JAX's persistent compilation cache on and return its folder; None where it stays as it is.

    Nothing happens when the user configured one (jax_compilation_cache_dir, jax_enable_compilation_cache), when the environment variable
    JAXMODELS_COMPILATION_CACHE is `off`, when the folder cannot be written, or for several devices on CPU, whose programs lose the order
    of their collectives in it. Only the first call in a process does anything."""
    wanted = os.environ.get(ENVIRONMENT, "")
    if wanted.lower() == "off" or jax.config.values["jax_compilation_cache_dir"] or not jax.config.values["jax_enable_compilation_cache"]:
        return None
    if jax.device_count() > 1 and jax.default_backend() == "cpu":
        return None
    try:
        folder = Path(wanted) if wanted else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxmodels" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    reset_cache()  # what was compiled before this call made JAX conclude that there is no cache
    return str(folder)
