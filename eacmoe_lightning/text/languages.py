"""In which scripts and languages texts are, roughly: letters by Unicode, languages by their frequent words."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import cache

FREQUENT = {  # words frequent in a language and rare in the others; no single letters, which name variables
    "english": "the of and to is that for was with this are from which not",
    "german": "der und das ist nicht mit den von ein eine zu auf für sich",
    "french": "les des est dans pour que une qui du sur pas par avec au",
    "spanish": "el los las del para una por con se como más pero está",
    "italian": "il di che per non gli della sono una con del è anche nel",
    "portuguese": "da em não para uma os com dos mais são ao pelo você isso",
    "dutch": "het een van en is niet op dat voor zijn met aan wordt ook",
    "polish": "na się nie jest że od przez są oraz jak dla jego może tylko",
    "swedish": "och att det är som på för av med inte den till ett har",
    "russian": "не на что по это как для из от он было его но так",
}
LEAST = 0.06  # share of a text's words that are frequent ones of the language; running text has 0.15 and more
FEWEST = 3  # of them, to tell
OTHER = "other"  # code, tables, formulas, short texts and other languages
_LANGUAGES = {  # of each word; it may be frequent in several
    word: [language for language, words in FREQUENT.items() if word in words.split()]
    for word in " ".join(FREQUENT.values()).split()
}


def language_of(text: str) -> str:
    """The language of `FREQUENT` whose words are the most frequent in a text, or `other`."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    counts = Counter(language for word in words for language in _LANGUAGES.get(word, ()))
    if not counts:
        return OTHER
    language, number = counts.most_common(1)[0]
    return language if number >= max(LEAST * len(words), FEWEST) else OTHER


def languages(texts: Iterable[str]) -> dict[str, float]:
    """The share of the texts in each language, largest first."""
    return _shares(Counter(map(language_of, texts)))


def scripts(texts: Iterable[str]) -> dict[str, float]:
    """The share of the letters in each script, largest first: `latin`, `cyrillic`, `cjk`, as Unicode names them."""
    counts = Counter(character for text in texts for character in text if character.isalpha())
    of_scripts: Counter[str] = Counter()
    for character, number in counts.items():
        of_scripts[_script(character)] += number
    return _shares(of_scripts)


@cache
def _script(character: str) -> str:
    return unicodedata.name(character, "unnamed").split()[0].lower()


def _shares(counts: Counter[str]) -> dict[str, float]:
    return {name: number / counts.total() for name, number in counts.most_common()}
