"""What a family declares beside its modules: its classes by task and how its checkpoints deviate from its parameter tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmodels.config import Config
from jaxmodels.convert.rules import Alias, Op, Tie
from jaxmodels.model import Model


@dataclasses.dataclass(frozen=True)
class Family:
    """`classes`: auto class name -> module class. `rules`: config -> conversion rules, file to tree, on keys as models with a head
    spell them; patterns that begin with `**` hold for every prefix."""

    config: type[Config]
    classes: Mapping[str, type[Model]]
    rules: Callable[[Any], Sequence[Op]] = lambda config: ()

    @property
    def model_type(self) -> str:
        return self.config.model_type

    def conversion(self, cls: type[Model], config: Config) -> tuple[list[Op], str]:
        """The rules for a class's checkpoints and the prefix of its base model; other classes' prefixes are accepted too."""
        prefixes = list(dict.fromkeys(c.base_name for c in self.classes.values() if c.base_name))
        mine = cls.base_name or (prefixes or [""])[0]
        others = tuple(f"{prefix}.**" for prefix in prefixes if prefix != mine)
        return [*([Alias(f"{mine}.**", others)] if others else []), *self.rules(config)], mine


def tied_head(config: Config, head: str = "lm_head.weight", embeddings: str = "model.embed_tokens.weight") -> tuple[Op, ...]:
    """The rule for a head that is tied where the config says so: files may hold it a second time."""
    return (Tie(head, embeddings),) if config.tie_word_embeddings else ()
