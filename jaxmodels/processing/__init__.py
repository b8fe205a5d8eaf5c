"""Text and chats to token ids and back."""

from .batch import BatchEncoding as BatchEncoding
from .schema import get_json_schema as get_json_schema
from .stream import IncrementalDecoder as IncrementalDecoder
from .tokenizer import AutoTokenizer as AutoTokenizer
from .tokenizer import PreTrainedTokenizerFast as PreTrainedTokenizerFast
from .tokenizer import Tokenizer as Tokenizer
from .train import train_bpe as train_bpe
