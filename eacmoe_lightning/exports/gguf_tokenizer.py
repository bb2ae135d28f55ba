"""A tokenizer as keys of a GGUF file, for llama.cpp's tokenizers.

For byte-level BPE, llama.cpp reads a vocabulary and merges. The file does not say how text is split into words first
(pre-tokenization): it only names one of llama.cpp's built-in rules. The rule is chosen by trial: each one replaces the
tokenizer's rule, tokenizes real text, and the tokens are compared.

For sentencepiece's BPE (Llama 2, Mixtral), llama.cpp reads a vocabulary and scores, and joins the adjacent symbols
whose union scores highest. `tokenizer.json` has an order of merges instead, so a token's score is its rank, negated.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from eacmoe_lightning.text.documents import read_documents
from eacmoe_lightning.text.sources import bundled_names

if TYPE_CHECKING:
    import gguf

SPACE = "\u2581"  # sentencepiece's character for a space
SAMPLE, PIECE = 100_000, 1_000  # characters compared in total, and characters in one comparison
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
ENDINGS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
CASED = ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
UPPER, LOWER = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
WORD = r"[^\r\n\p{L}\p{N}]?"
GPT4O = rf"{WORD}{UPPER}*{LOWER}+{ENDINGS}?|{WORD}{UPPER}+{LOWER}*{ENDINGS}?|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = {  # llama.cpp's rules by name: expressions that split the text into words, applied one after another
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "qwen2": [CASED + r"\p{N}" + REST],
    "llama-bpe": [CASED + r"\p{N}{1,3}" + REST],
    "dbrx": [CASED + r"\p{N}{1,3}" + REST],
    "gpt-4o": [GPT4O + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"],
}
WHOLE = ("llama-bpe",)  # of these, those that take a word as it is if the vocabulary has it


def add_tokenizer(writer: gguf.GGUFWriter, directory: Path, vocab_size: int) -> None:
    """Writes the tokenizer's keys, and warns if llama.cpp will tokenize some text differently.

    Args:
        writer: the file's writer.
        directory: the directory with `tokenizer.json`.
        vocab_size: number of rows in the embedding, which may exceed the tokenizer's vocabulary.

    Raises:
        ValueError: there is no tokenizer, or it is not a BPE that llama.cpp knows.
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        raise ValueError(f"{directory} has no tokenizer.json, which --format gguf needs: export with --format dense")
    stored = json.loads(path.read_text())
    kinds = json.dumps([stored.get("pre_tokenizer"), stored.get("decoder")])
    is_sentencepiece = bool(stored["model"].get("byte_fallback"))
    if stored["model"]["type"] != "BPE" or ("ByteLevel" in kinds) == is_sentencepiece:
        raise ValueError(
            "--format gguf writes BPE tokenizers, byte-level or with byte fallback, and this model's is neither: "
            "export with --format dense, and convert that with llama.cpp's scripts"
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
                "warning: llama.cpp has no rule that splits text into words like this tokenizer; with the closest "
                f"({words}) {100 * share:.2g} % of texts of {PIECE} characters get other tokens: pass token ids where "
                "it matters"
            )
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(words)
        writer.add_token_merges([" ".join(merge) for merge in merges])
    tokenizer = AutoTokenizer.from_pretrained(directory)
    _add_ends(writer, tokenizer, directory, vocab_size)
    for name in ("bos", "pad", "unk"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _add_ends(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, directory: Path, vocab_size: int) -> None:
    """Writes the tokens that end a generation: the tokenizer's, then those of `generation_config.json`.

    A file has a key for each of three (end of sequence, of turn and of message), and llama.cpp stops at any of them. A
    warning names those that are left out.
    """
    path = directory / "generation_config.json"
    ends = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    ends = ends if isinstance(ends, list) else [ends]
    numbers = [number for number in dict.fromkeys([tokenizer.eos_token_id, *ends]) if number is not None]
    keys = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    written = [number for number in numbers if number < vocab_size][: len(keys)]
    for add, number in zip(keys, written, strict=False):
        add(number)
    if left := [number for number in numbers if number not in written]:
        names = ", ".join(f"{number} ({tokenizer.convert_ids_to_tokens(number)})" for number in left)
        print(
            f"warning: a GGUF file names {len(keys)} tokens that end a generation, each below {vocab_size}. "
            f"{len(left)} are left out: {names}. Pass them to llama.cpp as stop strings"
        )


def _type(text: str | None, added: dict | None, is_sentencepiece: bool) -> gguf.TokenType:
    """The GGUF type of a token.

    Args:
        text: its text; None: the vocabulary has no such token.
        added: its entry in `added_tokens` of `tokenizer.json`; None: it was not added to the vocabulary.
        is_sentencepiece: whether the vocabulary is sentencepiece's.
    """
    import gguf

    types = gguf.TokenType
    if text is None:
        return types.UNUSED
    if added is not None:
        return types.CONTROL if added["special"] else types.USER_DEFINED
    return types.BYTE if is_sentencepiece and re.fullmatch("<0x[0-9A-F]{2}>", text) else types.NORMAL


def words_of(tokenizer: Tokenizer) -> tuple[str, float]:
    """llama.cpp's rule for splitting text into words that comes closest to a tokenizer's.

    Returns:
        Name of the rule, and the share of text pieces that get other tokens with it (0: none).
    """
    texts = [document for name in bundled_names() for document in read_documents(f"bundled:{name}")]
    pieces = [text[i : i + PIECE] for text in texts for i in range(0, len(text), PIECE)]
    pieces = pieces[:: max(1, len(pieces) * PIECE // SAMPLE)]
    expected = [encoding.ids for encoding in tokenizer.encode_batch_fast(pieces, add_special_tokens=False)]
    shares = {}
    for name, expressions in WORDS.items():
        variant = Tokenizer.from_str(tokenizer.to_str())
        splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        variant.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
        variant.normalizer = None
        variant.model.ignore_merges = name in WHOLE
        ids = [encoding.ids for encoding in variant.encode_batch_fast(pieces, add_special_tokens=False)]
        shares[name] = sum(a != b for a, b in zip(ids, expected, strict=True)) / len(pieces)
    best = min(shares, key=shares.get)
    return best, shares[best]
