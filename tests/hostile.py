"""Recipes, settings and data files that somebody could hand in to break, stall or flood a run."""

import gzip
import json
import os

from conftest import ROOT

TINY = (ROOT / "recipes" / "tiny.yaml").read_text(encoding="utf-8")
GIGABYTE = 1 << 30

# ---- recipes: name -> how to write the file (text, bytes, or a function of its path)

WRONG_VALUES = {  # key of the tiny recipe: values that it must not take
    "seed": ("-1", "1.5", "x", "[1]", "{a: 1}", "null", "true", "2020-01-01", ".nan", "9" * 30),
    "name": ("''", "../up", "a/b", "/abs", "'.'", "'..'", "[a]", "{a: b}", "null", "'a\\0b'", "x" * 300),
    "ppo.steps": ("0", "-3", "2.5", "many", "[]", "null", ".inf", "true", "1e3", "0x", "1_"),
    "ppo.learning_rate": ("-1", "x", ".inf", ".nan", "[1e-3]", "null", "true", "1e400", "1e-3x"),
    "ppo.batch_size": ("0", "-8", "16.5", "null", "'16'x", "[16]", "{}", ".nan", "7"),
    "ppo.minibatches": ("0", "3", "-1", "1000", "null", "[2]"),
    "lora.rank": ("0", "-4", "4.5", "x", "null", "[4]", ".inf", "{r: 4}"),
    "lora.layers": ("top_0", "top_-1", "top_x", "some", "7", "null", "[all]", "top_99999999999999999999x"),
    "lora.targets": ("1", "{a: b}", "[1]", "[[q]]", "null"),
    "dialogue.template": ("jinja", "1", "null", "[chat]", "{}"),
    "dialogue.max_prompt_tokens": ("0", "-1", "x", "null", "1.5", ".inf", "[96]"),
    "data.held_out": ("-0.1", "1.5", "x", "null", ".nan", "[0.2]"),
    "data.comparisons": ("null", "''", "{}", "1", "nowhere.jsonl", "[nowhere.jsonl]", "'*.nothing'", "[[]]"),
    "collect.noise": ("-1", "2", "x", ".nan", "null"),
    "reward.epochs": ("0", "-1", "x", "null", "1.5", "[1]"),
    "model.dtype": ("float64", "int8", "1", "null", "[float32]"),
    "model.quantization": ("gptq", "4", "[nf4]", "null"),
    "evaluate.judge": ("nobody", "1", "[]", "{}"),
}
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"b{i}: &b{i} {{<<: [{','.join(['*a' if i == 0 else f'*b{i - 1}'] * 9)}]}}\n" for i in range(9)
)


def pipe(path):
    os.mkfifo(path)


def zeros(path):
    path.symlink_to("/dev/zero")


def loop(path):
    path.symlink_to(path)


def dangling(path):
    path.symlink_to(path.with_name("gone"))


def sparse(size, head=b"", tail=b""):
    """A file that takes no room on the disk: the head, then zero bytes, then the tail."""

    def write(path):
        with path.open("wb") as file:
            file.write(head)
            file.truncate(size)
            file.seek(0, os.SEEK_END)
            file.write(tail)

    return write


