"""Training: the state, the jitted step and the evaluation step, optimizers and schedules by HF's names; adapters in `lora`, labels and
preference losses in `objectives`."""

from jaxmodels.training.optimizers import make_optimizer
from jaxmodels.training.schedules import make_schedule
from jaxmodels.training.step import LossScale, TrainState, create_train_state, make_eval_step, make_train_step

__all__ = ["LossScale", "TrainState", "create_train_state", "make_eval_step", "make_optimizer", "make_schedule", "make_train_step"]
