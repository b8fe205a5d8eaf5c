"""Text and chats to token ids and back."""

from jaxmodels.processing.batch import BatchEncoding as BatchEncoding
from jaxmodels.processing.schema import get_json_schema as get_json_schema
from jaxmodels.processing.stream import IncrementalDecoder as IncrementalDecoder
from jaxmodels.processing.tokenizer import AutoTokenizer as AutoTokenizer
from jaxmodels.processing.tokenizer import PreTrainedTokenizerFast as PreTrainedTokenizerFast
from jaxmodels.processing.tokenizer import Tokenizer as Tokenizer
from jaxmodels.processing.train import train_bpe as train_bpe
