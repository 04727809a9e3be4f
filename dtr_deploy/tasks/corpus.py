"""Text for distillation: files, folders, Hugging Face data sets, the Python manual, made text -> packed tokens.

The order of documents is a seeded shuffle that reads only what it needs: large text files by blocks at random offsets,
parquet by row groups, hub data sets by streaming. Nothing is tokenised beyond the tokens asked for (and the rest of the
last document). The same sources, tokenizer, seed and lengths give the same sequences on every machine.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dtr_deploy.errors import UsageError
from dtr_deploy.tasks.recall_text import recall_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
TEXT_FIELDS = ("text", "content", "body", "document")
SEPARATOR = "\n\n"
"""Between documents. Plain text rather than an end-of-text token: an instruction-tuned model's is a turn's end."""
_BYTES_PER_TOKEN = 4
_SHUFFLE_BUFFER = 1000  # documents of a streamed data set that are shuffled among each other


@dataclass(frozen=True)
class Corpus:
    """Packed sequences, int64: `train` [N, T] shuffled, `held_out` [M, T]; no document is in both.

    tokens_by_source: tokens taken from each source, both parts together.
    """

    train: Tensor
    held_out: Tensor
    tokens_by_source: dict[str, int]


def load_corpus(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    sequence_length: int,
    held_out: int = 0,
    seed: int = 0,
) -> Corpus:
    """`tokens` (rounded up to whole sequences) to train on and `held_out` sequences to judge by.

    sources: each a .txt, .md, .jsonl or .parquet file, a folder of such, a hub data set `owner/name[:config[:split]]`
        (text taken from the first of the columns text, content, body, document), `pydoc` (the Python manual that comes
        with the interpreter), or `recall` (made text that asks for recall, without end: `recall_text`). Each gives an
        equal share of the tokens as long as it lasts.
    The held-out part is read first, so it does not depend on `tokens`. Raises `UsageError` for a source that is missing
    or unreadable, and when all sources together are too short.
    """
    if not sources:
        raise UsageError("corpus: name at least one text file, data set, or pydoc")
    if tokens < 1 or sequence_length < 2 or held_out < 0:
        raise UsageError(f"corpus: tokens {tokens}, sequence_length {sequence_length}, held_out {held_out}: too small")
    mixture = _Mixture(sources, tokenizer, sequence_length, seed)
    rows = -(-tokens // sequence_length)
    held = mixture.take(held_out)
    mixture.drop_partial_document()
    train = mixture.take(rows)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return Corpus(train[order], held, mixture.tokens_by_source)


class _Mixture:
    """Token stream over several sources: the one that has given the fewest tokens gives the next document."""

    def __init__(
        self, sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int, seed: int
    ) -> None:
        self.tokens_by_source = dict.fromkeys(sources, 0)
        self._length = sequence_length
        # A block of a plain text file: some sequences long, so that sequences hold coherent text, yet far smaller than
        # any file worth sampling from.
        block = 2 * _BYTES_PER_TOKEN * sequence_length
        self._streams = {name: _tokenised(_documents(name, block, seed), tokenizer, block) for name in sources}
        self._pending = np.empty(0, dtype=np.int64)

    def take(self, rows: int) -> Tensor:
        """The next `rows` sequences, int64 [rows, T]."""
        needed = rows * self._length
        parts, have = [self._pending], len(self._pending)
        while have < needed:
            if not self._streams:
                raise UsageError(
                    f"corpus: {', '.join(self.tokens_by_source)} hold {sum(self.tokens_by_source.values())} tokens, "
                    f"{needed - have} too few; add text or ask for fewer tokens"
                )
            source = min(self._streams, key=self.tokens_by_source.__getitem__)
            document = next(self._streams[source], None)
            if document is None:
                del self._streams[source]
                continue
            self.tokens_by_source[source] += len(document)
            parts.append(document)
            have += len(document)
        stream = np.concatenate(parts)
        self._pending = stream[needed:]
        return torch.from_numpy(stream[:needed].copy()).view(rows, self._length)

    def drop_partial_document(self) -> None:
        """Forget tokens read but not taken, so that what follows starts with documents not seen so far."""
        self._pending = self._pending[:0]


def _tokenised(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, block: int) -> Iterator[np.ndarray]:
    """Tokens of each document and the separator after it; very long documents come in pieces."""
    piece = 8 * block
    for document in documents:
        text = document + SEPARATOR
        for start in range(0, len(text), piece):
            ids = tokenizer(text[start : start + piece], add_special_tokens=False, verbose=False)["input_ids"]
            yield np.asarray(ids, dtype=np.int64)


def _documents(source: str, block: int, seed: int) -> Iterator[str]:
    """Texts of a source in a seeded random order, checked for existence at once rather than at the first document."""
    rng = random.Random(f"corpus/{seed}/{os.path.basename(source)}")
    if source == "pydoc":
        return _pydoc(rng)
    if source == "recall":
        return recall_documents(rng)
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise UsageError(f"corpus: folder {source} holds no file ending in {', '.join(SUFFIXES)}")
        rng.shuffle(files)
        return itertools.chain.from_iterable(_file_documents(file, block, rng) for file in files)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UsageError(f"corpus: {source}: a file must end in {', '.join(SUFFIXES)}")
        return _file_documents(path, block, rng)
    name = source.split(":")[0]
    if path.suffix in SUFFIXES or source.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise UsageError(f"corpus: no file or folder {source}")
    return _hub_documents(source, seed)


def _file_documents(path: Path, block: int, rng: random.Random) -> Iterator[str]:
    if path.suffix == ".parquet":
        return _parquet_documents(path, rng)
    blocks = _line_blocks(path, block, rng)
    if path.suffix == ".jsonl":
        return (_json_text(path, line) for part in blocks for line in part.splitlines() if line.strip())
    return (part.decode("utf-8", errors="replace").strip("\n") for part in blocks)


def _line_blocks(path: Path, block: int, rng: random.Random) -> Iterator[bytes]:
    """Blocks of whole lines in random order; block i has the lines beginning in bytes [i * block, (i + 1) * block)."""
    order = list(range(-(-path.stat().st_size // block)))
    rng.shuffle(order)
    with path.open("rb") as file:
        for index in order:
            start = index * block
            if index:
                # From the byte before: if that is a line's end, the line beginning at `start` is this block's.
                file.seek(start - 1)
                start = start - 1 + len(file.readline())
            length = (index + 1) * block - start
            if length <= 0:
                continue  # one line spans the whole block; it belongs to the block it begins in
            file.seek(start)
            part = file.read(length)
            if not part.endswith(b"\n"):
                part += file.readline()
            if part.strip():
                yield part


def _json_text(path: Path, line: bytes) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UsageError(f"corpus: {path}: a line is not JSON ({error}): {line[:40]!r}") from error
    return row if isinstance(row, str) else _text_of(str(path), row)


def _text_of(source: str, row: Any) -> str:
    for field in TEXT_FIELDS:
        if isinstance(row, dict) and isinstance(row.get(field), str):
            return row[field]
    fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    raise UsageError(f"corpus: {source}: a row needs one of the text fields {', '.join(TEXT_FIELDS)}; it has {fields}")


def _parquet_documents(path: Path, rng: random.Random) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UsageError(f"corpus: {path}: not a parquet file ({error})") from error
    names = file.schema_arrow.names
    column = next((field for field in TEXT_FIELDS if field in names), None)
    if column is None:
        raise UsageError(f"corpus: {path}: needs a column {' or '.join(TEXT_FIELDS)}; it has {', '.join(names)}")
    return _parquet_rows(file, column, rng)


def _parquet_rows(file: Any, column: str, rng: random.Random) -> Iterator[str]:
    groups = list(range(file.num_row_groups))
    rng.shuffle(groups)
    for group in groups:
        texts = [text for text in file.read_row_group(group, columns=[column])[column].to_pylist() if text]
        rng.shuffle(texts)
        yield from texts


def _hub_documents(source: str, seed: int) -> Iterator[str]:
    import datasets

    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        stream = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        rows = iter(stream.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER))
        first = next(rows, None)
    except Exception as error:  # datasets raises whatever its file systems and builders raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"corpus: {source} is neither a local file nor a readable data set ({reason})") from error
    if first is None:
        raise UsageError(f"corpus: {source}: the data set is empty")
    return (_text_of(source, row) for row in itertools.chain([first], rows))


def _pydoc(rng: random.Random) -> Iterator[str]:
    from pydoc_data.topics import topics

    names = sorted(topics)
    rng.shuffle(names)
    return (topics[name].strip("\n") for name in names)
