"""Whether two states of the code behave the same: both tiny roads from a seed, and what came out of them.

    python tests/same_behaviour.py write FILE       run both roads, write what came out
    python tests/same_behaviour.py compare FILE     run both roads, print every difference from FILE

What came out: the SHA-256 of every tensor of every final adapter, and every figure of ``summary.json``,
``card.json`` and ``tax.json`` but times and memory. The roads start as a user starts them, by ``make``, in
one thread, so that the file can be compared across any move of modules. Bits depend on the processor:
compare on the machine that wrote.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors.numpy import load_file

ROOT = Path(__file__).parent.parent
ROADS = {"same-tiny": "recipes/tiny.yaml", "same-assistant": "recipes/tiny_assistant.yaml"}
FIGURES = ("summary.json", "card.json", "tax.json")
WITHOUT = ("adapter_config.json", "seconds", "gigabytes", "memory", "minutes", "versions", "time", "peak")


def run_road(name: str, recipe: str) -> None:
    """All stages of one recipe, from an empty run folder, on one thread."""
    shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)
    command = [
        "make",
        "--no-print-directory",
        "rlhf",
        f"RECIPE={recipe}",
        f"SET=name={name}",
        "PROCS=1",
        "QUICK=",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-2000:]}")


def figures_of(value: object, path: str) -> dict[str, object]:
    """Every leaf of a JSON document under its path, but times, memory and files of varying order."""
    if isinstance(value, dict):
        items = [(str(key), inner) for key, inner in value.items() if not any(w in str(key) for w in WITHOUT)]
    elif isinstance(value, list):
        items = [(str(index), inner) for index, inner in enumerate(value)]
    else:
        return {path: value}
    return {key: leaf for name, inner in items for key, leaf in figures_of(inner, f"{path}/{name}").items()}


def outcome_of(folder: Path) -> dict[str, object]:
    """Hashes of all final tensors and all figures of a finished run, by ``stage/file/name``."""
    found: dict[str, object] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        path = file.relative_to(folder)
        if not any("checkpoint" in part for part in path.parts):
            for name, tensor in sorted(load_file(file).items()):
                text = f"{tensor.dtype} {tensor.shape} ".encode() + tensor.tobytes()
                found[f"{path}/{name}"] = hashlib.sha256(text).hexdigest()
    for name in FIGURES:
        for file in sorted(folder.rglob(name)):
            text = file.read_text(encoding="utf-8")
            found |= figures_of(json.loads(text), str(file.relative_to(folder)))
    return found


def differences(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """One line for each entry that has another name, is missing, is new or has another value."""
    gone, come = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
    lines = []
    for key in list(gone):
        found = [new for new in come if renames(key, new) and before[key] == after[new]]
        if len(found) == 1:
            lines.append(f"renamed  {key} -> {found[0]}")
            gone.remove(key)
            come.remove(found[0])
    lines += [f"missing  {key}: {before[key]}" for key in gone] + [
        f"new      {key}: {after[key]}" for key in come
    ]
    both = sorted(before.keys() & after.keys())
    return lines + [
        f"changed  {key}: {before[key]} -> {after[key]}" for key in both if before[key] != after[key]
    ]


def renames(old: str, new: str) -> bool:
    """Whether two paths differ in one part only, at the same depth."""
    pairs = list(zip(old.split("/"), new.split("/"), strict=False))
    return old.count("/") == new.count("/") and sum(a != b for a, b in pairs) == 1


def main() -> int:
    """Run both roads, then write or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("do", choices=("write", "compare"))
    parser.add_argument("file", type=Path)
    chosen = parser.parse_args()
    found: dict[str, object] = {}
    for name, recipe in ROADS.items():
        run_road(name, recipe)
        found |= {f"{name}/{key}": value for key, value in outcome_of(ROOT / "runs" / name).items()}
    if chosen.do == "write":
        chosen.file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        print(f"{len(found)} entries -> {chosen.file}")
        return 0
    lines = differences(json.loads(chosen.file.read_text(encoding="utf-8")), found)
    print("\n".join(lines) or f"{len(found)} entries, no difference")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
