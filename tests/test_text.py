"""Text sources and token windows: which text is read, how it is split, and what the errors say."""

import gzip
import json
import logging
import lzma
import random
import re
import shutil
import time
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from eacmoe_lightning.text.documents import documents, read_documents
from eacmoe_lightning.text.sources import bundled_names, heldout_names, name_sources, stored_source
from eacmoe_lightning.text.windows import read_windows, token_windows


class Letters:
    """A tokenizer whose tokens can be counted by hand: one per character, `.` ends a text."""

    def __init__(self, eos_token_id: int | None = ord(".")):
        self.eos_token_id = eos_token_id
        self.num_characters = 0  # tokenized so far

    def __call__(self, text: str, **kwargs) -> dict[str, list[int]]:
        assert kwargs["add_special_tokens"] is False
        self.num_characters += len(text)
        return {"input_ids": [ord(letter) for letter in text]}


def letters(windows: torch.Tensor) -> list[str]:
    return ["".join(map(chr, window)) for window in windows.tolist()]


def write_split(folder: Path, split: str, rows: list[str], column: str = "text") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({column: rows})
    pyarrow.parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")


# --- windows


def test_windows_are_cut_from_joined_documents():
    windows = token_windows(["abcd", "ef", "ghij"], Letters(), None, 3)
    assert letters(windows) == ["abc", "d.e", "f.g", "hij"]
    assert windows.dtype == torch.int64


def test_without_an_end_token_documents_touch_and_leftover_tokens_are_dropped():
    assert letters(token_windows(["abcd", "efgh"], Letters(None), None, 3)) == ["abc", "def"]


def test_without_a_seed_the_first_windows_are_taken_and_no_more_is_tokenized():
    tokenizer = Letters()
    assert letters(token_windows(["abcdef"] * 1000, tokenizer, 2, 3)) == ["abc", "def"]
    assert tokenizer.num_characters == 6


@given(st.integers(1, 40), st.integers(0, 2**31), st.integers(1, 5))
def test_random_windows_are_distinct_windows_of_the_text(num_windows, seed, length):
    text = "".join(chr(200 + i) for i in range(40 * length))
    all_windows = letters(token_windows([text], Letters(), None, length))
    chosen = letters(token_windows([text], Letters(), num_windows, length, seed))
    assert len(set(chosen)) == num_windows and set(chosen) <= set(all_windows)


def test_random_windows_repeat_and_leave_the_global_generator_alone():
    text = "".join(map(chr, range(200, 1200)))
    state = torch.get_rng_state()
    first, repeated, other = (token_windows([text], Letters(), 8, 10, seed) for seed in (1, 1, 2))
    assert torch.equal(first, repeated) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_random_windows_of_a_huge_text_tokenize_a_bounded_part():
    tokenizer = Letters()
    token_windows(["x" * 100] * 100_000, tokenizer, 2, 50, seed=0)
    assert tokenizer.num_characters <= 16 * 2 * 50  # 16 times the requested windows


def test_a_long_document_comes_in_pieces_without_losing_a_character():
    text = "abcdefghij" * 300_000  # three million characters, and a piece is one million
    windows = token_windows([text], Letters(), 25_000, 100)
    assert "".join(letters(windows)) == text[:2_500_000]


def test_real_tokenizer_windows_decode_to_the_text(tokenizer):
    text = read_documents("bundled:french")[0]
    windows = token_windows([text], tokenizer, 4, 128)
    assert windows.shape == (4, 128)
    assert text.startswith(tokenizer.decode(windows.flatten()[:-1]))  # the last token may be half a character


@pytest.mark.parametrize(
    "num_windows, length, message",
    [
        (None, 512, "the text holds 311 tokens, but one window needs 512 (--data.window_length)"),
        (4, 100, "the text holds 311 tokens, which make 3 windows of 100"),
        (0, 100, "--data.num_windows=0 must be at least 1"),
        (4, 0, "--data.window_length=0 must be at least 1"),
    ],
)
def test_too_short_a_text_names_both_numbers(num_windows, length, message):
    with pytest.raises(ValueError) as error:
        token_windows(["x" * 311], Letters(), num_windows, length)
    assert message in str(error.value)


# --- sources


@pytest.mark.parametrize("name", bundled_names())
def test_bundled_texts_can_be_read(name):
    assert sum(map(len, read_documents(f"bundled:{name}"))) > 10_000


def test_bundled_held_out_texts_cover_the_domains():
    assert {"prose", "code", "maths", "french", "german"} <= set(heldout_names())


