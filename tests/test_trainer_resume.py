"""What comes back of a run: its whole state on any mesh, and its best checkpoint wherever the directory is now."""

import dataclasses

import jax
import numpy as np
from test_trainer import MODEL, QUIET, data, params_of, train

from jaxmodels.sharding import Rules, make_mesh
from jaxmodels.training import Trainer, TrainerCallback, TrainingArguments
from jaxmodels.training.checkpoints import checkpoints_in, flat_state
from jaxmodels.training.run import Run
from jaxmodels.training.step import create_train_state


def made_run(out, mesh=None, preset=None, resume=None):
    """What `train` makes before its first step."""
    model = MODEL if mesh is None else dataclasses.replace(MODEL, rules=Rules.preset(preset, make_mesh(**mesh)))
    args = TrainingArguments(str(out), max_steps=8, **QUIET | {"per_device_train_batch_size": 4 if mesh is None else 1})
    return Run(Trainer(model, params_of(model), args, train_dataset=data()), resume)


def saved(run):
    run.saved_at = -1
    run._save()
    run.checkpoints.close()
    return str(run.checkpoints.last())


def test_all_that_a_run_is_comes_back_on_another_mesh(tmp_path):
    """Bit for bit, from one device to a mesh, from there to another, and to one device: parameters, moments, the step, keys, the place in
    the data; every array lies as the rules of its mesh say."""
    start, rng = made_run(tmp_path / "start"), np.random.default_rng(0)
    drawn = lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype) if leaf.ndim else np.asarray(6, leaf.dtype)
    start.state = jax.device_put(jax.tree.map(drawn, start.state))
    start.trainer.state.global_step, start.epoch, start.source.row = 6, 1, 8
    start.sums, start.steps, start.updates, start.total_loss, start.key = {"loss": 1.5}, 1, 5, 9.25, jax.random.key(7)
    held = lambda run: {name: np.asarray(leaf) for name, leaf in flat_state(run.state).items()}
    wanted, before = held(start), saved(start)
    assert any(".mu." in name for name in wanted) and any(".nu." in name for name in wanted)
    places = {"4x2": ({"fsdp": 4, "tensor": 2}, "fsdp+tensor"), "2x2x2": ({"data": 2, "fsdp": 2, "tensor": 2}, "zero1"), "one": ()}
    for name, place in places.items():
        run = made_run(tmp_path / name, *place, resume=before)
        found, laid = held(run), flat_state(create_train_state(run.model, run.optimizer, params_of(run.model)))
        assert found.keys() == wanted.keys()
        assert all(found[key].dtype == leaf.dtype and np.array_equal(found[key], leaf) for key, leaf in wanted.items())
        for key, leaf in flat_state(run.state).items():
            assert leaf.sharding.is_equivalent_to(laid[key].sharding, leaf.ndim), key
        assert any(not leaf.sharding.is_fully_replicated for leaf in laid.values()) == bool(place)
        for attribute in ("epoch", "sums", "steps", "updates", "total_loss"):
            assert getattr(run, attribute) == getattr(start, attribute)
        assert run.trainer.state.global_step == 6 and run.source.position() == start.source.position()
        assert np.array_equal(jax.random.key_data(run.key), jax.random.key_data(start.key))
        before = saved(run)


def test_the_best_stays_also_where_the_directory_is_moved(tmp_path):
    """One checkpoint may stay beside the best; loaded at the end is the best of all, by whatever path."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": data(6, seed=9), "save_strategy": "steps", "save_steps": 1}
    options |= {
        "lr_scheduler_type": "constant",
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "learning_rate": 1.0,
    }
    made = train(tmp_path / "before", **options | {"max_steps": 4})
    best = made.state.best_global_step
    assert best < 3 and list(checkpoints_in(tmp_path / "before")) == [best, 4]
    (tmp_path / "before").rename(tmp_path / "now")
    done = train(tmp_path / "now", resume=True, **options | {"max_steps": 4})  # nothing is left to do
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(made.params), jax.tree.leaves(done.params)))
    again = train(tmp_path / "now", resume=True, **options | {"max_steps": 6})
    assert again.state.best_global_step == best and list(checkpoints_in(tmp_path / "now")) == [best, 6]
    assert again.state.best_model_checkpoint == str(tmp_path / "now" / f"checkpoint-{best}")
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(made.params), jax.tree.leaves(again.params)))


class Eager(TrainerCallback):
    """Saves after every step, also that which ends an epoch, before its evaluation."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = True


def test_the_best_may_have_been_saved_before_it_was_evaluated(tmp_path):
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "num_train_epochs": 1, "max_steps": -1}
    made = train(tmp_path, eval_dataset=data(6, seed=9), extra=[Eager()], **options)
    last = made.state.global_step
    assert made.state.best_global_step == last and made.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{last}")
