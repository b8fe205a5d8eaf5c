"""CodeGen (arXiv:2203.13474): GPT-J whose file holds one projection, cut in four as the TPUs that it was trained on."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxmodels.convert.rules import Ignore, Op, Split
from jaxmodels.family import Family, tied_head
from jaxmodels.model import CausalLM
from jaxmodels.models.gptj import GPTJConfig, GPTJModel

PARTS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeGenConfig(GPTJConfig):
    model_type: ClassVar[str] = "codegen"


class CodeGenModel(GPTJModel): ...


class CodeGenForCausalLM(CausalLM):
    base = CodeGenModel
    base_name = "transformer"
    head_bias = True


def rules(config: CodeGenConfig) -> tuple[Op, ...]:
    """Each of the four parts holds queries, values and keys of a quarter of the heads."""
    attention, rows = "transformer.h.*.attn", config.hidden_size // PARTS
    targets = tuple(f"{attention}.{n}_proj.*" for n in "qvk")
    return (
        Ignore((f"{attention}.causal_mask", f"{attention}.embed_positions")),
        Split(f"{attention}.qkv_proj.*", targets, (rows, rows, rows), groups=PARTS),
        *tied_head(config, embeddings="transformer.wte.weight"),
    )


FAMILY = Family(
    config=CodeGenConfig,
    classes={"AutoModel": CodeGenModel, "AutoModelForCausalLM": CodeGenForCausalLM},
    rules=rules,
)