def test_an_unknown_bundled_name_is_answered_with_the_known_ones():
    with pytest.raises(FileNotFoundError, match="no bundled text 'latin'.*bundled:calibration, .*"):
        read_documents("bundled:latin")


def test_files_and_directories(tmp_path):
    (tmp_path / "b.txt").write_text("second é", encoding="utf-8")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "first.md").write_text("first")
    rows = [{"text": "third\u2028line", "id": 1}, {"text": "fourth"}]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    (tmp_path / "d.json").write_text(json.dumps([{"text": "fifth"}]))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["sixth"]}), tmp_path / "e.parquet")
    (tmp_path / "ignored.bin").write_bytes(b"\xff\xfe")
    expected = ["first", "second é", "third\u2028line", "fourth", "fifth", "sixth"]
    assert read_documents(str(tmp_path)) == expected
    assert read_documents(str(tmp_path / "b.txt")) == ["second é"]


def test_patterns_are_files_sorted_by_path(tmp_path, monkeypatch):
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    for name, text in {"b.txt": "b", "a.txt": "a", "deep/c.txt": "c", ".hidden.txt": "h", "notes.md": "n"}.items():
        (tmp_path / "texts" / name).write_text(text)
    (tmp_path / "texts" / "rows-1.jsonl.gz").write_bytes(gzip.compress(b'{"body": "one"}\n{"body": "two"}\n'))
    (tmp_path / "texts" / "d[1].txt").write_text("a literal name")
    monkeypatch.chdir(tmp_path)
    for start in ("", "./", f"{tmp_path}/"):
        assert read_documents(f"{start}texts/[ab].txt") == ["a", "b"]
    assert read_documents("texts/?.txt") == ["a", "b"]
    assert read_documents("texts/**/*.txt") == ["a", "b", "a literal name", "c"]
    assert read_documents("texts/d[1].txt") == ["a literal name"]
    assert read_documents("texts/rows-*.jsonl.gz#body") == read_documents("texts/rows-*", "body") == ["one", "two"]
    assert "".join(read_documents("texts/?.txt[:50%]") + read_documents("texts/?.txt[50%:]")) == "ab"
    assert list(name_sources(["texts/*.txt", "*.md", "texts/a.txt"])) == ["texts", "pattern", "a"]
    assert stored_source("texts/*.txt[:50%]") == f"{tmp_path}/texts/*.txt[:50%]"
    assert stored_source("texts/*.jsonl#body") == f"{tmp_path}/texts/*.jsonl#body"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("*.txt", "*.txt matches no file; pass a local file"),
        ("/no/such/**", "/no/such/** matches no file"),
        ("*", "* matches only directories, such as texts: */* are the files in them"),
    ],
)
def test_a_pattern_that_nothing_matches(source, message, tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        read_documents(source)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "name, content, kind, message",
    [
        ("x.txt", b"caf\xe9", ValueError, "not UTF-8 text (byte 3 is 0xe9)"),
        (
            "x.txt",
            "Wal é".encode("utf-16"),
            ValueError,
            "0xff); it is UTF-16: convert it with iconv -f utf-16 -t utf-8",
        ),
        (
            "x.jsonl",
            '{"text": "é"}'.encode("utf-16"),
            ValueError,
            "0xff); it is UTF-16: convert it with iconv -f utf-16",
        ),
        (
            "x.txt",
            gzip.compress(b"text", mtime=0),
            ValueError,
            "0x8b); it is compressed by gzip: let its name end with .gz",
        ),
        ("x.txt", b"%PDF-1.4\xff", ValueError, "0xff); it is a PDF: save it as text"),
        ("x.txt", b"%PDF-1.4 all of it is ASCII", ValueError, "x.txt is no text: it is a PDF: save it as text"),
        ("x.txt", b"PK\x03\x04 so is this", ValueError, "x.txt is no text: it is a zip archive or an office document"),
        ("x", b"ARROW1\0\0", ValueError, "x is no text: it is an Arrow file"),
        ("x.arrow", b"words", ValueError, "not read (.arrow): pass its folder if `save_to_disk` wrote it"),
        ("x.docx", b"words", ValueError, "not read (.docx): it is an office document: save it as text"),
        ("x.pdf", b"words", ValueError, "not read (.pdf): save it as text"),
        ("x.sqlite", b"words", ValueError, "not read (.sqlite): it is a database"),
        ("x.txt", b" \n", ValueError, "is empty"),
        (
            "x.txt",
            "plain words".encode("utf-16-le"),
            ValueError,
            "x.txt is no text: it holds 11 NUL characters, as UTF-16",
        ),
        ("x.jsonl", b'{"text": "a"}\n{"body": "b"}', ValueError, "line 2: a row needs a string in"),
        ("x.jsonl", b"not json", ValueError, "line 1: not JSON"),
        ("x.json", b'{"text": 3}', ValueError, "a row needs a string in field `text`"),
        ("x.bin", b"abc", FileNotFoundError, "no text files below it (.txt"),
    ],
)
def test_bad_files(tmp_path, name, content, kind, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(kind) as error:
        read_documents(str(tmp_path if name.endswith(".bin") else tmp_path / name))
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["PK is short for private key", "%PDF is how they begin", "PAR1 and GGUF too"])
def test_texts_about_such_files_are_read(tmp_path, text):
    (tmp_path / "x.txt").write_text(text)
    assert read_documents(str(tmp_path / "x.txt")) == [text]


