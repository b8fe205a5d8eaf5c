"""Meshes and logical-axis rules."""

from jaxmodels.sharding.rules import PRESETS, Rules, make_mesh, resolve_rules

__all__ = ["PRESETS", "Rules", "make_mesh", "resolve_rules"]
