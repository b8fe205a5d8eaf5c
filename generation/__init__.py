"""Text generation inside jit: HF's `generate`, its options and processors."""

from jaxmodels.generation.compilation_cache import enable_compilation_cache
from jaxmodels.generation.config import GenerationConfig
from jaxmodels.generation.loop import GenerateOutput, TurnCache, bucket, generate
from jaxmodels.generation.processors import (
    LogitsProcessor,
    MinLength,
    MinNewTokens,
    MinP,
    RepetitionPenalty,
    Sequences,
    Temperature,
    TopK,
    TopP,
    build_processors,
)
from jaxmodels.generation.sampling import Sampling, State, Strategy
from jaxmodels.generation.streamers import TextIteratorStreamer, TextStreamer

__all__ = [
    "GenerateOutput",
    "GenerationConfig",
    "LogitsProcessor",
    "MinLength",
    "MinNewTokens",
    "MinP",
    "RepetitionPenalty",
    "Sampling",
    "Sequences",
    "State",
    "Strategy",
    "Temperature",
    "TextIteratorStreamer",
    "TextStreamer",
    "TopK",
    "TopP",
    "TurnCache",
    "bucket",
    "build_processors",
    "enable_compilation_cache",
    "generate",
]
