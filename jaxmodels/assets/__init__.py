"""What ships with the package beside code."""

from pathlib import Path

TINY_PYTHON = Path(__file__).parent / "tiny-python"  # a small Llama trained on Python source, see docs/tiny-python.md
PARITY = Path(__file__).parent / "parity"  # what the tests recorded of each family's parity with torch
