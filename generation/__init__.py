"""Text generation inside jit: HF's `generate`, its options and processors."""

from jaxmodels.generation.assisted import Assistance, Assisted
from jaxmodels.generation.beam import BeamSearch
from jaxmodels.generation.compilation_cache import enable_compilation_cache
from jaxmodels.generation.config import GenerationConfig
from jaxmodels.generation.constraints import ConstrainedBeamSearch, DisjunctiveConstraint, PhrasalConstraint
from jaxmodels.generation.contrastive import ContrastiveSearch
from jaxmodels.generation.diverse import DiverseBeamSearch
from jaxmodels.generation.dola import DoLa
from jaxmodels.generation.drafts import DraftModel, PromptLookup
from jaxmodels.generation.grammar import Grammar, GrammarMask
from jaxmodels.generation.healing import heal_tokens
from jaxmodels.generation.inputs import bucket
from jaxmodels.generation.loop import GenerateOutput, generate
from jaxmodels.generation.processors import (
    EncoderNoRepeatNGram,
    EncoderRepetitionPenalty,
    EpsilonCutoff,
    EtaCutoff,
    ExponentialDecayLength,
    Follower,
    ForcedBOS,
    ForcedEOS,
    Guidance,
    LogitsProcessor,
    MinLength,
    MinNewTokens,
    MinP,
    NoRepeatNGram,
    Normalize,
    RemoveInvalid,
    RepetitionPenalty,
    SequenceBias,
    Sequences,
    SuppressTokens,
    SuppressTokensAtBegin,
    Temperature,
    TopH,
    TopK,
    TopP,
    Typical,
    bad_words,
    build_processors,
)
from jaxmodels.generation.sampling import Sampling, State, Strategy
from jaxmodels.generation.scores import compute_transition_scores
from jaxmodels.generation.stopping import StopStrings
from jaxmodels.generation.streamers import TextIteratorStreamer, TextStreamer
from jaxmodels.generation.synthid import BayesianDetector, SynthIDTextWatermarkDetector
from jaxmodels.generation.turn_cache import TurnCache
from jaxmodels.generation.watermark import SynthIDTextWatermarkingConfig, WatermarkDetector, WatermarkDetectorOutput, WatermarkingConfig

__all__ = [
    "Assistance",
    "Assisted",
    "BayesianDetector",
    "BeamSearch",
    "ConstrainedBeamSearch",
    "ContrastiveSearch",
    "DisjunctiveConstraint",
    "DiverseBeamSearch",
    "DoLa",
    "DraftModel",
    "EncoderNoRepeatNGram",
    "EncoderRepetitionPenalty",
    "EpsilonCutoff",
    "EtaCutoff",
    "ExponentialDecayLength",
    "Follower",
    "ForcedBOS",
    "ForcedEOS",
    "GenerateOutput",
    "GenerationConfig",
    "Grammar",
    "GrammarMask",
    "Guidance",
    "LogitsProcessor",
    "MinLength",
    "MinNewTokens",
    "MinP",
    "NoRepeatNGram",
    "Normalize",
    "PhrasalConstraint",
    "PromptLookup",
    "RemoveInvalid",
    "RepetitionPenalty",
    "Sampling",
    "SequenceBias",
    "Sequences",
    "State",
    "StopStrings",
    "Strategy",
    "SuppressTokens",
    "SuppressTokensAtBegin",
    "SynthIDTextWatermarkDetector",
    "SynthIDTextWatermarkingConfig",
    "Temperature",
    "TextIteratorStreamer",
    "TextStreamer",
    "TopH",
    "TopK",
    "TopP",
    "TurnCache",
    "Typical",
    "WatermarkDetector",
    "WatermarkDetectorOutput",
    "WatermarkingConfig",
    "bad_words",
    "bucket",
    "build_processors",
    "compute_transition_scores",
    "enable_compilation_cache",
    "generate",
    "heal_tokens",
]
