"""Train the tokenizer (byte-level BPE, 4,096 entries, single digits) and encode the corpus.

`--tokenizer` takes a trained one instead, so that a second model reads the same tokens as the first.
Digits are split one by one, so that a number is always encoded the same way. `<|endoftext|>` ends
documents and begins them (bos = eos); `<|pad|>` pads. The encoded corpus is one uint16 array per
split and domain: documents in shuffled order, each followed by `<|endoftext|>`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from corpus import DOMAINS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096
CONTEXT = 512
SAMPLE_BYTES = {"prose": 5e6, "code": 5e6, "maths": 1e6, "french": 4e6, "german": 3e6, "dictionary": 2e6, "formal": 1e6}


def documents(corpus: Path, split: str, domain: str) -> list[str]:
    with open(corpus / split / f"{domain}.jsonl") as file:
        return [json.loads(line)["text"] for line in file]


def sample(corpus: Path) -> list[str]:
    """Texts in about the training mix, few enough that training the merges takes a minute."""
    chosen = []
    for domain in DOMAINS:
        size = 0
        for text in documents(corpus, "train", domain):
            size += len(text)
            if size > SAMPLE_BYTES[domain]:
                break
            chosen.append(text)
    return chosen


def train(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train the tokenizer; runs of indentation stay whole, so that code does not cost a token per space."""
    tokenizer = Tokenizer(models.BPE())
    words = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    pieces = []
    for start in range(0, len(texts), 256):
        for encoding in tokenizer._tokenizer.encode_batch_fast(texts[start : start + 256]):
            pieces.append(np.array([*encoding.ids, tokenizer.eos_token_id], dtype=np.uint16))
    return np.concatenate(pieces)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=Path("work/corpus"))
    parser.add_argument("--out", type=Path, default=Path("work/tokens"))
    parser.add_argument("--tokenizer", type=Path, help="directory of a trained tokenizer")
    options = parser.parse_args()
    if options.tokenizer:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.tokenizer)
    else:
        tokenizer = train(sample(options.corpus))
    tokenizer.save_pretrained(options.out / "tokenizer")
    for split in ("train", "heldout"):
        for domain in DOMAINS:
            texts = documents(options.corpus, split, domain)
            tokens = encode(tokenizer, texts)
            np.save(options.out / f"{split}-{domain}.npy", tokens)
            size = sum(len(text.encode()) for text in texts)
            print(
                f"{split:8s} {domain:10s} {len(tokens) / 1e6:7.3f} M tokens, {size / len(tokens):.2f} bytes per token",
                flush=True,
            )