@pytest.mark.parametrize("source", ["/no/such/file", "notes.txt", "./here", "~/no/such", "/no/a:b"])
def test_missing_path(source):
    with pytest.raises(FileNotFoundError, match="does not exist; pass a local file or directory"):
        read_documents(source)


MARK = b"\xef\xbb\xbf"  # UTF-8's byte order mark
KINDS = {  # a file's name -> its content; every one holds the documents `one` and `two é`
    "x.jsonl": b'{"text": "one"}\n\n{"text": "two \xc3\xa9", "id": 2}\n',
    "x.ndjson": b'{"text": "one"}\r\n{"text": "two \\u00e9"}',
    "lines.json": b'{"text": "one"}\n{"text": "two \xc3\xa9"}\n',
    "list.json": b'[{"text": "one"},\n {"text": "two \xc3\xa9"}]',
    "list.jsonl": b'[\n  {"text": "one"},\n  {"text": "two \xc3\xa9"}\n]\n',
    "x.csv": b'id,text\n1,one\n2,"two \xc3\xa9"\n',
    "x.tsv": b"text\tid\none\t1\ntwo \xc3\xa9\t2\n",
    "X.CSV": b"text\none\ntwo \xc3\xa9",
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("mark", [b"", MARK])
@pytest.mark.parametrize("name", KINDS)
def test_files_of_rows_with_and_without_a_byte_order_mark_and_compressed(tmp_path, name, mark, compressed):
    content = mark + KINDS[name]
    path = tmp_path / (name + ".gz" * compressed)
    path.write_bytes(gzip.compress(content) if compressed else content)
    assert read_documents(str(path)) == read_documents(str(tmp_path)) == ["one", "two é"]


@pytest.mark.parametrize("name", ["x.txt", "x.md", "x.txt.gz", "x.log"])
def test_a_byte_order_mark_is_not_text(tmp_path, name):
    content = MARK + "one é\r\ntwo".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read_documents(str(tmp_path / name)) == ["one é\ntwo"]


def test_files_joined_with_their_byte_order_marks(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(MARK + b'{"text": "one"}\n' + MARK + b'{"text": "two"}\n')
    assert read_documents(str(tmp_path / "x.jsonl")) == ["one", "two"]


def test_csv_cells_with_line_ends_quotes_and_the_length_of_a_book(tmp_path):
    book = "word " * 100_000
    (tmp_path / "x.csv").write_text(f'text,note\n"a\nb ""c"", d",x\n{book},y\n')
    assert read_documents(str(tmp_path / "x.csv")) == ['a\nb "c", d', book]


@pytest.mark.parametrize(
    "name, content",
    [
        ("x.jsonl", b'{"text": "one"}\n{"text": null}\nnull\n{"text": "two"}\n'),
        ("x.json", b'[{"text": "one"}, null, {"text": null}, {"text": "two"}]'),
        ("x.csv", b"id,text\n1,one\n2,\n3\n4,two\n"),
        ("x.tsv", b"id\ttext\n1\tone\n2\tNA\n3\tnull\n4\ttwo\n"),
        ("x.parquet", pyarrow.table({"text": ["one", None, None, "two"], "id": [1, 2, 3, 4]})),
    ],
)
def test_null_rows_are_skipped_and_counted(tmp_path, caplog, name, content):
    path = tmp_path / name
    pyarrow.parquet.write_table(content, path) if name == "x.parquet" else path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "eacmoe_lightning"):
        assert read_documents(str(path)) == ["one", "two"]
    assert f"{path}: 2 of 4 rows are null or hold no turns, and were skipped" in caplog.text


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.jsonl", b'{"text": "a"}\n\xff\n', "line 2: not UTF-8 text (byte 0 of the line is 0xff)"),
        ("x.json", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("x.json", b'[{"text": "a"},\n {"text": }]', "line 2: not JSON"),
        ("x.jsonl", b'{"text": "a"}\n[1, 2]', "line 2: a row needs a string in field `text`, but has int"),
        ("x.csv", b"title;text\na;b\n", "a row needs a string in field `text`, but has ['title;text']"),
        ("x.csv", b"a" * 99 + b"\nb\n", f"in field `text`, but has ['{'a' * 60}...']"),  # no header, but a document
        ("x.csv", b"text,id\na,1\nb,2,3\n", "line 3: 3 cells, but the header has 2"),
        ("x.csv", b'text\n"a\nb', "not CSV"),
        ("x.csv", b"text\n\n", "is empty"),
        ("x.csv", b"text,id,text\na,1,b\n", "has 2 columns called `text`: rename all but one"),
        ("x.jsonl.zst", b"(\xb5/\xfd", "an archive of a kind that is not read (.zst): unpack it"),
        ("x.tar.gz", gzip.compress(b"text", mtime=0), "an archive of a kind that is not read (.tar)"),
        ("x.txt.gz", b"plain text", "x.txt.gz is not a whole gzip file"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}' * 1000, mtime=0)[:40], "x.jsonl.gz is not a whole gzip file"),
        ("x.parquet", b"PAR0", "x.parquet is not a parquet file"),
        ("x.jsonl", b'{"body": "a"}', "name the column with --data.column NAME"),
        ("x.jsonl", b"[" * 100_000, "line 1: this JSON holds no text"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "b", "id": ' + b"1" * 5000 + b"}", "line 2: this JSON holds no text"),
        (
            "x.json",
            b'{"text": ["a", "b"]}',
            "turn 1 of `text` is str, not a dict with `role` and `content`: give each",
        ),
    ],
)
def test_bad_rows(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_documents(str(tmp_path / name))
    assert message in str(error.value) and name in str(error.value)


def test_strings_of_json_are_texts(tmp_path):
    (tmp_path / "x.json").write_text('["one",\n "two"]')
    (tmp_path / "y.jsonl").write_text('"one"\n"two"\n')
    assert read_documents(str(tmp_path / "x.json")) == read_documents(str(tmp_path / "y.jsonl")) == ["one", "two"]


def test_a_table_of_names_alone_says_so(tmp_path, caplog):
    (tmp_path / "x.csv").write_text("It was the best of times\n")
    with pytest.raises(ValueError):
        read_documents(str(tmp_path / "x.csv") + "#It was the best of times")
    assert "x.csv has no rows: its first line names the columns" in caplog.text


def test_a_parquet_file_with_a_damaged_page_is_named(tmp_path):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"row {number} of many" * 9 for number in range(300)]}), path)
    content = bytearray(path.read_bytes())
    content[100:900] = bytes(800)  # the footer, which says what the file holds, stays whole
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.parquet is damaged after row 0 \(.*download it again"):
        read_documents(str(path))


@pytest.mark.parametrize("name", ["x.txt", "x.md", "x.jsonl", "x.json", "x.csv", "x.parquet", "x.txt.gz"])
def test_what_git_lfs_has_not_fetched_is_named(tmp_path, name):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 480000\n"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_bytes(pointer)
    sources = [tmp_path / "a" / name, tmp_path] + [f"{tmp_path}/a:train"] * (not name.endswith((".txt.gz", ".md")))
    for source in sources:
        with pytest.raises(FileNotFoundError, match=f"/a/{name} is a pointer of Git LFS.*run `git lfs pull`"):
            read_documents(str(source))


def test_half_a_surrogate_pair_is_replaced(tmp_path, tokenizer):
    (tmp_path / "x.jsonl").write_text('{"text": "a\\ud83d b \\ud83d\\ude00"}')
    assert read_documents(str(tmp_path / "x.jsonl")) == ["a\ufffd b \U0001f600"]
    assert len(token_windows(documents(str(tmp_path / "x.jsonl")), tokenizer, None, 2)) > 1


def test_columns_by_name(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a", "body": "one"}\n{"text": "b", "body": "two"}\n')
    source = str(tmp_path / "x.jsonl")
    assert read_documents(source) == ["a", "b"]
    assert read_documents(source, "body") == read_documents(f"{source}#body") == ["one", "two"]
    assert read_documents(f"{source}#body", "text") == ["one", "two"]  # the source's own word is the nearer one
    assert read_documents(f"{source}#body[:50%]") == ["one"]
    (pair, _) = read_documents(f"{source}#text,body")
    assert pair.messages == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "one"}]
    with pytest.raises(ValueError, match=r"line 1: a row needs a string in field `title`, but has \['body', 'text'\]"):
        read_documents(f"{source}#title")
    (tmp_path / "a#b.txt").write_text("a file of that name")
    assert read_documents(str(tmp_path / "a#b.txt")) == ["a file of that name"]