RECIPES = {
    "empty": "",
    "blank": " \n\n",
    "only comments": "# nothing\n",
    "a list": "- name: tiny\n",
    "a word": "tiny\n",
    "a number": "7\n",
    "two documents": f"{TINY}\n---\n{TINY}",
    "a key twice": f"{TINY}\nseed: 1\n",
    "a section twice": f"{TINY}\nppo: {{steps: 1}}\n",
    "an unknown section": f"{TINY}\npqo: {{steps: 1}}\n",
    "an unknown key": TINY.replace("steps: 6", "setps: 6"),
    "a section that is a list": TINY.replace("lora: {rank: 4, alpha: 8, layers: top_2}", "lora: [4, 8]"),
    "a section that is null": f"{TINY}\nlora:\n",
    "a list as key": f"{TINY}\n[a, b]: 1\n",
    "a mapping as key": f"{TINY}\n? {{a: b}}\n: 1\n",
    "an unclosed quote": f'{TINY}\nname: "x\n',
    "an unclosed bracket": f"{TINY}\nx: [1, 2\n",
    "tabs": "name:\ttiny\n\tseed: 0\n",
    "a python object": f"{TINY}\nx: !!python/object/apply:os.system ['touch owned']\n",
    "a python name": f"{TINY}\nseed: !!python/name:os.system\n",
    "an unknown tag": f"{TINY}\nseed: !frob 1\n",
    "binary": f"{TINY}\nname: !!binary aGVsbG8=\n",
    "a set": f"{TINY}\nlora: !!set {{rank, alpha}}\n",
    "a date": TINY.replace("seed: 0", "seed: 2020-01-01"),
    "an alias without an anchor": f"{TINY}\nx: *nowhere\n",
    "an alias in its own anchor": "name: &a [*a]\n",
    "an alias bomb": LAUGHS,
    "an alias bomb as a name": f"{LAUGHS}{TINY.replace('name: tiny', 'name: *i')}",
    "an alias bomb as files": f"{LAUGHS}{TINY.replace('comparisons: sampled', 'comparisons: *i')}",
    "an alias bomb in a section": f"{TINY}\n{LAUGHS}x: *i\n",
    "a merge bomb": MERGES,
    "an integer of 5,000 digits": TINY.replace("seed: 0", f"seed: {'7' * 5000}"),
    "a float of 5,000 digits": TINY.replace("seed: 0", f"seed: 0.{'7' * 5000}"),
    "sexagesimal without end": TINY.replace("seed: 0", f"seed: {'1:' * 5000}1"),
    "nested lists": f"{TINY}\nx: {'[' * 20_000}{']' * 20_000}\n",
    "nested mappings": f"{TINY}\nx: {'{a: ' * 20_000}1{'}' * 20_000}\n",
    "nested blocks": "".join(f"{' ' * i}a:\n" for i in range(600)) + " " * 600 + "1\n",
    "an unclosed nest": "[" * 100_000,
    "100,000 keys": "".join(f"k{i}: 1\n" for i in range(100_000)),
    "a name of 900 kB": TINY.replace("name: tiny", f"name: {'n' * 900_000}"),
    "a comment of 2 MB": f"{TINY}\n# {'c' * 2_000_000}\n",
    "a comment of 1 GB": sparse(GIGABYTE, TINY.encode() + b"\n#"),
    "a line of zero bytes": sparse(4096, TINY.encode()),
    "not UTF-8": TINY.encode() + b"\nname: \xff\xfe\n",
    "UTF-16": "seed: 1\nname: x\nfrob: 1\n".encode("utf-16"),
    "a lone surrogate": f'{TINY}\nname: "\\ud800"\n',
    "control characters": f"{TINY}\nname: a\x07b\n",
    "an escape sequence": TINY.replace("steps: 6", '"\\e[31mred": 6'),
    "a right-to-left override": TINY.replace("steps: 6", "\u202esteps: 6"),
    "a pipe": pipe,
    "/dev/zero": zeros,
    "a link to itself": loop,
    "a link to nothing": dangling,
    "a folder": lambda path: path.mkdir(),
}
SETTINGS = [  # of SET
    *("x", "=", "=1", ".=1", "..=", "ppo", "ppo=", "ppo=1", "ppo=[]", "ppo.=1", ".ppo=1", "ppo..steps=1"),
    *("ppo.steps", "ppo.steps.more=1", "ppo.stpes=1", "seed.x=1", "a.b.c.d.e=1", "--help", "-x", "seed=*a"),
    *("seed=&a [*a]", "seed=!!python/name:os.system", f"seed={'7' * 5000}", f"seed={'[' * 100_000}"),
    *(f"seed={'{a: ' * 30_000}", f"{'a.' * 100_000}b=1", "seed=[", 'seed="', "seed=a: b: c", "seed=\x00"),
    *("name=a\nb", "name=\ud800", f"name={'x' * 300}", "name=CON/../x", "quick=maybe", "quick=true"),
    "=" * 999,
    *("trackers=[nothing_here]", "model.path=", "model.path=\x00", "data.prompts=[nowhere.jsonl]"),
]  # fmt: skip

