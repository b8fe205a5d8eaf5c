"""`jaxmodels plan`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jaxmodels.auto import find_family, read_config, text_part
from jaxmodels.cli.main import hub_options, mesh_sizes
from jaxmodels.config import read_json
from jaxmodels.convert.hub import resolve
from jaxmodels.sharding.plan import plan, rank, sweep


def run(args: argparse.Namespace) -> int:
    """Exit status 1 when nothing fits."""
    options: dict[str, Any] = {"topology": args.topology, "job": args.job, "batch": args.batch, "length": args.length, "dtype": args.dtype}
    options |= {"rules": args.rules, "microbatches": args.microbatches}
    config, mesh = _config(args), mesh_sizes(args.mesh) if args.mesh else {}
    remat = None if args.remat == "none" else args.remat
    if args.sweep:
        plans = []
        if args.remat != "full":  # else several
            options["remats"] = (remat,)
        for found in sweep(config, mesh=mesh, **options):
            plans.append(found)
            print(_line(found), flush=True)
        best = rank(plans)
        print("\nranked")
        for found in best:
            print(_line(found))
        return 0 if best[0].fits else 1
    if not mesh:
        raise ValueError("--mesh is needed, such as fsdp=64,tensor=4, or --sweep to try several")
    report = plan(config, mesh=mesh, remat=remat, **options)
    print(report)
    return 0 if report.fits else 1


def _config(args: argparse.Namespace) -> Any:
    path = Path(args.path)
    if path.is_file():
        values = text_part(read_json(path))
        return find_family(values.get("model_type"), str(path)).config.from_dict(values)
    return read_config(resolve(args.path, weights=False, **hub_options(args)))


def _line(found: Any) -> str:
    mesh = ",".join(f"{name}={size}" for name, size in found.mesh.items())
    if not found.fits:
        return f"{mesh:<28} remat {found.remat!s:<34} does not fit: {found.refused or f'{found.needed / 1e9:.1f} GB'}"
    return (
        f"{mesh:<28} remat {found.remat!s:<34} {found.needed / 1e9:>6.1f} GB {1e3 * found.seconds:>10.1f} ms "
        f"{found.tokens_per_second:>12,.0f} tokens/s"
    )