def test_files_are_read_only_as_far_as_documents_are_taken(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "one"}\n' * 2000 + "not JSON")
    read = documents(str(tmp_path / "x.jsonl"))
    assert [next(read) for _ in range(1500)] == ["one"] * 1500
    with pytest.raises(ValueError, match="line 2001: not JSON"):
        list(read)


# --- data sets


def test_hub_layout_on_disk(tmp_path):
    root = tmp_path / "owner-set"
    write_split(root / "plain", "train", ["one", "two"])
    write_split(root / "plain", "test", ["three"])
    write_split(root / "lines", "train", ["", " = Title = \n", "", " A line . \n", " Another . \n"])
    configs = [
        {"config_name": name, "data_files": [{"split": s, "path": f"{name}/{s}-*"} for s in splits]}
        for name, splits in (("plain", ["train", "test"]), ("lines", ["train"]))
    ]
    (root / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")

    # first as a plain directory, then as a config that the README declares
    assert read_documents(f"{root}/plain:train") == ["one", "two"]
    assert read_documents(f"{root}/plain:train[:1]") == ["one"]
    assert read_documents(f"{root}/plain:test") == ["three"]
    (root / "plain").rename(root / "renamed")
    (root / "README.md").write_text(f"---\nconfigs: {json.dumps(configs).replace('plain/', 'renamed/')}\n---\n")
    assert read_documents(f"{root}/plain:test") == ["three"]
    # one line per row and blank rows between paragraphs: one document, joined as GPTQ joins wikitext
    joined = "\n\n = Title = \n\n\n\n\n A line . \n\n\n Another . \n"
    assert read_documents(f"{root}/lines:train") == [joined]

    with pytest.raises(ValueError, match="validation"):
        read_documents(f"{root}/plain:validation")
    with pytest.raises(FileNotFoundError, match="/no/such of /no/such:train does not exist"):
        read_documents("/no/such:train")


def test_data_set_without_the_text_column(tmp_path):
    write_split(tmp_path / "set", "train", ["one"], column="body")
    with pytest.raises(ValueError, match="no column `text`, only body"):
        read_documents(f"{tmp_path}/set:train")


CARDS = ["---\nconfigs:\n- config_name: default\n---\n# A data set\n", "---\nlicense: mit\n---\n", "# A data set\n"]


@pytest.mark.parametrize("card", CARDS)
def test_the_card_of_a_data_set_is_not_text(tmp_path, card):
    (tmp_path / "README.md").write_text(card)
    write_split(tmp_path / "data", "train", ["one", "two"])
    assert read_documents(str(tmp_path)) == read_documents(f"{tmp_path}:train") == ["one", "two"]


@pytest.mark.parametrize("card", CARDS[1:])
def test_the_card_beside_texts_is_not_text(tmp_path, card, caplog):
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    assert read_documents(str(tmp_path)) == ["one\n\ntwo"]
    assert f"{tmp_path}/README.md describes the files beside it and is not read as text" in caplog.text


def test_a_data_set_with_several_splits_says_how_to_name_them(tmp_path):
    (tmp_path / "README.md").write_text(CARDS[1])
    write_split(tmp_path / "data", "train", ["one"])
    write_split(tmp_path / "data", "test", ["two"])
    with pytest.raises(ValueError, match=f"it has the splits train, test: pass {tmp_path}:train"):
        read_documents(str(tmp_path))
    assert read_documents(f"{tmp_path}:test") == ["two"]
    configs = [{"config_name": n, "data_files": f"{n}/*"} for n in ("plain", "other")]
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    for name in ("plain", "other"):
        write_split(tmp_path / name, "train", [name])
    with pytest.raises(ValueError, match=f"it has the configs plain, other: pass {tmp_path}/plain:SPLIT"):
        read_documents(str(tmp_path))
    (tmp_path / "plain").rename(tmp_path / "elsewhere")  # a config is not a folder
    (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text().replace("plain/", "elsewhere/"))
    assert read_documents(f"{tmp_path}/plain:train") == ["plain"]


def test_a_readme_among_texts_is_text_and_hidden_files_are_not(tmp_path):
    (tmp_path / "README.md").write_text("---\ntitle: mine\n---\nnotes")
    assert read_documents(str(tmp_path)) == ["---\ntitle: mine\n---\nnotes"]
    (tmp_path / "a.md").write_text("one")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "b.txt").write_text("two")
    (tmp_path / ".c.txt").write_text("three")
    assert read_documents(str(tmp_path)) == ["---\ntitle: mine\n---\nnotes", "one"]


