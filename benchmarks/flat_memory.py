"""Peak memory of reading a StackExchange dump, against the size of the dump.

    python benchmarks/flat_memory.py --megabytes 100 1000

For each size: writes a Posts.xml of that size into a temporary folder (TMPDIR), in which answers stand far
from their questions, reads it in a process of its own and prints one line of JSON: file size, comparisons,
counts, seconds of wall and processor time, peak resident memory in MiB. Needs twice the size as free room.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.sax.saxutils import quoteattr

from rlhf.errors import CommandLine, exit_on_user_error

ROOT = Path(__file__).parents[1]
MEBIBYTE = 1 << 20
ANSWERS_A_QUESTION = 3
APART = (0.5, 0.9)  # where an answer stands, its question was this far in the part of the file before it


def write_posts(path: Path, megabytes: int, seed: int = 0) -> None:
    """Write a Posts.xml of about so many MiB, with 3 answers a question on average."""
    chance = random.Random(seed)
    words = [
        "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(4000)
    ]
    lines = [" ".join(chance.choices(words, k=chance.randint(20, 80))) for _ in range(4000)]
    with path.open("w", encoding="utf-8") as file:
        file.write('<?xml version="1.0" encoding="utf-8"?>\n<posts>\n')
        number, questions, size = 0, 0, 0
        while size < megabytes * MEBIBYTE:
            number += 1
            text = "".join(f"<p>{line}</p>\n\n" for line in chance.choices(lines, k=3))
            post = f"<p>post {number}</p>\n\n{text}<pre><code>{chance.choice(lines)} &lt; 1\n</code></pre>\n"
            if number % (1 + ANSWERS_A_QUESTION) == 1:
                questions += 1
                fields = f'PostTypeId="1" Title={quoteattr(" ".join(chance.choices(words, k=8)))}'
            else:
                parent = max(1, int(questions * chance.uniform(*APART)))
                fields = f'PostTypeId="2" ParentId="{1 + (parent - 1) * (1 + ANSWERS_A_QUESTION)}"'
            body = quoteattr(post, {"\n": "&#xA;"})
            size += file.write(
                f'  <row Id="{number}" {fields} Score="{chance.randint(-3, 60)}" Body={body} />\n'
            )
        file.write("</posts>\n")


def read_posts(path: Path) -> dict[str, object]:
    """Read the dump as a stage would, and keep nothing of it."""
    from benchmarks.harness import peak_bytes
    from rlhf.data.comparisons import Counts
    from rlhf.data.readers import stream_comparisons

    counts = Counts()
    started, processor = time.monotonic(), time.process_time()
    number = sum(1 for _ in stream_comparisons([str(path)], on_bad_rows="stop", counts=counts))
    return {
        "file_mib": round(path.stat().st_size / MEBIBYTE, 1),
        "comparisons": number,
        **counts.as_dict(),
        "seconds": round(time.monotonic() - started, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
        "peak_rss_mib": round(peak_bytes() / MEBIBYTE, 1),
    }


def main() -> None:
    """Measure each size in its own process."""
    parser = CommandLine(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100], help="sizes of the dumps")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)  # what the process of its own does
    options = parser.parse_args()
    if options.read:
        print(json.dumps(read_posts(options.read)), flush=True)
        return
    for size in options.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "Posts.xml"
            write_posts(path, size)
            command = [sys.executable, __file__, "--read", str(path)]
            subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


if __name__ == "__main__":
    exit_on_user_error(main)
