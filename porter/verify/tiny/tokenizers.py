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
