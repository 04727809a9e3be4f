"""Packed text: what is read, in which order, and how little."""

import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from dtr_deploy.errors import UsageError
from dtr_deploy.tasks.corpus import SEPARATOR, load_corpus
from dtr_deploy.tasks.recall_text import recall_documents
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()  # one token a byte of plain text


def lines(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [f"line {seed}-{i:05d} " + "x" * rng.randint(0, 60) for i in range(count)]


def write_text(path: Path, texts: list[str]) -> str:
    path.write_text("\n".join(texts) + "\n")
    return str(path)


def text_of(ids: torch.Tensor) -> str:
    return TOKENIZER.decode(ids.reshape(-1).tolist())


def load(sources: list[str], tokens: int = 4096, length: int = 64, **options: Any) -> Any:
    return load_corpus(sources, TOKENIZER, tokens=tokens, sequence_length=length, **options)


def test_shapes_and_determinism(tmp_path: Path) -> None:
    source = write_text(tmp_path / "a.txt", lines(500))
    one, again, other = load([source], held_out=3), load([source], held_out=3), load([source], held_out=3, seed=1)
    assert one.train.shape == (64, 64) and one.held_out.shape == (3, 64) and one.train.dtype == torch.int64
    assert torch.equal(one.train, again.train) and torch.equal(one.held_out, again.held_out)
    assert not torch.equal(one.train, other.train)
    assert load([source], tokens=65).train.shape == (2, 64)


def test_every_line_is_read_once_and_whole(tmp_path: Path) -> None:
    texts = lines(300)
    source = write_text(tmp_path / "a.txt", texts)
    # All tokens there are, but the last incomplete sequence: ask for ever less until it fits.
    size = len(Path(source).read_bytes())
    corpus = load([source], tokens=size // 64 * 64, length=64)
    # Undo the shuffle of sequences: each document is unique, so the set of complete lines in the packed text counts.
    found = Counter(line for row in corpus.train for line in text_of(row).split("\n")[1:-1] if line)
    assert found and max(found.values()) == 1 and set(found) <= set(texts)


def test_packed_text_is_the_blocks_joined(tmp_path: Path) -> None:
    texts = lines(200)
    source = write_text(tmp_path / "a.txt", texts)
    held = load([source], tokens=64, held_out=60).held_out  # not shuffled
    blocks = text_of(held).split(SEPARATOR)
    whole = "\n".join(texts)
    # Blocks of whole lines, each somewhere in the file, none overlapping.
    assert len(blocks) > 5
    assert all(block in whole for block in blocks[:-1]) and blocks[-1] in whole
    seen = [line for block in blocks for line in block.split("\n")]
    assert len(seen) == len(set(seen))
    assert all(line in texts for line in seen[:-1])


def test_held_out_text_is_in_no_training_sequence_and_does_not_move(tmp_path: Path) -> None:
    source = write_text(tmp_path / "a.txt", lines(2000))
    small, large = load([source], tokens=1024, held_out=8), load([source], tokens=16_384, held_out=8)
    assert torch.equal(small.held_out, large.held_out)
    train, held = set(text_of(large.train).split("\n")), text_of(large.held_out).split("\n")
    assert len(held) > 5 and not {line for line in held[1:-1] if line} & train


def test_sources_share_the_tokens_until_one_ends(tmp_path: Path) -> None:
    big, small = write_text(tmp_path / "big.txt", lines(3000)), write_text(tmp_path / "small.txt", lines(40, 1))
    even = load([big, write_text(tmp_path / "other.txt", lines(3000, 2))], tokens=8192).tokens_by_source
    assert max(even.values()) - min(even.values()) < 1500  # a document is about 500 tokens
    ended = load([big, small], tokens=16_384).tokens_by_source
    assert ended[small] < 4000 and ended[big] + ended[small] >= 16_384


def test_no_more_is_tokenised_than_needed(tmp_path: Path) -> None:
    source = write_text(tmp_path / "a.txt", lines(20_000))
    corpus = load([source], tokens=2048, length=64)
    # At most the rest of one document, which is a block of 512 bytes and the end of its last line.
    assert sum(corpus.tokens_by_source.values()) < 2048 + 512 + 100


def test_a_huge_document_is_cut_up(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "word " * 100_000}) + "\n")
    corpus = load([str(path)], tokens=2048)
    assert sum(corpus.tokens_by_source.values()) < 2048 + 8 * 512
    words = {word for row in corpus.train for word in text_of(row).split()}
    assert words <= {"word", "wor", "wo", "w", "ord", "rd", "d"}  # nothing lost or doubled at the cuts


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_of_tables_are_documents(tmp_path: Path, kind: str) -> None:
    texts, path = lines(120), tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"id": i, "content": text}) + "\n" for i, text in enumerate(texts)))
    else:
        table = pyarrow.table({"id": range(120), "content": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=16)
    documents = text_of(load([str(path)], tokens=64, held_out=40).held_out).split(SEPARATOR)
    assert len(documents) > 30 and set(documents[:-1]) <= set(texts)
    assert documents[:-1] != texts[: len(documents) - 1]


def test_a_folder_is_its_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_text(tmp_path / "a.txt", lines(20, 1))
    write_text(tmp_path / "in" / "b.md", lines(20, 2))
    (tmp_path / "c.bin").write_bytes(b"\0" * 100)
    text = text_of(load([str(tmp_path)], tokens=1280).train)
    assert "line 1-" in text and "line 2-" in text and "\0" not in text


def test_the_python_manual_is_a_source() -> None:
    corpus = load(["pydoc"], tokens=20_000, length=256)
    assert "Python" in text_of(corpus.train) and corpus.tokens_by_source["pydoc"] >= 20_000


def test_lines_longer_than_a_block_are_read_once(tmp_path: Path) -> None:
    texts = ["s" * 10, "m" * 700, "l" * 3000, "s" * 9, "x" * 513, "e"]
    path = tmp_path / "a.txt"
    for ending in ("\n", ""):
        path.write_text("\n".join(texts) + ending)
        total = sum(map(len, texts))
        counts = Counter(text_of(load([str(path)], tokens=total // 64 * 64).train))
        lengths = {"s": 19, "m": 700, "l": 3000, "x": 513, "e": 1}
        assert all(counts[letter] <= length for letter, length in lengths.items())
        # Missing: the last incomplete sequence, and the room that at most six separators and line ends take.
        assert sum(counts[letter] for letter in lengths) >= total - 63 - 6 * len(SEPARATOR)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "too short", r"a\.txt hold \d+ tokens, \d+ too few"),
        ("a.jsonl", "{]\n", r"a\.jsonl: a line is not JSON"),
        ("a.jsonl", '{"title": "x"}\n', r"needs one of the text fields text, .*; it has title"),
        ("a.parquet", "no table", r"a\.parquet: not a parquet file"),
        ("a.csv", "x", r"a file must end in \.txt, \.md, \.jsonl, \.parquet"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        load([str(tmp_path / name)])


def test_missing_sources_are_named(tmp_path: Path) -> None:
    for source in (str(tmp_path / "nowhere"), "nowhere.txt", "./nowhere", "a/b/c"):
        with pytest.raises(UsageError, match="no file or folder"):
            load([source])
    with pytest.raises(UsageError, match="holds no file ending in"):
        load([str(tmp_path)])
    with pytest.raises(UsageError, match="name at least one"):
        load([])


def test_a_hub_data_set_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []
    read = 0

    def rows() -> Any:
        nonlocal read
        for text in lines(10_000):
            read += 1
            yield {"text": text}

    def fake(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        asked.append((name, config, split, streaming))
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    corpus = load(["owner/name:small:validation"], tokens=2048)
    assert asked == [("owner/name", "small", "validation", True)]
    assert "line 0-" in text_of(corpus.train)
    assert read < 1200  # the shuffle buffer of 1,000 and the documents used


def test_an_unreachable_data_set_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*args: Any, **options: Any) -> Any:
        raise ConnectionError("no route\nmany lines")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UsageError, match=r"^corpus: owner/name is neither .* \(no route\)$"):
        load(["owner/name"])


def test_recall_text_answers_every_question_from_its_facts() -> None:
    """Each repeated line must follow from one fact of its document alone, and the facts differ between documents."""
    documents = list(itertools.islice(recall_documents(random.Random(0)), 200))
    assert len(set(documents)) == 200
    for document in documents:
        told, asked = document.split("\n\nAsked again:\n")
        for line in asked.split("\n"):
            question, value = line[:-1].rsplit(" ", 1)
            assert told.count(f"{question} ") == 1
            assert re.search(rf"{re.escape(question)} {value}(\.|$|\s)", told), line


def test_recall_is_a_source_that_does_not_run_dry(tmp_path: Path) -> None:
    source = write_text(tmp_path / "a.txt", lines(100))
    corpus = load([source, "recall"], tokens=40_000, length=256)
    assert corpus.tokens_by_source["recall"] > 30_000
    assert torch.equal(load(["recall"], tokens=4096).train, load(["recall"], tokens=4096).train)
    assert not torch.equal(load(["recall"], tokens=4096).train, load(["recall"], tokens=4096, seed=1).train)
