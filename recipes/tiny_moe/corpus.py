"""Build the corpus: read every source, split by document, write training and shipped text.

A document goes to `heldout`, `calibration` or `train` by a hash of its name alone, so that the split
does not change when sources are added. Books of the Bible are assigned by number, and Jane Austen's
last novel is held out as a whole. Shipped excerpts come from `heldout` and `calibration` documents
of sources that are in the public domain or permissively licensed.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sources
from maths_questions import sheets

DOMAINS = ("prose", "code", "maths", "french", "german", "dictionary", "formal")
HELDOUT = ("austen/persuasion", "scripture/08", "scripture/27", "scripture/42")  # Ruth, Daniel, Luke
CALIBRATION = ("scripture/16", "scripture/20", "scripture/44")  # Nehemiah, Proverbs, Acts
SHIPPED_BYTES = {"heldout": 130_000, "calibration": 82_000}
LONGEST = {"french": 70_000, "german": 70_000}  # bytes of one document in an excerpt
CALIBRATION_DOMAINS = ("prose", "code", "maths", "french")  # German stays out on purpose


@dataclass
class Source:
    """Where text comes from, and whether the package may ship an excerpt of it."""

    name: str
    domain: str
    read: Callable[[Path], sources.Documents]
    licence: str
    shipped: bool = False


def scripture(translation: str) -> Callable[[Path], sources.Documents]:
    return lambda raw: sources.scripture(raw, translation)


def all_sources(maths_seconds: float) -> list[Source]:
    free = "public domain"
    return [
        Source("Austen, six novels", "prose", sources.austen, free, shipped=True),
        Source("Melville, Moby-Dick", "prose", sources.moby_dick, free, shipped=True),
        Source("State of the Union addresses", "prose", sources.speeches, free, shipped=True),
        Source("Shakespeare, Milton", "prose", sources.plays, free),
        Source("King James Version", "prose", scripture("k"), free),
        Source("Python standard library", "code", sources.standard_library, "PSF-2.0", shipped=True),
        Source("Python packages", "code", sources.installed_packages, "BSD, MIT, Apache-2.0"),
        Source(
            "mathematics-dataset, generated", "maths",
            lambda raw: sheets(raw, maths_seconds, seed=1), "Apache-2.0", shipped=True,
        ),
        Source("Bible, Segond 1910", "french", scripture("l"), free, shipped=True),
        Source("Bible, Ostervald", "french", scripture("o"), free),
        Source("manual pages (fr)", "french", lambda raw: sources.manuals(raw, "fr"), "GPL-3+ and others"),
        Source(
            "handbook, reference, help (fr)", "french",
            lambda raw: sources.web(raw, "fr"), "GPL-2+/CC-BY-SA-3.0, MPL-2.0",
        ),
        Source("Bible, Elberfelder (unrevised)", "german", scripture("e"), free, shipped=True),
        Source("manual pages (de)", "german", lambda raw: sources.manuals(raw, "de"), "GPL-3+ and others"),
        Source("handbook, reference (de)", "german", lambda raw: sources.web(raw, "de"), "GPL-2+/CC-BY-SA-3.0"),
        Source("WordNet, FOLDOC, Jargon File", "dictionary", sources.dictionaries, "WordNet, GFDL, public domain"),
        Source("Metamath set.mm statements", "formal", sources.formal, "CC0-1.0"),
    ]  # fmt: skip


def split_of(document: str) -> str:
    """The split of a document: by list, or by hash 4 % held out, 4 % for calibration and the rest for training."""
    if document.startswith("scripture") or document.startswith(HELDOUT):
        return "heldout" if document.startswith(HELDOUT) else "calibration" if document in CALIBRATION else "train"
    draw = int(hashlib.sha256(document.encode()).hexdigest()[:8], 16) / 2**32
    return "heldout" if draw < 0.04 else "calibration" if draw < 0.08 else "train"


def collect(raw: Path, maths_seconds: float) -> dict[tuple[str, str], list[dict]]:
    """Read all sources into {(split, domain): documents}, shuffled, and print what was read."""
    corpus: dict[tuple[str, str], list[dict]] = {}
    for source in all_sources(maths_seconds):
        sizes = dict.fromkeys(("train", "heldout", "calibration"), 0)
        for name, text in source.read(raw):
            split = split_of(name)
            sizes[split] += len(text.encode())
            document = {"name": name, "source": source.name, "shipped": source.shipped, "text": text.strip()}
            corpus.setdefault((split, source.domain), []).append(document)
        print(f"{source.domain:10s} {source.name:34s}", {k: f"{v / 1e6:.2f} MB" for k, v in sizes.items()}, flush=True)
    for key in sorted(corpus):
        random.Random(0).shuffle(corpus[key])
    return corpus


def excerpts(documents: list[dict], limit: int, longest: int) -> list[dict]:
    """Whole documents, in order, cut at `longest` bytes (at a line end), until `limit` is reached."""
    chosen, size = [], 0
    for document in documents:
        text = document["text"].encode()[:longest].decode("utf-8", "ignore")
        text = text if len(text) == len(document["text"]) else text[: text.rfind("\n")].rstrip()
        if document["shipped"] and size + len(text.encode()) <= limit * 1.05 and len(text) > 400:
            chosen.append({**document, "text": text})
            size += len(text.encode())
    return chosen


def ship(corpus: dict, folder: Path) -> None:
    """Write calibration.txt (domains interleaved) and heldout/*.txt, and list their documents."""
    (folder / "heldout").mkdir(parents=True, exist_ok=True)
    listing: dict[str, list[str]] = {}
    for domain in (*CALIBRATION_DOMAINS, "german"):
        chosen = excerpts(corpus["heldout", domain], SHIPPED_BYTES["heldout"], LONGEST.get(domain, 24_000))
        (folder / "heldout" / f"{domain}.txt").write_text("\n\n".join(d["text"] for d in chosen) + "\n")
        listing[f"heldout/{domain}.txt"] = [f"{d['name']} ({d['source']})" for d in chosen]
    mix = []
    for domain in CALIBRATION_DOMAINS:
        chosen = excerpts(corpus["calibration", domain], SHIPPED_BYTES["calibration"], LONGEST.get(domain, 16_000) // 2)
        mix += [(number / len(chosen), d) for number, d in enumerate(chosen)]
    mix.sort(key=lambda pair: pair[0])
    (folder / "calibration.txt").write_text("\n\n".join(d["text"] for _, d in mix) + "\n")
    listing["calibration.txt"] = [f"{d['name']} ({d['source']})" for _, d in mix]
    (folder / "documents.json").write_text(json.dumps(listing, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw", type=Path, default=Path("work/raw"))
    parser.add_argument("--out", type=Path, default=Path("work/corpus"))
    parser.add_argument("--text", type=Path, required=True, help="folder for the shipped text files")
    parser.add_argument("--maths_seconds", type=float, default=90.0)
    options = parser.parse_args()
    corpus = collect(options.raw, options.maths_seconds)
    for (split, domain), documents in corpus.items():
        (options.out / split).mkdir(parents=True, exist_ok=True)
        with open(options.out / split / f"{domain}.jsonl", "w") as file:
            file.writelines(json.dumps(d, ensure_ascii=False) + "\n" for d in documents)
    ship(corpus, options.text)
