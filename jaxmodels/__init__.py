"""Hugging Face checkpoints in JAX."""

from pathlib import Path

# In a checkout `generation/`, `sharding/` and `convert/` stand beside this folder: make them importable from here too,
# so that `import jaxmodels` from the checkout's root works however the package was installed.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "generation" / "__init__.py").is_file():
    __path__.append(str(_root))
