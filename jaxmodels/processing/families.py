"""Tokenizer classes whose name decides how text is cut, and which class a checkpoint belongs to.

transformers 5 builds these classes from the vocabulary and merges alone: the class fixes the normalizer, pre-tokenizer
and decoder, whatever tokenizer.json says. A `Family` does the same, for a tokenizer.json and for the older files
(vocab.json + merges.txt, vocab.txt, a sentencepiece model). Every other class name means: tokenizer.json as it stands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram, WordPiece

from jaxmodels.processing.sentencepiece import SPACE, spaces_decoder

Options = Mapping[str, Any]  # the class's arguments: tokenizer_config.json, the caller's keywords, `charsmap` of a sentencepiece model
Build = Callable[[Any, Any, Options], Tokenizer]

# Split patterns, as the models were trained with them; %s: how many digits a token may hold.
GPT4_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_SPLIT = GPT4_SPLIT % ""
QWEN3_5_SPLIT = QWEN2_SPLIT.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]+", r"[^\s\p{L}\p{M}\p{N}]+")


@dataclasses.dataclass(frozen=True)
class Family:
    """How one tokenizer class is built, and its defaults."""

    model: str  # "BPE", "WordPiece" or "Unigram"
    build: Build  # (vocab, merges, options) -> Tokenizer without its added tokens
    defaults: Mapping[str, Any]  # of its arguments: special tokens, ...
    padding_side: str = "right"
    type_ids: bool = False  # whether token_type_ids are returned by default
    frame: Callable[[Options, Tokenizer], Any] | None = None  # (options, backend) -> the post-processor, in place of the file's
    respecial: bool = False  # the class adds its special tokens once more, as never normalised
    extra: Callable[[Options], list[str]] | None = None  # further special tokens
    from_sentencepiece: Callable[[list[tuple[str, float]], Options], list[tuple[str, float]]] | None = None


def byte_level(split: str | None = None, *, normalizer: Any = None, digits: bool = False) -> Build:
    """GPT-2's scheme: text as bytes as printable characters, cut by `split` (None: GPT-2's own pattern)."""

    def build(vocab: Any, merges: Any, o: Options) -> Tokenizer:
        prefix = bool(o.get("add_prefix_space"))
        tokenizer = Tokenizer(BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False))
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        steps: list[Any] = []
        if split is not None:
            steps.append(pre_tokenizers.Split(Regex(split), behavior="isolated"))
        if digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        steps.append(pre_tokenizers.ByteLevel(prefix, trim_offsets=o.get("trim_offsets", True), use_regex=split is None))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    return build


def _llama(vocab: Any, merges: Any, o: Options) -> Tokenizer:
    prefix = o.get("add_prefix_space") is not False
    scheme = "never" if not prefix else "always" if o.get("legacy") else "first"
    tokenizer = Tokenizer(BPE(vocab, merges, fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    tokenizer.decoder = spaces_decoder(strip=prefix)
    return tokenizer


def _code_llama(vocab: Any, merges: Any, o: Options) -> Tokenizer:
    scheme = "never" if o.get("add_prefix_space") is False else "first"
    tokenizer = Tokenizer(BPE(vocab, merges, fuse_unk=True, byte_fallback=True, unk_token=str(o["unk_token"])))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    tokenizer.decoder = spaces_decoder(strip=True)
    return tokenizer


def _gemma(vocab: Any, merges: Any, o: Options) -> Tokenizer:
    tokenizer = Tokenizer(BPE(vocab, merges, fuse_unk=True, byte_fallback=True, unk_token=str(o["unk_token"])))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = spaces_decoder(strip=False)
    return tokenizer


def _bert(vocab: Any, merges: Any, o: Options) -> Tokenizer:
    tokenizer = Tokenizer(WordPiece(vocab, unk_token=str(o["unk_token"])))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=o.get("tokenize_chinese_chars", True),
        strip_accents=o.get("strip_accents"),
        lowercase=o.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def _unigram(unk_id: int) -> Build:
    def build(vocab: Any, merges: Any, o: Options) -> Tokenizer:
        scheme = "never" if o.get("add_prefix_space") is False else "always"
        tokenizer = Tokenizer(Unigram(vocab, unk_id=unk_id, byte_fallback=False))
        if o.get("charsmap"):
            tokenizer.normalizer = normalizers.Precompiled(o["charsmap"])
        words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
        tokenizer.decoder = decoders.Metaspace(SPACE, prepend_scheme=scheme)
        return tokenizer

    return build


def _xglm(vocab: Any, merges: Any, o: Options) -> Tokenizer:
    tokenizer = _unigram(3)(vocab, merges, {**o, "charsmap": None})
    charsmap = [normalizers.Precompiled(o["charsmap"])] if o.get("charsmap") else []
    tokenizer.normalizer = normalizers.Sequence([*charsmap, normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=tokenizer.decoder.prepend_scheme)
    return tokenizer


def _t5(vocab: Any, merges: Any, o: Options) -> Tokenizer:
    return _unigram(2)(vocab, merges, {**o, "add_prefix_space": True})


def _albert(vocab: Any, merges: Any, o: Options) -> Tokenizer:
    tokenizer = _unigram(1)(vocab, merges, {**o, "charsmap": None})
    steps: list[Any] = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    if not o.get("keep_accents", False):
        steps += [normalizers.NFKD(), normalizers.StripAccents()]
    if o.get("do_lower_case", True):
        steps.append(normalizers.Lowercase())
    if o.get("charsmap"):
        steps.append(normalizers.Precompiled(o["charsmap"]))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.post_processor = _frame_bert({"cls_token": "[CLS]", "sep_token": "[SEP]"}, tokenizer)
    return tokenizer


def _numbered(backend: Tokenizer, token: str) -> tuple[str, int]:
    number = backend.token_to_id(token)
    if number is None:
        raise ValueError(f"the vocabulary lacks {token!r}, which this tokenizer class writes around every text")
    return token, number


def _template(backend: Tokenizer, single: str, pair: str, **tokens: Any) -> Any:
    """`single` and `pair` are words: $A and $B for the texts, names of `tokens` for special tokens, `:1` for type id 1."""

    def pieces(words: str) -> list[str]:
        named = [word.partition(":") for word in words.split()]
        return [f"{tokens.get(name, name)}:{kind or 0}" for name, _, kind in named]

    return processors.TemplateProcessing(
        single=pieces(single),
        pair=pieces(pair),
        special_tokens=[_numbered(backend, token) for token in {str(token) for token in tokens.values()}],
    )


def _frame_bert(o: Options, backend: Tokenizer) -> Any:
    return _template(backend, "cls $A sep", "cls $A sep $B:1 sep:1", cls=o["cls_token"], sep=o["sep_token"])


def _frame_roberta(o: Options, backend: Tokenizer) -> Any:
    sep, cls = (_numbered(backend, str(o[name])) for name in ("sep_token", "cls_token"))
    return processors.RobertaProcessing(sep, cls, o.get("trim_offsets", True), bool(o.get("add_prefix_space")))


def _frame_t5(o: Options, backend: Tokenizer) -> Any:
    return _template(backend, "$A eos", "$A eos $B eos", eos="</s>")


def _frame_xglm(o: Options, backend: Tokenizer) -> Any:
    return _template(backend, "eos $A", "eos $A eos eos $B", eos=o["eos_token"])


def _frame_codegen(o: Options, backend: Tokenizer) -> Any:
    return processors.ByteLevel(add_prefix_space=True, trim_offsets=False, use_regex=True)


def _frame_xlm_roberta(o: Options, backend: Tokenizer) -> Any:
    return _template(backend, "bos $A eos", "bos $A eos eos $B eos", bos=o["bos_token"], eos=o["eos_token"])


def bos_eos_frame(backend: Tokenizer, bos: str | None, eos: str | None) -> Any:
    """The post-processor that writes `bos` before and `eos` after every text (None: nothing)."""
    named = {name: token for name, token in (("bos", bos), ("eos", eos)) if token is not None}
    single = f"{'bos' if bos else ''} $A {'eos' if eos else ''}"
    second = f"{'bos:1' if bos else ''} $B:1 {'eos:1' if eos else ''}"
    return _template(backend, single, f"{single} {second}", **named)


def _frame_plain(o: Options, backend: Tokenizer) -> Any:
    return bos_eos_frame(backend, o["bos_token"] if o.get("add_bos_token") else None, o["eos_token"] if o.get("add_eos_token") else None)


def _xlm_roberta_vocab(scored: list[tuple[str, float]], o: Options) -> list[tuple[str, float]]:
    # fairseq's order: its four special tokens replace the model's first three pieces, the mask comes last
    head = [(str(o[f"{name}_token"]), 0.0) for name in ("bos", "pad", "eos", "unk")]
    return [*head, *scored[3:], (str(o["mask_token"]), 0.0)]


def _xglm_vocab(scored: list[tuple[str, float]], o: Options) -> list[tuple[str, float]]:
    return [*_xlm_roberta_vocab(scored, {**o, "mask_token": ""})[:-1], *((word, 0.0) for word in _xglm_extra(o))]


def _xglm_extra(o: Options) -> list[str]:
    return [f"<madeupword{i}>" for i in range(7)]


def _t5_extra(o: Options) -> list[str]:
    return [f"<extra_id_{i}>" for i in range(o.get("extra_ids", 100))]


def _t5_vocab(scored: list[tuple[str, float]], o: Options) -> list[tuple[str, float]]:
    return scored + [(token, 0.0) for token in reversed(_t5_extra(o))]


def _tokens(**names: str | None) -> dict[str, str | None]:
    return {f"{name}_token": value for name, value in names.items()}


_END = "<|endoftext|>"
_GPT2 = _tokens(unk=_END, bos=_END, eos=_END)
_QWEN = _tokens(unk=_END, bos=None, eos=_END, pad=_END)
_LLAMA = _tokens(unk="<unk>", bos="<s>", eos="</s>")
_GEMMA = _tokens(unk="<unk>", bos="<bos>", eos="<eos>", pad="<pad>", mask="<mask>")
_CODE_LLAMA: dict[str, Any] = {
    **_LLAMA,
    "add_bos_token": True,
    **_tokens(prefix="▁<PRE>", middle="▁<MID>", suffix="▁<SUF>", eot="▁<EOT>", fill="<FILL_ME>"),
}
_COHERE = _tokens(unk="<UNK>", bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>", pad="<PAD>", cls="<CLS>", sep="<SEP>", mask="<MASK_TOKEN>")
_ROBERTA = _tokens(bos="<s>", eos="</s>", sep="</s>", cls="<s>", unk="<unk>", pad="<pad>", mask="<mask>")
_XGLM = {name: token for name, token in _ROBERTA.items() if name != "mask_token"}
_BERT = _tokens(unk="[UNK]", sep="[SEP]", pad="[PAD]", cls="[CLS]", mask="[MASK]")
_ALBERT = _tokens(bos="[CLS]", eos="[SEP]", unk="<unk>", sep="[SEP]", pad="<pad>", cls="[CLS]", mask="[MASK]")
_T5 = _tokens(eos="</s>", unk="<unk>", pad="<pad>")

FAMILIES: dict[str, Family] = {
    "LlamaTokenizer": Family("BPE", _llama, _LLAMA, "left"),
    "CodeLlamaTokenizer": Family("BPE", _code_llama, _CODE_LLAMA, "left"),
    "GemmaTokenizer": Family("BPE", _gemma, _GEMMA, "left"),
    "CohereTokenizer": Family("BPE", byte_level(normalizer=normalizers.NFC(), digits=True), _COHERE, "left", respecial=True),
    "GPT2Tokenizer": Family("BPE", byte_level(), _GPT2, "left"),
    "CodeGenTokenizer": Family("BPE", byte_level(), _GPT2, "left", frame=_frame_codegen),
    "GPTNeoXTokenizer": Family(
        "BPE", byte_level(normalizer=normalizers.NFC()), {**_GPT2, "pad_token": "<|padding|>"}, "left", frame=_frame_plain
    ),
    "Qwen2Tokenizer": Family("BPE", byte_level(QWEN2_SPLIT, normalizer=normalizers.NFC()), _QWEN, "left", respecial=True),
    "Qwen3_5Tokenizer": Family("BPE", byte_level(QWEN3_5_SPLIT, normalizer=normalizers.NFC()), _QWEN, "left"),
    "RobertaTokenizer": Family("BPE", byte_level(), _ROBERTA, frame=_frame_roberta),
    "BertTokenizer": Family("WordPiece", _bert, _BERT, type_ids=True, frame=_frame_bert),
    "DistilBertTokenizer": Family("WordPiece", _bert, _BERT, frame=_frame_bert),
    "T5Tokenizer": Family("Unigram", _t5, _T5, frame=_frame_t5, extra=_t5_extra, from_sentencepiece=_t5_vocab),
    "XLMRobertaTokenizer": Family("Unigram", _unigram(3), _ROBERTA, frame=_frame_xlm_roberta, from_sentencepiece=_xlm_roberta_vocab),
    "XGLMTokenizer": Family("Unigram", _xglm, _XGLM, "left", frame=_frame_xglm, extra=_xglm_extra, from_sentencepiece=_xglm_vocab),
    "AlbertTokenizer": Family("Unigram", _albert, _ALBERT),
}
ALIASES = {"BartTokenizer": "RobertaTokenizer", "MobileBertTokenizer": "BertTokenizer", "SqueezeBertTokenizer": "BertTokenizer"}

# transformers 5: the class registered for a model_type. "" is its plain class, which takes tokenizer.json as it stands.
_TYPES = {
    "": "EvollaModel arctic aria beam bigbird_pegasus camembertv2-base canary chatlm cohere_asr ernie4_5 ernie4_5_moe flex_olmo fuyu glm "
    "glm4 glm4_moe glm4_moe_lite glm4v glm4v_moe glm_image glmasr got_ocr2 gpt_bigcode gradium_phonon_tts granite granitemoe "
    "granitemoehybrid granitemoeshared h2ovl_chat hyperclovax hyperclovax_vlm internlm2 internlm3 iquestcoder jamba kimi_k25 kimi_linear "
    "kosmos-2 llava llava_next mimo_v2_flash minicpm3 minicpm_ocr minicpmv minicpmv4_6 minicpmv4_7 minimax_m2 ministral ministral3 "
    "mistral mistral3 mistral_large4 mixtral modernbert modernbert-decoder molmo molmo2 nemo_speechlm nemotron nvfp4 nystromformer olmo2 "
    "olmo3 olmo_hybrid opencua openvla paddleocr_vl pegasus_x persimmon phi3 phi3_v phimoe pix2struct pixtral pocket_tts smolvlm "
    "stablelm step3_vl umt5 vipllava voxtral voxtral_realtime xlm-roberta-xl",
    "LlamaTokenizer": "idefics idefics2",
    "CodeLlamaTokenizer": "code_llama",
    "GemmaTokenizer": "diffusion_gemma gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text recurrent_gemma shieldgemma2 t5gemma zaya",
    "CohereTokenizer": "aya_vision cohere cohere2",
    "GPT2Tokenizer": "blip-2 codegen dbrx emu3 gpt2 gpt_neo gptj hyperclovax_vision_v2 instructblip instructblipvideo jais2 opt phi "
    "starcoder2",
    "GPTNeoXTokenizer": "falcon_mamba gpt_neox mamba mamba2 mpt olmo olmoe rwkv xlstm",
    "Qwen2Tokenizer": "audioflamingo3 colqwen2 cosmos3_omni dots3_note fun_asr_nano hunyuan_vl internvl lighton_ocr "
    "moss_transcribe_diarize ovis2 qianfan_ocr qwen2 qwen2_5_omni qwen2_5_vl qwen2_audio qwen2_moe qwen2_vl qwen3 qwen3_asr qwen3_moe "
    "qwen3_next qwen3_omni_moe qwen3_vl qwen3_vl_moe vibevoice",
    "Qwen3_5Tokenizer": "qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen4_exp",
    "RobertaTokenizer": "bart bridgetower clap data2vec-text florence2 ibert lilt longformer mega mra roberta roberta-prelayernorm",
    "BertTokenizer": "align bark bert blip bros chinese_clip convbert distilbert electra ernie flava git grounding-dino layoutlm "
    "megatron-bert mm-grounding-dino mobilebert nezha nomic_bert qdqbert realm retribert squeezebert tvp vilt visual_bert",
    "T5Tokenizer": "mt5 musicgen musicgen_melody switch_transformers t5",
    "XLMRobertaTokenizer": "gte jina_embeddings_v3 metaclip_2 trocr xlm-roberta xmod",
    "XGLMTokenizer": "xglm",
    "AlbertTokenizer": "albert yoso",
}
REGISTERED = {kind: name for name, kinds in _TYPES.items() for kind in kinds.split()}
# Types whose published tokenizer_config.json names the wrong class; the registered one is used.
_WRONG = (
    "arctic camembertv2-base chatlm cohere_asr ernie4_5 ernie4_5_moe fuyu h2ovl_chat hyperclovax hyperclovax_vision_v2 hyperclovax_vlm "
    "internlm2 internlm3 iquestcoder jamba llava llava_next minicpm3 minicpmv minimax_m2 modernbert modernbert-decoder molmo molmo2 "
    "nemotron nvfp4 opencua openvla paddleocr_vl phi3 phi3_v phimoe qwen2 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen4_exp siglip2 smolvlm "
    "step3_vl vipllava"
)
_MISTRAL = "ministral ministral3 mistral mistral3 mistral_large4 mixtral pixtral voxtral voxtral_realtime"
WRONG_CLASS, MISTRAL = frozenset(_WRONG.split()), frozenset(_MISTRAL.split())


def choose_family(declared: str | None, model_type: str | None, byte_level_file: bool) -> str | None:
    """The key of FAMILIES that transformers 5 would build, or None where tokenizer.json is taken as it stands.

    `declared` is the class named in tokenizer_config.json (or config.json); `byte_level_file` tells that tokenizer.json
    works on bytes, as Llama 3's does, whose declared class would be wrong."""
    name = (declared or "").removesuffix("Fast")
    name = ALIASES.get(name, name)
    registered = REGISTERED.get(model_type or "")
    if name == "LlamaTokenizer" and byte_level_file and model_type not in MISTRAL | WRONG_CLASS:
        return None
    if name and registered is not None and registered != name:
        name = "" if registered == "" else registered if model_type in WRONG_CLASS else name
    elif not name:
        name = registered or ""
    return name if name in FAMILIES else None
