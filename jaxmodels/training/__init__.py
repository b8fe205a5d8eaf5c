"""Training: the state, the jitted step and the evaluation step."""

from jaxmodels.training.step import LossScale, TrainState, create_train_state, make_eval_step, make_train_step

__all__ = ["LossScale", "TrainState", "create_train_state", "make_eval_step", "make_train_step"]
