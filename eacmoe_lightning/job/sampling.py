"""The sampled calibration texts of a run: written before its first block, batch by batch, and kept in its directory.

`sampled/text_0/` holds the source's `recipe.json`, finished batches (`part_0000.safetensors`) and at last
`windows.safetensors`. So a job that was killed goes on with the next batch, and a run that continues samples nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eacmoe_lightning.compressed.loading import load
from eacmoe_lightning.compressed.opening import OpenedModel, open_model
from eacmoe_lightning.job.data import TextWindows
from eacmoe_lightning.models.fingerprint import fingerprint
from eacmoe_lightning.models.sampling import batch_size, sample
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.planning.checks import check_sampling
from eacmoe_lightning.run.directory import RunDirectory
from eacmoe_lightning.run.files import read_tensors, write_json, write_tensors
from eacmoe_lightning.run.memory import return_free_memory
from eacmoe_lightning.run.ranks import Ranks
from eacmoe_lightning.text.answers import REQUESTS, ask, enough, pack
from eacmoe_lightning.text.checks import tokenizer_difference
from eacmoe_lightning.text.languages import languages, scripts
from eacmoe_lightning.text.openings import PROMPTS, Openings, openings
from eacmoe_lightning.text.sampled import FORMS, SampledSource, sampled_source
from eacmoe_lightning.text.server import Server, ServerError
from eacmoe_lightning.text.windows import Windows

OPTION = "--data.calibration"
log = logging.getLogger(__name__)


class SampledTexts:
    """Samples what `TextWindows` names as `self`.

    Args:
        data: the data module, which gets the windows.
        run: where they are kept.
        moe: the original; it is loaded as a whole while it writes.
        ranks: processes that share the batches.
        original: name or path of the original.
        dtype, trust_remote_code: how models are opened.
    """

    def __init__(
        self,
        data: TextWindows,
        run: RunDirectory,
        moe: StreamedModel,
        ranks: Ranks,
        original: str,
        dtype: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        self.data, self.run, self.moe, self.ranks = data, run, moe, ranks
        self.original, self.dtype, self.trust_remote_code = original, dtype, trust_remote_code
        self.texts = [
            (name, source, run.sampled / f"text_{number}")
            for number, (name, source) in enumerate(data.sampled_texts.items())
        ]

    # --- before anything long -------------------------------------------------------------------------------

    def check(self) -> None:
        """Checks that what will be sampled can be.

        Raises:
            FileNotFoundError: there is no model in a directory.
            ValueError: the original does not fit into memory, a model has other tokens, a server does not answer, or
                the tokenizer lacks what windows are to begin with.
        """
        for name, source, folder in self.texts:
            if _windows(folder).exists():
                continue
            self._openings(name, 1, torch.Generator().manual_seed(0))
            if source.is_server:
                log.info("%s: the server's model is %s", name, self._server(source).model)
            elif source.model is None:
                check_sampling(self.moe, self._batch(name), self.data.window_length)
            else:
                self._refuse_other_tokens(source)

    def prepare(self, continues: bool) -> None:
        """Drops what another recipe left in the directory; for the first process, which holds the run's lock.

        Raises:
            ValueError: the run that is continued began with another recipe.
        """
        for name, source, folder in self.texts:
            recipe, path = self._recipe(name, source), folder / "recipe.json"
            held = json.loads(path.read_text()) if path.exists() else None
            if held is None or not continues:
                recipe["fingerprint"] = self._fingerprint(source)
                if held != recipe:
                    shutil.rmtree(folder, ignore_errors=True)
                    write_json(path, recipe)
                continue
            for key, value in recipe.items():
                if held.get(key, value) != value and not (key == "source" and self._has_moved(held, source)):
                    raise ValueError(
                        f"{self.run.path} (--trainer.default_root_dir) holds a run with other settings: "
                        f"--data.calibration, {name}: {key} was {held.get(key)!r} and is now {value!r}. Nothing was "
                        "changed: pass another --trainer.default_root_dir, or the settings of that run"
                    )

    def _has_moved(self, held: dict[str, Any], source: SampledSource) -> bool:
        """Whether a source differs from the one that a recipe holds only by where its server or its model is."""
        before = sampled_source(held["source"])
        if None in (before.model, source.model) or before.num != source.num or before.is_server != source.is_server:
            return False
        return source.is_server or self._fingerprint(source) == held["fingerprint"]

    # --- the windows ------------------------------------------------------------------------------------------

    def make(self) -> None:
        """Samples what is missing and hands all windows to the data module; for every process."""
        for name, source, folder in self.texts:
            if not _windows(folder).exists():
                self._write(name, source, folder)
            self.ranks.barrier()
            tensors, _ = read_tensors(_windows(folder))
            self.data.put_sampled(name, self._counted(tensors))

    def described(self) -> dict[str, Any]:
        """For the report: by sampled text, what wrote it and what was written.

        Returns:
            By text: `model`; `windows`, `tokens`; `chosen`, the tokens that the model chose itself; `documents`, their
            number, that is the ends that it chose and the windows that have none; `document_tokens`, their mean length;
            `scripts`, shares of the letters; `languages`, shares of the windows (text/languages.py).
        """
        result = {}
        for name, source, folder in self.texts:
            tensors, recipe = read_tensors(_windows(folder))
            ids = tensors["input_ids"]
            texts = self.data.tokens.batch_decode(ids.tolist(), skip_special_tokens=True)
            documents = int(tensors["documents"].sum())
            result[name] = {
                "model": source.model or self.original,
                "temperature": recipe["temperature"],
                "sample_start": recipe["sample_start"],
                "windows": len(ids),
                "tokens": ids.numel(),
                "chosen": int(tensors["chosen"].sum()),
                "documents": documents,
                "document_tokens": ids.numel() / documents,
                "scripts": scripts(texts),
                "languages": languages(texts),
            }
        return result

    def _counted(self, tensors: dict[str, Tensor]) -> Windows:
        ids, counts = tensors["input_ids"].long(), None
        if self.data.answers_only:
            counts = tensors["chosen"].bool()
        if self._one_document:
            first = torch.arange(ids.shape[1]) < tensors["first"].unsqueeze(1)
            counts = first if counts is None else counts & first
        return Windows(ids, counts)

    def _write(self, name: str, source: SampledSource, folder: Path) -> None:
        if self.ranks.is_first:
            number, length = self.data.windows_by_text[name], self.data.window_length
            print(f"{name}: {number} windows of {length} tokens are sampled from {source.model or self.original}")
        if source.is_server:
            if self.ranks.is_first:
                self._write_asked(name, source, folder)
        else:
            self._write_parts(name, source, folder)
        self.ranks.barrier()
        if self.ranks.is_first and not _windows(folder).exists():
            parts = [read_tensors(path)[0] for path in _parts(folder)]
            self._finish(folder, {key: torch.cat([part[key] for part in parts]) for key in parts[0]})

    def _finish(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        write_tensors(_windows(folder), tensors, json.loads((folder / "recipe.json").read_text()))
        for path in _parts(folder):
            path.unlink()

    def _write_parts(self, name: str, source: SampledSource, folder: Path) -> None:
        """This process's batches that are missing."""
        number, length = self.data.windows_by_text[name], self.data.window_length
        generator = self._generator(name)
        given = self._openings(name, number, generator)
        uniforms = torch.rand(number, length, dtype=torch.float64, generator=generator)
        starts = range(0, number, self._batch(name))
        missing = {index: start for index, start in enumerate(starts) if not _part(folder, index).exists()}
        mine = {i: start for i, start in missing.items() if i % self.ranks.world == self.ranks.rank}
        if not mine:
            return
        with self._sampler(source) as model:
            for index, start in mine.items():
                rows = slice(start, min(start + starts.step, number))
                try:
                    ids, chosen = sample(model, given[rows], uniforms[rows], self.data.temperature, self._num_ids)
                except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
                    raise ValueError(
                        f"{OPTION}: {source.model or self.original} cannot be sampled from here: {error}. Pass "
                        "self:URL, a server's address, or other text"
                    ) from error
                write_tensors(_part(folder, index), _with_documents(ids.int(), chosen, self._ends(given)))

    @contextmanager
    def _sampler(self, source: SampledSource) -> Iterator[PreTrainedModel]:
        """The model that writes, wholly in memory inside the `with` block."""
        if source.model is None:
            self.moe.load_all()
            yield self.moe.model
            for block in self.moe.blocks:
                self.moe.release(block.index)
            return
        opened = self._open(source)
        if opened.is_compressed:
            model = load(opened.directory, self.dtype, trust_remote_code=self.trust_remote_code).to(self.moe.device)
        else:
            moe = StreamedModel(opened.weights, self.moe.device)
            moe.load_all()
            model = moe.model
        yield model
        del model
        return_free_memory()

    def _open(self, source: SampledSource) -> OpenedModel:
        """The model of `self:PATH`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: its files are no model.
        """
        try:
            opened = open_model(Path(source.model).expanduser(), self.dtype, OPTION, self.trust_remote_code)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{OPTION}: nothing can sample at {source.model!r}: {error}; {FORMS}") from error
        return opened

    def _refuse_other_tokens(self, source: SampledSource) -> None:
        """Raises ValueError if the model of `self:PATH` has other tokens than the original; it may have more rows."""
        opened = self._open(source)
        rows, needed = opened.weights.skeleton().config.get_text_config().vocab_size, self.moe.config.vocab_size
        own, what = opened.tokenizer, None
        if rows < self._num_ids or (own is None and rows != needed):
            what = f"{source.model} has {rows} tokens and {self.original} has {needed}"
        elif own is not None:
            what = tokenizer_difference(self.data.tokens, own, f"in {source.model}", self._num_ids)
        if what is not None:
            raise ValueError(
                f"{OPTION}: {source.model} does not write the tokens of {self.original}: {what}: sample from a model "
                "with the same tokenizer, such as a compressed directory of this original"
            )

    # --- from a server ----------------------------------------------------------------------------------------

    def _server(self, source: SampledSource) -> Server:
        try:
            server = Server(source.model)
            _ = server.model
            return server
        except ServerError as error:
            raise ValueError(f"{OPTION}: {error}") from error

    def _write_asked(self, name: str, source: SampledSource, folder: Path) -> None:
        """Asks until there are enough texts; the answers to a few requests at a time are a part."""
        number, length = self.data.windows_by_text[name], self.data.window_length
        server, parts = self._server(source), [read_tensors(path)[0] for path in _parts(folder)]
        try:
            while not enough(parts, number, length, self._one_document):
                generator = self._generator(f"{name} {len(parts)}")
                given = self._openings(name, REQUESTS, generator)
                parts.append(
                    ask(server, self.data.tokens, given, self._ends(given), length, self.data.temperature, generator)
                )
                write_tensors(_part(folder, len(parts) - 1), parts[-1])
        except ServerError as error:
            raise ValueError(f"{OPTION}: {error}. Finished answers are kept: the same command goes on") from error
        rows = pack(parts, number, length, self.data.tokens.eos_token_id or 0, self._one_document)
        ends = self._ends(self._openings(name, 1, self._generator(name)))
        self._finish(folder, _with_documents(rows["input_ids"], rows["chosen"], ends))

    # --- settings ---------------------------------------------------------------------------------------------

    @property
    def _one_document(self) -> bool:
        """Whether only the first document of a sampled window counts."""
        return self.data.documents != "joined"

    def _recipe(self, name: str, source: SampledSource) -> dict[str, Any]:
        return {
            "source": source.stored,
            "dtype": self.dtype,
            "windows": self.data.windows_by_text[name],
            "window_length": self.data.window_length,
            "seed": self.data.seed,
            "temperature": self.data.temperature,
            "sample_start": self.data.sample_start,
            "one_document": self._one_document,
            "tokenizer": self._tokenizer_digest(name),
        }

    def _tokenizer_digest(self, name: str) -> str:
        """Of what the windows take from the tokenizer: its tokens, how it splits text, and what windows open with."""
        tokenizer, given = self.data.tokens, self._openings(name, len(PROMPTS), self._generator(name))
        opens = [given.given, sorted(given.ends), given.between]
        parts = [sorted(tokenizer.get_vocab().items()), tokenizer(" ".join(PROMPTS))["input_ids"], opens]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _fingerprint(self, source: SampledSource) -> str | None:
        if source.is_server:
            return None
        return fingerprint(self.original if source.model is None else str(self._open(source).directory))

    def _generator(self, name: str) -> torch.Generator:
        seed = hashlib.sha256(f"{self.data.seed} {name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(seed[:7], "big"))

    def _openings(self, name: str, number: int, generator: torch.Generator) -> Openings:
        return openings(self.data.tokens, self.data.sample_start, number, self._num_ids, generator)

    def _ends(self, given: Openings) -> frozenset[int]:
        """Tokens that end a document."""
        return given.ends or frozenset({self.data.tokens.eos_token_id} - {None})

    @property
    def _num_ids(self) -> int:
        """Token ids that both the tokenizer and the embedding have."""
        rows = len(self.moe.model.get_input_embeddings().weight)
        return min(rows, max(self.data.tokens.get_vocab().values()) + 1)

    def _batch(self, name: str) -> int:
        model = self.moe.model
        number, length = self.data.windows_by_text[name], self.data.window_length
        return batch_size(self.moe.config, model.dtype.itemsize, number, length, self.moe.device.type)


def _windows(folder: Path) -> Path:
    return folder / "windows.safetensors"


def _part(folder: Path, index: int) -> Path:
    return folder / f"part_{index:04d}.safetensors"


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part_*.safetensors"))


def _with_documents(ids: Tensor, chosen: Tensor, ends: frozenset[int]) -> dict[str, Tensor]:
    """What is stored of windows [B, T]: ids; which of them the model chose; tokens of the window's first document, its
    end included [B]; documents that the window holds, at least in part [B]."""
    is_end = torch.isin(ids, torch.tensor(sorted(ends), dtype=ids.dtype)) & chosen
    first = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, ids.shape[1])
    return {"input_ids": ids, "chosen": chosen, "first": first, "documents": is_end[:, :-1].sum(1) + 1}
