"""Tokenizer directories, trained here on a few hundred lines, of every kind that checkpoints use."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "The quick brown fox jumps over the lazy dog, doesn't it? Yes, it does!",
    "Zażółć gęślą jaźń. Größe, naïve café, Ελληνικά, русский язык.",
    "日本語のテキスト、中文文本。한국어 텍스트 🙂👍🏽 👩‍👩‍👧",
    "In 2024, 1234567 people paid $3.50; that's 4374 more than in 1999.",
    "<html>\t<body class='x'>  two  spaces   three </body></html>",
    "she sells sea shells by the sea shore and the shells she sells are sea shells",
] * 12
GPT2_END = "<|endoftext|>"


def save(path: Path, backend: Tokenizer | None, config: dict[str, Any] | None = None, model_type: str | None = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    if backend is not None:
        backend.save(str(path / "tokenizer.json"))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (path / "config.json").write_text(json.dumps({"model_type": model_type} if model_type else {}), encoding="utf-8")
    return path


def byte_level_bpe(special: list[str], size: int = 400, *, split: str | None = None, normalizer: Any = None) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    if normalizer is not None:
        backend.normalizer = normalizer
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    cuts = [pre_tokenizers.Split(Regex(split), behavior="isolated"), byte_level] if split else [byte_level]
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts) if split else byte_level
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    return backend


def llama3(path: Path) -> Path:
    """Byte-level BPE with a post-processor that writes the first token, as Llama 3's."""
    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    names = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id", "finetune_right_pad_id"]
    special = [f"<|{name}|>" for name in names]
    backend = byte_level_bpe(special, 450, split=split)
    bos = (special[0], backend.token_to_id(special[0]))
    template = processors.TemplateProcessing(single=f"{special[0]} $A", pair=f"{special[0]} $A {special[0]}:1 $B:1", special_tokens=[bos])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special[0],
        "eos_token": special[4],
        "pad_token": special[5],
        "clean_up_tokenization_spaces": True,
        "model_max_length": 131072,
        "model_input_names": ["input_ids", "attention_mask"],
        "added_tokens_decoder": {
            str(backend.token_to_id(t)): {
                "content": t, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True,
            }
            for t in special
        },
    }  # fmt: skip
    return save(path, backend, config, "llama")


def llama2(path: Path, config: dict[str, Any] | None = None) -> Path:
    """Sentencepiece BPE with byte pieces as a tokenizer.json in Llama 2's older form: Prepend and Replace normalizers."""
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=special, show_progress=False, limit_alphabet=60)
    words = [" ".join(line.split()) for line in CORPUS]
    backend.train_from_iterator([w for line in words for w in line.replace(" ", " \0").split("\0")], trainer)
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]
    backend = Tokenizer.from_str(json.dumps(spec))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    template = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)])
    backend.post_processor = template
    plain = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    return save(path, backend, {**plain, **(config or {})}, "llama")


def gpt2(path: Path) -> Path:
    """vocab.json and merges.txt alone."""
    backend = byte_level_bpe([GPT2_END])
    save(path, None, {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024}, "gpt2")
    backend.model.save(str(path))
    return path


def codegen(path: Path) -> Path:
    """vocab.json and merges.txt under the class that CodeGen's and Phi's checkpoints name."""
    return save(gpt2(path), None, {"tokenizer_class": "CodeGenTokenizer", "model_max_length": 2048}, "phi")


def qwen2(path: Path) -> Path:
    """Byte-level BPE with NFC, ChatML tokens and no first token."""
    from jaxmodels.processing.families import QWEN2_SPLIT

    backend = byte_level_bpe([GPT2_END, "<|im_start|>", "<|im_end|>"], split=QWEN2_SPLIT, normalizer=normalizers.NFC())
    backend.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("</tool_call>", normalized=False)])
    extra = ["<|im_start|>", "<|im_end|>"]
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": GPT2_END, "bos_token": None}
    config |= {"additional_special_tokens": extra, "add_bos_token": False, "add_prefix_space": False, "errors": "replace"}
    return save(path, backend, config, "qwen3")


def bert(path: Path, *, text_file: bool = False) -> Path:
    """WordPiece, lower case; as tokenizer.json or as vocab.txt."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512, "clean_up_tokenization_spaces": True}
    if text_file:
        save(path, None, config, "bert")
        backend.model.save(str(path))
        return path
    ids = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.BertProcessing(ids[1], ids[0])
    backend.enable_truncation(128)
    backend.enable_padding(pad_id=0, pad_token="[PAD]", length=128)
    return save(path, backend, config, "bert")


def sentencepiece_model(kind: str, **options: Any) -> bytes:
    """The bytes of a .model file trained by the sentencepiece package itself."""
    import sentencepiece

    stream = io.BytesIO()
    size = {"bpe": 420, "unigram": 140}[kind] + (260 if options.get("byte_fallback") else 0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=stream, vocab_size=size, model_type=kind, minloglevel=2, **options
    )  # fmt: skip
    return stream.getvalue()


def t5(path: Path) -> Path:
    save(path, None, {"tokenizer_class": "T5Tokenizer", "extra_ids": 20}, "t5")
    (path / "spiece.model").write_bytes(sentencepiece_model("unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1))
    return path


def xlm_roberta(path: Path) -> Path:
    save(path, None, {"tokenizer_class": "XLMRobertaTokenizer"}, "xlm-roberta")
    (path / "sentencepiece.bpe.model").write_bytes(sentencepiece_model("unigram"))
    return path


def llama_sentencepiece(path: Path, config: dict[str, Any] | None = None) -> Path:
    plain = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    save(path, None, {**plain, **(config or {})}, "llama")
    options = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "split_digits": True}
    (path / "tokenizer.model").write_bytes(sentencepiece_model("bpe", **options))
    return path


def gemma_sentencepiece(path: Path) -> Path:
    save(path, None, {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True}, "gemma2")
    options = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False}
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "eos_piece": "<eos>", "bos_piece": "<bos>"}
    symbols = {"user_defined_symbols": ["<mask>", "<start_of_turn>", "<end_of_turn>", "\n", "\n\n"]}
    (path / "tokenizer.model").write_bytes(sentencepiece_model("bpe", **options, **ids, **symbols))
    return path


MAKERS = {f.__name__: f for f in (llama3, llama2, gpt2, codegen, qwen2, bert, t5, xlm_roberta, llama_sentencepiece, gemma_sentencepiece)}
MAKERS["bert_vocab"] = lambda path: bert(path, text_file=True)
MAKERS["llama2_legacy"] = lambda path: llama2(path, {"legacy": True})
MAKERS["llama2_as_mistral"] = lambda path: save(llama2(path), None, None, "mistral")
TEXTS = [
    "Hello world",
    "",
    " ",
    "  leading and trailing  ",
    "def f(x):\n\treturn x ** 2  # ok\r\n",
    "Zażółć gęślą jaźń 日本語 🙂👍🏽 \u200d \ufffd \x00 \x7f",
    "It's 1234567.89, isn't it?",
    "<s> a</s> b <|eot_id|>c <mask> [MASK] <start_of_turn>user\n\nhi<end_of_turn>",
    "e\u0301 ﬁ ① Å",
    "word " * 40,
]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
