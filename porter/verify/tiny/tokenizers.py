"""Tokenizers made of an alphabet, without files from a hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from porter.verify.tiny import builds

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
PUNCTUATION = ".,:;!?'\"-()<>/_%&+=*#@[]{}"
QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Turns marked with Qwen's special tokens."""


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE."""
    from tokenizers.pre_tokenizers import ByteLevel  # type: ignore[import-untyped]

    return sorted(ByteLevel.alphabet())


@builds("Qwen2Tokenizer", "Qwen2TokenizerFast")
def qwen2(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    """Byte-level BPE without merges: one token per byte, and the special tokens of Qwen2-VL."""
    from transformers import Qwen2Tokenizer

    vocab = {t: i for i, t in enumerate([*byte_alphabet(), *QWEN_SPECIAL])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=options.get("max_length", 2048))
    tokenizer.add_special_tokens({"additional_special_tokens": list(QWEN_SPECIAL[1:])})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@builds("CLIPTokenizer", "CLIPTokenizerFast")
def clip(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    """CLIP's BPE with one token per byte, with and without the end-of-word mark; two specials last, as CLIP has."""
    from transformers import CLIPTokenizer

    symbols = [*byte_alphabet(), *(f"{b}</w>" for b in byte_alphabet()), "<|startoftext|>", "<|endoftext|>"]
    vocab = {t: i for i, t in enumerate(symbols)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=options.get("max_length", 77))


@builds("T5TokenizerFast", "T5Tokenizer")
def t5(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    """Unigram over letters: <pad> 0, </s> 1, <unk> 2, the word mark, then characters."""
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(c, -3.0 - 0.01 * i) for i, c in enumerate(LETTERS + LETTERS.upper()[:26] + PUNCTUATION)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=options.get("max_length", 512))


@builds("GemmaTokenizer", "GemmaTokenizerFast")
def gemma(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    """Gemma's BPE without merges: specials first, then the byte fallbacks, the word mark and characters."""
    from transformers import GemmaTokenizer

    symbols = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581"]
    vocab = {t: i for i, t in enumerate([*symbols, *LETTERS, *LETTERS.upper()[:26], *PUNCTUATION])}
    return GemmaTokenizer(vocab=vocab, merges=[], add_bos_token=True, model_max_length=options.get("max_length", 2048))


@builds("PreTrainedTokenizerFast", "LlamaTokenizerFast", "TokenizersBackend")
def byte_level(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    """Byte-level BPE without merges behind the general class, with a beginning-of-text token as Llama's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors  # type: ignore[import-untyped]
    from transformers import PreTrainedTokenizerFast

    specials = ["<|pad|>", "<|begin_of_text|>", "<|end_of_text|>", *options.get("specials", ())]
    vocab = {t: i for i, t in enumerate([*specials, *byte_alphabet()])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A $B", special_tokens=[("<|begin_of_text|>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>", pad_token="<|pad|>",
        additional_special_tokens=list(options.get("specials", ())), padding_side=options.get("padding_side", "right"),
        chat_template=options.get("chat_template"), model_max_length=options.get("max_length", 2048),
    )  # fmt: skip


@builds("BertTokenizer", "BertTokenizerFast")
def bert(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    """Word pieces of one character each."""
    from transformers import BertTokenizer

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    for characters in (LETTERS, PUNCTUATION):
        pieces += [*characters, *(f"##{c}" for c in characters)]
    return BertTokenizer(vocab={t: i for i, t in enumerate(pieces)}, model_max_length=options.get("max_length", 77))


@builds("ByT5Tokenizer")
def byt5(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer(extra_ids=0, model_max_length=options.get("max_length", 512))