# ---- comparison files: name -> (ending, content); every one is refused, whole


def lines(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


GOOD = {"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1]}
WRONG_FIELDS = {
    "prompt": (None, 1, True, [], {}, [1], [{}], [{"role": "user"}], [{"role": 1, "content": "x"}],
               [{"role": "user", "content": None}], [{"role": "user", "content": ["x"]}], "", "  ", ["x"],
               [{"role": "assistant", "content": "x"}], [[{"role": "user", "content": "x"}]]),
    "responses": (None, 1, "ab", [], ["a"], ["a", 1], ["a", None], ["a", ["b"]], {}, ["a", "a"], ["", ""],
                  [["a"], ["b"]], [{"text": "a"}, {"text": "b"}]),
    "ranks": (None, 1, "01", [], [0], [0, 1, 2], [0, 0], ["0", "1"], [0, None], [0, float("nan")],
              [0, float("inf")], [-1, 0], [0.5, 1], [[0], [1]], {}),
}  # fmt: skip
PAIRS = {
    "chosen is null": {"prompt": "p", "chosen": None, "rejected": "b"},
    "rejected is missing": {"prompt": "p", "chosen": "a"},
    "chosen equals rejected": {"prompt": "p", "chosen": "a", "rejected": "a"},
    "chosen is a number": {"prompt": "p", "chosen": 1, "rejected": 2},
    "chosen is an object": {"prompt": "p", "chosen": {"text": "a"}, "rejected": {"text": "b"}},
    "turns without content": {"chosen": [{"role": "user"}], "rejected": [{"role": "user"}]},
    "turns that share nothing": {
        "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}],
        "rejected": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "y"}],
    },
    "a transcript without an assistant": {"chosen": "\n\nHuman: x", "rejected": "\n\nHuman: y"},
    "fields that nobody knows": {"frage": "x", "antwort": "y"},
    "no fields": {},
}  # fmt: skip
BOMB = '<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "ha">' + "".join(
    f'<!ENTITY {new} "{f"&{old};" * 10}">' for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


FOREIGN = '<!DOCTYPE p [<!ENTITY x SYSTEM "file:///etc/passwd">'


def bomb(head, filling=b" "):
    """A gzip file of about a megabyte that holds a gigabyte behind its head."""

    def write(path):  # members of a gzip file follow each other
        path.write_bytes(gzip.compress(head) + 1024 * gzip.compress(filling * (1 << 20)))

    return write


def half(content):
    return lambda path: path.write_bytes(gzip.compress(content)[:-20])


ROW = lines(GOOD).encode()
LONG = {".jsonl": GIGABYTE, ".json": GIGABYTE >> 2, ".csv": GIGABYTE >> 2, ".xml": GIGABYTE >> 2}
FILES = {
    **{f"{key} = {value!r}"[:70]: (".jsonl", lines(GOOD | {key: value}))
       for key, values in WRONG_FIELDS.items() for value in values},
    **{f"{key} missing": (".jsonl", lines({k: v for k, v in GOOD.items() if k != key}))
       for key in ("responses", "ranks")},
    **{name: (".jsonl", lines(row)) for name, row in PAIRS.items()},
    **{f"empty{kind}": (kind, "") for kind in (".jsonl", ".json", ".csv", ".parquet", ".xml")},
    **{f"random bytes{kind}": (kind, bytes(range(256)) * 16)
       for kind in (".jsonl", ".json", ".csv", ".parquet", ".xml", ".jsonl.gz", ".json.gz", ".parquet.gz")},
    **{f"zero bytes{kind}": (kind, b"\0" * 4096)
       for kind in (".jsonl", ".json", ".csv", ".parquet", ".xml", ".jsonl.gz")},
    **{f"half a gzip{kind}": (kind, half(ROW * 500)) for kind in (".jsonl.gz", ".json.gz", ".csv.gz")},
    **{f"UTF-16{kind}": (kind, lines(GOOD).encode("utf-16")) for kind in (".jsonl", ".json", ".csv")},
    **{f"not UTF-8{kind}": (kind, lines(GOOD).replace('"p"', '"\xe4"').encode("latin-1"))
       for kind in (".jsonl", ".json", ".csv")},
    **{f"a pipe{kind}": (kind, pipe)
       for kind in (".jsonl", ".json", ".csv", ".parquet", ".xml", ".jsonl.gz")},
    **{f"/dev/zero{kind}": (kind, zeros) for kind in (".jsonl", ".json", ".csv", ".parquet", ".xml")},
    **{f"{size >> 20} MB without a line end{kind}": (kind, sparse(size, b'{"prompt": "'))
       for kind, size in LONG.items()},
    "a link to itself": (".jsonl", loop),
    "a link to nothing": (".jsonl", dangling),
    "a folder": (".jsonl", lambda path: path.mkdir()),
    "an unknown ending": (".docx", lines(GOOD)),
    "no ending": ("", lines(GOOD)),
    "blank lines": (".jsonl", "\n \n\t\n"),
    "a list a line": (".jsonl", "[1, 2]\n"),
    "a number a line": (".jsonl", "7\n"),
    "NaN alone": (".jsonl", "NaN\n"),
    "two objects a line": (".jsonl", f"{json.dumps(GOOD)}{json.dumps(GOOD)}\n"),
    "half an object": (".jsonl", '{"prompt": "p", "resp'),
    "python's quotes": (".jsonl", f"{GOOD}\n"),
    "a list in a .jsonl": (".jsonl", json.dumps([GOOD, GOOD], indent=1)),
    "lines in a .json": (".json", lines(GOOD, GOOD)),
    "a number in a .json": (".json", "7"),
    "an object without rows": (".json", '{"rows": []}'),
    "an empty list": (".json", "[]"),
    "nested lists": (".jsonl", "[" * 100_000 + "\n"),
    "nested lists in a .json": (".json", "[" * 100_000 + "]" * 100_000),
    "a nested prompt": (".jsonl", '{"prompt": ' + '{"a": ' * 50_000 + "1" + "}" * 50_001 + "\n"),
    "an integer of 5,000 digits": (".jsonl", lines(GOOD)[:-2] + f', "ranks": [0, {"9" * 5000}]}}\n'),
    "a lone surrogate": (".jsonl", '{"prompt": "\\ud800", "responses": ["a", "b"], "ranks": [0, 1]}\n'),
    "a header alone": (".csv", "prompt,chosen,rejected\n"),
    "ragged cells": (".csv", "prompt,chosen,rejected\na,b\n"),
    "an unclosed cell": (".csv", 'prompt,chosen,rejected\na,b,"c\n'),
    "unknown columns": (".csv", "frage,antwort\na,b\n"),
    "a column twice": (".csv", "prompt,prompt\na,b\n"),
    "a gzip of 1 GB in one line": (".jsonl.gz", bomb(b'{"prompt": "')),
    "a gzip of 1 GB in a .json": (".json.gz", bomb(b'[{"prompt": "')),
    "a gzip of 1 GB in a cell": (".csv.gz", bomb(b'prompt,b\n"')),
    "a gzip of 1 GB of lines in a cell": (".csv.gz", bomb(b'a,b\n"', b"\n")),
    "a gzip that is no gzip": (".jsonl.gz", ROW),
    "an entity bomb": (".xml", f"{BOMB}]><posts><row Body='&i;'/></posts>"),
    "an entity of a file": (".xml", f"{FOREIGN}]><posts><row Body='&x;'/></posts>"),
    "half a dump": (".xml", '<posts><row Id="1" PostTypeId="1"'),
    "a dump of nothing": (".xml", "<posts></posts>"),
    "another XML": (".xml", "<html><body/></html>"),
    "a nested dump": (".xml", "<a>" * 100_000),
}  # fmt: skip


def written(path, content):
    """Put a case's content at a path."""
    if callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path
