"""A tokenizer as keys of a GGUF file, for llama.cpp's own tokenizers.

llama.cpp knows byte-level BPE by vocabulary and merges. How text is cut into words before that is not in the file: it
holds the name of one of llama.cpp's built-in rules. The rule is found here by trial: with each of them in the place of
the tokenizer's own, real text is turned into tokens and compared.

It knows sentencepiece's BPE (Llama 2, Mixtral) by vocabulary and scores: of two neighbours it joins those whose union
scores highest. `tokenizer.json` has the order of the merges instead, so a token's score is that order, negated.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from eacmoe_lightning.text.sources import bundled_names, read_documents

if TYPE_CHECKING:
    import gguf

SPACE = "\u2581"  # as sentencepiece writes it
SAMPLE, PIECE = 100_000, 1_000  # characters of text from each bundled source, and of one comparison
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
CASED = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = {  # llama.cpp's rules for words, by its names: expressions that split the text one after another
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "qwen2": [CASED + r"\p{N}" + REST],
    "llama-bpe": [CASED + r"\p{N}{1,3}" + REST],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"],
}


def add_tokenizer(writer: gguf.GGUFWriter, directory: Path, vocab_size: int) -> None:
    """Writes the tokenizer's keys, and warns where llama.cpp will cut some text otherwise.

    Args:
        writer: of the file.
        directory: with `tokenizer.json`.
        vocab_size: rows of the embedding, which may be more than the tokenizer has.

    Raises:
        ValueError: it is no BPE that llama.cpp knows, or there is none.
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        raise ValueError(f"{directory} has no tokenizer.json, from which --format gguf takes the tokenizer")
    stored = json.loads(path.read_text())
    kinds = json.dumps([stored.get("pre_tokenizer"), stored.get("decoder")])
    is_sentencepiece = bool(stored["model"].get("byte_fallback"))
    if stored["model"]["type"] != "BPE" or ("ByteLevel" in kinds) == is_sentencepiece:
        raise ValueError(
            "--format gguf writes BPE tokenizers, of bytes or with bytes to fall back on, and this model's is another: "
            "export with --format dense, and convert that with llama.cpp's own scripts"
        )
    added = {token["id"]: token for token in stored["added_tokens"]}
    texts = {number: text for text, number in stored["model"]["vocab"].items()}
    texts |= {number: token["content"] for number, token in added.items()}
    writer.add_token_list([texts.get(i, f"[PAD{i}]") for i in range(vocab_size)])
    writer.add_token_types([_type(texts.get(i), added.get(i), is_sentencepiece) for i in range(vocab_size)])
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in stored["model"]["merges"]]
    if is_sentencepiece:
        rank = {first + second: i for i, (first, second) in reversed([*enumerate(merges)])}
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(rank.get(texts.get(i), len(merges))) for i in range(vocab_size)])
        first = Tokenizer.from_file(str(path)).encode("a", add_special_tokens=False).tokens[0]
        writer.add_add_space_prefix(first.startswith(SPACE))
    else:
        words, share = words_of(Tokenizer.from_file(str(path)))
        if share:
            print(
                f"warning: llama.cpp has no rule for words like this tokenizer's; with the nearest ({words}) "
                f"{100 * share:.2g} % of texts of {PIECE} characters get other tokens: pass token ids where it matters"
            )
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(words)
        writer.add_token_merges([" ".join(merge) for merge in merges])
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for name in ("bos", "eos", "pad", "unk"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _type(text: str | None, added: dict | None, is_sentencepiece: bool) -> gguf.TokenType:
    """What llama.cpp does with a token: its text, and how it was added to the vocabulary, if it was."""
    import gguf

    types = gguf.TokenType
    if text is None:
        return types.UNUSED
    if added is not None:
        return types.CONTROL if added["special"] else types.USER_DEFINED
    return types.BYTE if is_sentencepiece and re.fullmatch("<0x[0-9A-F]{2}>", text) else types.NORMAL


def words_of(tokenizer: Tokenizer) -> tuple[str, float]:
    """llama.cpp's rule for words that gives a tokenizer's tokens.

    Returns:
        Its name, and the share of pieces of text that get other tokens with it (0: none).
    """
    texts = [document for name in bundled_names() for document in read_documents(f"bundled:{name}")]
    pieces = [text[i : i + PIECE] for text in texts for i in range(0, len(text), PIECE)]
    pieces = pieces[:: max(1, len(pieces) * PIECE // SAMPLE)]
    expected = [encoding.ids for encoding in tokenizer.encode_batch_fast(pieces, add_special_tokens=False)]
    found = {}
    for name, expressions in WORDS.items():
        other = Tokenizer.from_str(tokenizer.to_str())
        splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        other.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
        other.normalizer = None
        ids = [encoding.ids for encoding in other.encode_batch_fast(pieces, add_special_tokens=False)]
        found[name] = sum(a != b for a, b in zip(ids, expected, strict=True)) / len(pieces)
    best = min(found, key=found.get)
    return best, found[best]