def test_folders_of_save_to_disk(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["one", "two", None, "three"], "body": list("abcd")})
    rows.save_to_disk(tmp_path / "alone")
    assert read_documents(str(tmp_path / "alone")) == ["one", "two", "three"]
    assert read_documents(str(tmp_path / "alone"), "body") == list("abcd")
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "dict")
    assert read_documents(str(tmp_path / "dict")) == ["one", "two", "three"]
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "dict")
    assert read_documents(f"{tmp_path}/dict:test") == ["two"]
    assert read_documents(f"{tmp_path}/dict:train[1:]") == ["two", "three"]
    assert read_documents(f"{tmp_path}/dict:train[:25%]") == ["one"]
    with pytest.raises(ValueError, match=f"it has the splits train, test: pass {tmp_path}/dict:train"):
        read_documents(str(tmp_path / "dict"))
    assert read_documents(f"{tmp_path}/dict:test+train[3:]") == ["two", "three"]
    with pytest.raises(ValueError, match="dict:dev .*Unknown split \"dev\". Should be one of .'train', 'test'."):
        read_documents(f"{tmp_path}/dict:dev")


def test_a_part_of_a_data_set_that_is_saved_alone(tmp_path):
    """`datasets` calls it `train[:50%]` or `train+test`, which no split that one asks for is called."""
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ("one", "two", "three", "four")))
    files = {"train": str(tmp_path / "x.jsonl"), "test": str(tmp_path / "x.jsonl")}
    for split, texts in (("train[:50%]", ["one", "two"]), ("test[3:]+train[:1]", ["four", "one"])):
        rows = datasets.load_dataset("json", data_files=files, split=split, cache_dir=tmp_path / "cache")
        rows.save_to_disk(tmp_path / split)
        name = split.partition("[")[0]
        (tmp_path / split).rename(tmp_path / "saved")
        for source in (f"{tmp_path}/saved", f"{tmp_path}/saved:{name}"):
            assert read_documents(source) == texts
        shutil.rmtree(tmp_path / "saved")


