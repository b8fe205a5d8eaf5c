"""Training: the state, the jitted step and the evaluation step."""

from jaxmodels.training.step import TrainState, create_train_state, make_eval_step, make_train_step

__all__ = ["TrainState", "create_train_state", "make_eval_step", "make_train_step"]
