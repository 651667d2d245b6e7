"""XML is streamed: memory does not grow with the file, and what could blow it up is refused."""

import io
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from conftest import ROOT

from rlhf.data.readers import xml_dumps as xml
from rlhf.errors import UserError

MEBIBYTE = 1 << 20


def refusal(text):
    with pytest.raises(UserError) as caught:
        list(xml.rows(io.BytesIO(text.encode()), "a.xml"))
    return str(caught.value)


@pytest.mark.slow
def test_the_memory_of_reading_posts_does_not_depend_on_their_number():
    command = [sys.executable, ROOT / "benchmarks" / "flat_memory.py", "--megabytes", "4", "12"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    small, large = map(json.loads, lines)
    assert 2.5 * small["file_mib"] < large["file_mib"]
    assert 2.5 * small["comparisons"] < large["comparisons"]
    assert large["peak_rss_mib"] - small["peak_rss_mib"] < 3  # 8 MiB more to read


class Export(io.RawIOBase):
    """A MediaWiki export with one page of many revisions, made while it is read."""

    def __init__(self, revisions):
        self.pieces = self.make(revisions)
        self.left = b""

    def make(self, revisions):
        yield b"<mediawiki><page><title>T</title><ns>0</ns>"
        for number in range(revisions):
            # every fourth revision blanks what the third wrote, and is undone
            text = f"revision {number - number % 4} " * 500 if number % 4 != 2 else "vandal"
            yield f"<revision><id>{number}</id><text>{text}</text></revision>".encode()
        yield b"</page></mediawiki>"

    def read(self, size=-1):
        while len(self.left) < size and (piece := next(self.pieces, b"")):
            self.left += piece
        result, self.left = self.left[:size], self.left[size:]
        return result


def peak_of_export(revisions):
    tracemalloc.start()
    number = sum(1 for _ in xml.rows(Export(revisions), "a.xml"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert number == revisions // 4
    return peak


def test_the_memory_of_reading_histories_does_not_depend_on_their_length():
    small, large = peak_of_export(200), peak_of_export(2000)  # 1 and 12 MB of text
    assert large < small + MEBIBYTE / 2


@pytest.mark.parametrize(
    "declaration",
    [
        '<!DOCTYPE posts [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;&a;">]>',
        '<!DOCTYPE posts [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
        '<!DOCTYPE posts SYSTEM "http://nowhere.invalid/posts.dtd">',
    ],
)
@pytest.mark.parametrize("root", ["posts", "mediawiki"])
def test_document_types_and_entities_are_refused(declaration, root):
    message = refusal(f"<?xml version='1.0'?>\n{declaration.replace('posts', root)}\n<{root}>&b;&x;</{root}>")
    assert message.startswith("a.xml:2: declares a document type or entities")


def test_elements_without_end_are_refused():
    assert refusal("<posts>\n" + "<row>" * 100_000).startswith("a.xml:2: elements nested too deep")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are listed on Linux only")
def test_the_posts_wait_in_a_file_that_is_gone_with_the_process():
    rows = "".join(f'<row Id="{n}" PostTypeId="1" Body="{"x" * 9000}"/>' for n in range(1000))
    iterator = xml.rows(io.BytesIO(f"<posts>{rows}</posts>".encode()), "a.xml")
    next(iterator)
    found = [Path(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    nameless = [file for file in found if os.readlink(file).endswith("(deleted)")]
    assert max(file.stat().st_size for file in nameless) > 8_000_000


def test_a_full_temporary_folder_is_named(monkeypatch):
    monkeypatch.setattr(xml, "_TABLES", xml._TABLES + "PRAGMA max_page_count = 20;")
    rows = "".join(f'<row Id="{n}" PostTypeId="1" Body="{"x" * 9000}"/>' for n in range(100))
    message = refusal(f"<posts>{rows}</posts>")
    assert message.startswith("a.xml: its posts do not fit the temporary folder")
    assert message.endswith(
        "(database or disk is full): set TMPDIR to a folder with as much free room as the file has"
    )