def test_data_sets_without_rows_say_so(tmp_path):
    rows, none = datasets.Dataset.from_dict({"text": ["one"]}), datasets.Dataset.from_dict({"text": []})
    none.save_to_disk(tmp_path / "alone")
    datasets.DatasetDict(train=rows, test=none).save_to_disk(tmp_path / "dict")
    assert read_documents(f"{tmp_path}/dict:train") == ["one"]
    for source in ("alone", "alone:train", "dict:test", "dict:train[:0]"):
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/{source} (") + ".*it has no rows"):
            read_documents(f"{tmp_path}/{source}")
    (tmp_path / "hub").mkdir()
    none.to_parquet(tmp_path / "hub" / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="/hub:train is empty: it holds no text"):
        read_documents(f"{tmp_path}/hub:train")


def test_a_folder_of_saved_data_sets_asks_for_one_of_them(tmp_path):
    for name in ("en", "de"):
        datasets.Dataset.from_dict({"text": [name]}).save_to_disk(tmp_path / "many" / name)
    for source in (f"{tmp_path}/many", f"{tmp_path}/many:train"):
        with pytest.raises(ValueError, match=f"{source} is a folder of data sets .*, such as {tmp_path}/many/de"):
            read_documents(source)


DAMAGED = {
    "truncated.jsonl.gz": (gzip.compress(random.Random(0).randbytes(100_000))[:50_000], "EOFError: Compressed file"),
    "no.jsonl.gz": (b"not compressed", "BadGzipFile: Not a gzipped file"),
    "no.jsonl.xz": (b"not compressed", "LZMAError: Input format not supported"),
    "empty.jsonl": (b"", "a file has no rows"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_of_a_data_set_are_blamed_on_it(tmp_path, name):
    content, message = DAMAGED[name]
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: '*.jsonl*'\n---\n")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}:train: the data set") + f".*cannot be read.*{message}"):
        read_documents(f"{tmp_path}:train")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} (data set") + f".*{message.rpartition(': ')[2]}"):
        read_documents(str(tmp_path))


@pytest.mark.parametrize(
    "card, message",
    [
        ("license: mit\nconfigs: [", "ParserError: while parsing a flow node expected .*, but found"),
        (
            "dataset_info:\n  features:\n  - name: text\n    sequence: int64\n  splits:\n  - name: train\n",
            "TypeError: Couldn't cast array of type string to",
        ),
    ],
)
@pytest.mark.parametrize("split", ["", ":train"])
def test_a_card_that_does_not_fit_the_files_is_blamed(tmp_path, card, message, split):
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
    (tmp_path / "train.jsonl").write_text('{"text": "one"}')
    with pytest.raises(ValueError) as error:
        read_documents(f"{tmp_path}{split}")
    assert re.match(re.escape(f"{tmp_path}{split}: the data set ") + ".*cannot be read .*" + message, str(error.value))
    assert "README.md" in str(error.value) and "\n" not in str(error.value)


def test_a_config_without_a_folder_is_found_from_everywhere(tmp_path, monkeypatch):
    config = {"config_name": "en", "data_files": "clean.jsonl"}
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps([config])}\n---\n")
    (tmp_path / "clean.jsonl").write_text('{"text": "one"}')
    monkeypatch.chdir(tmp_path.parent)
    for split in ("", ":train"):
        stored = stored_source(f"{tmp_path.name}/en{split}")
        assert stored == f"{tmp_path}/en{split}"
        assert read_documents(f"{tmp_path.name}/en{split}") == read_documents(stored) == ["one"]


