"""Meshes and logical-axis rules."""

from jaxmodels.sharding.explain import explain
from jaxmodels.sharding.processes import ProcessError, agree, global_batch, lockstep, process_rows, process_share, to_host
from jaxmodels.sharding.rules import PRESETS, Rules, make_mesh, resolve_rules

__all__ = [
    "PRESETS",
    "ProcessError",
    "Rules",
    "agree",
    "explain",
    "global_batch",
    "lockstep",
    "make_mesh",
    "process_rows",
    "process_share",
    "resolve_rules",
    "to_host",
]
