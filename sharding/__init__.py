"""Meshes and logical-axis rules."""

from jaxmodels.sharding.explain import explain
from jaxmodels.sharding.rules import PRESETS, Rules, make_mesh, resolve_rules

__all__ = ["PRESETS", "Rules", "explain", "make_mesh", "resolve_rules"]