def test_a_config_that_the_card_declares_is_not_the_folder_of_its_name(tmp_path):
    config = {"config_name": "en", "data_files": [{"split": "train", "path": "en/clean.jsonl.xz"}]}
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps([config])}\n---\n")
    (tmp_path / "en").mkdir()
    (tmp_path / "en" / "clean.jsonl.xz").write_bytes(lzma.compress(b'{"text": "one"}'))
    for source in (f"{tmp_path}/en", f"{tmp_path}/en:train", f"{tmp_path}/en:train[:1]", str(tmp_path)):
        assert read_documents(source) == ["one"]
    (tmp_path / "en" / "raw.jsonl").write_text('{"text": "two"}')
    assert read_documents(f"{tmp_path}/en") == read_documents(f"{tmp_path}/en:train") == ["one"]
    config["data_files"].append({"split": "test", "path": "en/raw.jsonl"})
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps([config])}\n---\n")
    with pytest.raises(ValueError, match=f"it has the splits train, test: pass {tmp_path}/en:train"):
        read_documents(f"{tmp_path}/en")


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_a_data_set_is_read_by_rows_without_a_copy_in_the_cache(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = [f"document {i}" for i in range(3000)]
    for part in range(3):
        name = tmp_path / "set" / f"train-0000{part}-of-00003.{kind}"
        name.parent.mkdir(exist_ok=True)
        rows = datasets.Dataset.from_dict({"text": texts[part * 1000 : part * 1000 + 1000], "id": range(1000)})
        {"parquet": rows.to_parquet, "jsonl": rows.to_json, "csv": rows.to_csv}[kind](name)
    source = f"{tmp_path}/set:train"
    assert read_documents(source) == texts
    name.write_bytes(b"\xff\xff not a file of this kind")  # the last part, which is not reached
    read = documents(source)
    assert [next(read) for _ in range(1500)] == texts[:1500]
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    with pytest.raises(ValueError, match="/set:train"):
        list(read)


@pytest.mark.parametrize(
    "source, hub_name",
    [
        ("wikitext/wikitext-2-raw-v1:train", "Salesforce/wikitext"),
        ("Salesforce/wikitext/wikitext-2-raw-v1", "Salesforce/wikitext"),
        ("someone/something:test", "someone/something"),
        ("imdb", "imdb"),
    ],
)
@pytest.mark.parametrize("offline_mode", [True, False])
def test_unreachable_data_set_is_reported_at_once(monkeypatch, source, hub_name, offline_mode):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline_mode)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # discard
    start = time.monotonic()
    with pytest.raises(FileNotFoundError, match=f"no data set '{hub_name}' in the cache; the Hugg"):
        read_documents(source)
    assert time.monotonic() - start < 10


