"""An original's tokenizer."""

from __future__ import annotations

from importlib.util import find_spec

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from eacmoe_lightning.models.originals import UntrustedCode, local_directory, no_model, read_config, resolve_model
from eacmoe_lightning.models.transformers_loader import UNBUILDABLE
from eacmoe_lightning.models.weight_files import DamagedFile, check_fetched, check_option_files

PROBE = "Any text has tokens: 1, 2, 3."
READERS = {  # files that transformers reads by a package that it does not require
    "tiktoken.model": "tiktoken",
    "*.tiktoken": "tiktoken",
    "tokenizer.model": "sentencepiece",
    "spiece.model": "sentencepiece",
    "tekken.json": "mistral_common",
}


def load_tokenizer(name_or_path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A model's tokenizer.

    Args:
        name_or_path, trust_remote_code: see `originals.read_config`.

    Raises:
        OSError: there is none, or one of its files is damaged.
        ValueError: it needs code that came with it, and that is not trusted.
    """
    path = resolve_model(name_or_path)
    check_fetched(path, weights=False)
    check_option_files(path)
    try:
        try:
            return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        except StrictDataclassError:  # it reads config.json too, which lacks what `read_config` fills in
            config, _ = read_config(name_or_path, trust_remote_code)
            return AutoTokenizer.from_pretrained(path, config=config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if trust_remote_code or "trust_remote_code" not in str(error):
            raise
        raise UntrustedCode(name_or_path, "`auto_map` in its tokenizer_config.json or config.json") from error


def _refuse_missing_reader(name_or_path: str, option: str) -> None:
    """Raises ValueError for a tokenizer that a missing package reads, FileNotFoundError where there is no model."""
    folder = local_directory(name_or_path, option)
    if (folder / "tokenizer.json").is_file():
        return
    for pattern, package in READERS.items():
        if (file := next(folder.glob(pattern), None)) is not None and find_spec(package) is None:
            raise ValueError(
                f"the tokenizer of {name_or_path!r} ({option}) cannot be opened: {file.name} is read by the package "
                f"{package}: pip install {package}"
            )


def _refuse_config(name_or_path: str, trust_remote_code: bool) -> None:
    """Raises DamagedFile if transformers does not understand the config.json, which most tokenizers read too."""
    try:
        read_config(name_or_path, trust_remote_code)
    except DamagedFile:
        raise
    except (OSError, ValueError):  # it is of a compressed model, or nothing that a tokenizer reads
        return


def _without_dropout(tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes a tokenizer cut the same text the same way each time: BPE can leave out merges at random (`dropout`)."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if getattr(model, "dropout", None):
        model.dropout = None


def tokenizer_of(
    name_or_path: str, option: str = "--model.name_or_path", trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """`load_tokenizer` for a command: what it raises names the option that the model came from.

    Raises:
        FileNotFoundError: there is no such model; or it has no tokenizer, an empty or a damaged one.
        ValueError: it needs code that came with it, and that is not trusted; or a package that is not installed.
    """
    cause: Exception | None = None
    try:
        tokenizer = load_tokenizer(name_or_path, trust_remote_code)
        _without_dropout(tokenizer)
        if tokenizer(PROBE)["input_ids"]:
            return tokenizer
        problem = "it makes no token of any text"  # as some classes do where they find or can read none of its files
    except (DamagedFile, UntrustedCode):
        raise
    except (*UNBUILDABLE, OSError, ValueError) as error:
        cause, problem = error, str(error)
    _refuse_missing_reader(name_or_path, option)
    if isinstance(cause, UNBUILDABLE):
        _refuse_config(name_or_path, trust_remote_code)
        reason = f"transformers does not understand the tokenizer's files ({cause!r})."
        raise no_model(name_or_path, reason, option) from cause
    raise FileNotFoundError(
        f"{name_or_path!r} ({option}) has no tokenizer, or a damaged one: put the files there that the model was "
        f"published with (tokenizer.json, tokenizer_config.json). {problem}"
    ) from cause
