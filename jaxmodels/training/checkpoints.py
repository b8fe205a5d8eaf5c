"""What a run resumes from: OUTPUT_DIR/checkpoint-STEP, an Orbax checkpoint of the train state's arrays and, as JSON, everything else.

Written in the background and given its name in one step, so that a crash, a full disk or a kill leaves either the whole checkpoint or
none; older ones go only when a newer one is there. Arrays are restored into the shardings of whatever mesh asks."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxmodels.convert.atomic import remove
from jaxmodels.convert.errors import CheckpointError
from jaxmodels.convert.hub import local_directory
from jaxmodels.convert.orbax import unlogged, why_not

NAME = re.compile(r"checkpoint-(\d+)")
NOT_THE_MODEL = ("generation_config", "dtype", "torch_dtype", "_name_or_path", "architectures", "transformers_version", "use_cache")


def checkpoints_in(directory: str | Path) -> dict[int, Path]:
    """{step: path} of the checkpoints in a run's directory, by rising step; what was not finished does not count."""
    entries = Path(directory).iterdir() if Path(directory).is_dir() else ()
    found = {int(match[1]): path for path in entries if (match := NAME.fullmatch(path.name)) and path.is_dir()}
    return dict(sorted(found.items()))


def get_last_checkpoint(directory: str | Path) -> str | None:
    """The path of a run's newest checkpoint, None without one: trainer.train(resume_from_checkpoint=get_last_checkpoint(output_dir))."""
    found = checkpoints_in(directory)
    return str(list(found.values())[-1]) if found else None


def describe(model: Any, optimizer: str, adapter: Any = None) -> dict[str, Any]:
    """What a checkpoint must have been made of to fit. adapter: a LoraConfig."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in NOT_THE_MODEL}
    about = {"model": type(model).__name__, "config": config, "optimizer": optimizer}
    return about if adapter is None else about | {"adapter": {k: v for k, v in adapter.to_dict().items() if k not in adapter.extra}}


def flat_state(state: Any) -> dict[str, Any]:
    """{name: leaf} of a train state: "params.model.norm.weight", "opt_state.0.mu.model.norm.weight", …"""
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _shapes(flat: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in flat.items()}


class Checkpoints:
    """The checkpoints of one run, in its directory. limit: how many to keep, as HF's save_total_limit; None for all. `best`: the path of
    one that is kept whatever its age."""

    def __init__(self, directory: str | Path, limit: int | None = None):
        import orbax.checkpoint as ocp

        self.directory, self.limit = local_directory(directory).absolute(), limit
        self.best: str | None = None
        self.writing: Path | None = None
        self.saver = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._sweep()

    def _sweep(self) -> None:
        """Remove what a killed process has left half-written or half-removed."""
        if self.directory.is_dir() and jax.process_index() == 0:
            for path in self.directory.iterdir():
                if re.match(r"checkpoint-\d+\.(orbax-checkpoint-tmp|removed)", path.name):
                    remove(path)

    def path(self, step: int) -> Path:
        return self.directory / f"checkpoint-{step}"

    def save(self, step: int, state: Any, about: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        """Begin to write the checkpoint; the arrays are copied before this returns. Waits for the one before."""
        import orbax.checkpoint as ocp

        self.wait()
        flat = flat_state(state)
        # A copy, since it is written while the run goes on; what JSON cannot say fails here, before anything is written.
        meta = json.loads(json.dumps({"about": about, "arrays": _shapes(flat), "run": run}))
        self.directory.mkdir(parents=True, exist_ok=True)
        self.writing = self.path(step)
        items = ocp.args.Composite(state=ocp.args.StandardSave(flat), meta=ocp.args.JsonSave(meta))
        self._try(lambda: self.saver.save(self.writing, args=items))

    def wait(self) -> None:
        """Until what is being written is there; then the oldest that are too many go."""
        if self.writing is None:
            return
        self._try(self.saver.wait_until_finished)
        self.writing = None
        self._rotate()

    def _try(self, write: Callable[[], Any]) -> None:
        """CheckpointError says which checkpoint failed and which is the last good one."""
        with unlogged():
            why = why_not(write)
            if why is None:
                return
            failed, self.writing = self.writing, None
            self._sweep()
        raise CheckpointError(f"{failed} could not be written: {why}. The last good checkpoint: {self.last() or 'none'}")

    def _rotate(self) -> None:
        if self.limit is None or jax.process_index():
            return
        found = list(checkpoints_in(self.directory).values())
        limit = self.limit
        best = next((path for path in found if str(path) == self.best), None)
        if best is not None and best != found[-1]:  # the best stays, beside the newest if no more may
            found.remove(best)
            found.insert(-1, best)
            limit = max(2, limit)
        for path in found[:-limit]:
            removed = path.with_name(f"{path.name}.removed")
            path.rename(removed)  # in one step it is no checkpoint any more
            shutil.rmtree(removed, ignore_errors=True)

    def last(self) -> Path | None:
        found = checkpoints_in(self.directory)
        return list(found.values())[-1] if found else None

    def close(self) -> None:
        self.wait()
        self.saver.close()


def read_meta(path: str | Path) -> dict[str, Any]:
    """What a checkpoint says of itself; CheckpointError where there is none."""
    file = Path(path) / "meta" / "metadata"
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no checkpoint of a Trainer: {file.name} cannot be read: {error}") from None


def restore(path: str | Path, state: Any, about: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The state of a checkpoint in the structure, dtypes and shardings of `state` (arrays or shapes), and what else was saved for the run.

    CheckpointError shows both sides where the checkpoint is of another model or optimizer."""
    import orbax.checkpoint as ocp

    meta = read_meta(path)
    flat = flat_state(state)
    _check(path, meta, about, _shapes(flat))
    target = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in flat.items()}
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            found = reader.restore(Path(path).absolute(), args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]
    except Exception as error:  # Orbax and tensorstore raise what they please
        raise CheckpointError(f"{path}: unreadable checkpoint: {error}") from error
    return jax.tree.unflatten(jax.tree.structure(state), [found[name] for name in flat]), meta["run"]


def _check(path: str | Path, meta: Mapping[str, Any], about: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    saved, now = meta["about"], json.loads(json.dumps(about))
    lines = [f"  {name}: saved {saved[name]}, now {now[name]}" for name in ("model", "optimizer") if saved[name] != now[name]]
    names = sorted({*saved["config"], *now["config"]})
    absent = "nothing"
    sides = [(f"config.{name}", saved["config"].get(name, absent), now["config"].get(name, absent)) for name in names]
    adapter = saved.get("adapter", {})
    sides += [(f"adapter.{name}", adapter[name], value) for name, value in now.get("adapter", {}).items() if name in adapter]
    sides += [(name, meta["arrays"].get(name, absent), shapes.get(name, absent)) for name in sorted({*meta["arrays"], *shapes})]
    lines += [f"  {name}: saved {before}, now {after}" for name, before, after in sides if before != after]
    if lines:
        more = [f"  and {len(lines) - 12} more"] if len(lines) > 12 else []
        raise CheckpointError("\n".join([f"{path} is a checkpoint of another model or optimizer:", *lines[:12], *more]))