def test_a_name_of_no_known_form_is_refused():
    with pytest.raises(ValueError, match="'a/b/c/d' is not a text source: pass a local file"):
        read_documents("a/b/c/d")


# --- parts of a source


def test_parts_are_cut_at_line_ends_and_share_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("12\n45\n78\n")
    (tmp_path / "b.txt").write_text("abcdefgh\n")  # 18 characters in total, b starts in the middle
    folder = str(tmp_path)
    assert read_documents(f"{folder}[:50%]") == ["12\n45\n78\n"]
    assert read_documents(f"{folder}[50%:]") == ["abcdefgh\n"]
    assert read_documents(f"{folder}[:25%]") == ["12\n45\n"]  # the fourth character, then to the end of its line
    assert read_documents(f"{folder}[25%:60%]") == ["78\n", "abcdefgh\n"]
    assert read_documents(f"{folder}[50%:][:50%]") == ["abcdefgh\n"]
    assert read_documents(f"{folder}[:]") == read_documents(folder)


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl.zst").write_bytes(b"packed")
    assert read_documents(str(tmp_path)) == ["text"]
    assert "b.jsonl.zst is not read, nor other files of its kind (1)" in caplog.text


def test_a_column_stands_before_or_after_a_part(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"body": f"line {i}\n" * 10}) for i in range(4)))
    half = read_documents(f"{path}#body[:50%]")
    assert "".join(half) == "".join(read_documents(str(path), "body")[:2])
    assert read_documents(f"{path}[:50%]#body") == half
    assert read_documents(f"{path}[25%:50%]#body") == read_documents(f"{path}#body[25%:50%]") == half[1:]
    with pytest.raises(ValueError, match="60% to 50% is not a part"):
        name_sources(f"{path}[60%:50%]#body")
    (tmp_path / "y.txt[:50%]#body").write_text("a file of that name")
    assert read_documents(f"{tmp_path}/y.txt[:50%]#body") == ["a file of that name"]
    datasets.DatasetDict(train=datasets.Dataset.from_dict({"body": ["one", "two"]})).save_to_disk(tmp_path / "set")
    assert read_documents(f"{tmp_path}/set:train[:50%]#body") == ["one"]


def test_a_file_has_no_splits(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "one"}')
    for split in ("train", "train[:50%]"):
        with pytest.raises(
            ValueError, match=f"{tmp_path}/x.jsonl:train.*: a file has no splits: pass {tmp_path}/x.jsonl,"
        ):
            read_documents(f"{tmp_path}/x.jsonl:{split}")


def test_a_text_of_one_line_is_cut_between_words(tmp_path):
    (tmp_path / "a.txt").write_text("one two three four")
    parts = [read_documents(f"{tmp_path / 'a.txt'}[{part}]")[0] for part in (":50%", "50%:")]
    assert parts == ["one two three ", "four"]


@given(st.integers(1, 999).map(lambda thousandths: thousandths / 10))
def test_parts_of_a_bundled_text_make_the_whole(percent):
    parts = [read_documents(f"bundled:code[{part}]")[0] for part in (f":{percent}%", f"{percent}%:")]
    assert "".join(parts) == read_documents("bundled:code")[0] and parts[0].endswith("\n")
    assert abs(len(parts[0]) / len("".join(parts)) - percent / 100) < 0.02


@pytest.mark.parametrize("part", ["[50%:50%]", "[60%:40%]", "[:101%]"])
def test_impossible_parts_are_refused(part):
    with pytest.raises(ValueError, match="is not a part of a text"):
        read_documents(f"bundled:prose{part}")


# --- the commands' own windows


def test_windows_for_a_model_have_rows_in_its_embedding(tmp_path, tiny_model_dir, caplog):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir("mixtral"), folder)
    (tmp_path / "x.txt").write_text("call <|tool|> now. " * 40)
    assert read_windows(str(tmp_path / "x.txt"), folder, 2, 16).shape == (2, 16) and not caplog.text
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|tool|>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"x.txt holds the token '<\|tool\|>' with id 4096, but .* only 4096 rows"):
        read_windows(str(tmp_path / "x.txt"), folder, 2, 16)
    read_windows("bundled:prose", folder, 1, 4097)
    assert "windows of 4097 tokens (--window_length) are longer than the 4096 positions" in caplog.text
