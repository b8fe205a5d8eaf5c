"""The checkpoint that ships with the package."""

from pathlib import Path

TINY_PYTHON = Path(__file__).parent / "tiny-python"  # a small Llama trained on Python source, see docs/tiny-python.md
