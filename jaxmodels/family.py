"""What a family declares beside its modules: its classes by task and how its checkpoints deviate from its parameter tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmodels.config import Config
from jaxmodels.model import Model


@dataclasses.dataclass(frozen=True)
class Family:
    """`classes`: auto class name -> module class. `rules`: config -> conversion operations (jaxmodels.convert.rules), file to
    tree, on keys as the head models spell them. `ignore`: regular expressions of keys that are reported and not loaded."""

    config: type[Config]
    classes: Mapping[str, type[Model]]
    rules: Callable[[Any], Sequence[Any]] = lambda config: ()
    ignore: tuple[str, ...] = ()

    @property
    def model_type(self) -> str:
        return self.config.model_type
