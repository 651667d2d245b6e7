"""Run directories: nothing counts until its manifest is there, and the manifest is written last.

``runs/<name>/<stage>/`` holds the resolved recipe (written first), checkpoints, the results and
``manifest.json`` (written last, with the content hash of every file). A folder without a manifest is
unfinished. A checkpoint is written beside its place, synced to disk, given its manifest, and renamed; the
older one is removed only after that. So ``kill -9`` at any moment leaves at least one complete checkpoint.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rlhf.errors import UserError, errno_of
from rlhf.runs.processes import rank

MANIFEST = "manifest.json"
PROBE_SCORES = "probe_scores.jsonl"  # what the reward stage's probes give its held-out responses
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"  # what a saved adapter consists of
_KEPT = 2  # checkpoints of a stage
_CHECKSUM = "checksum"  # of all else in a manifest
_STAGING = ".staging-"  # prefix of a folder that is being written


def sha256_of(path: Path) -> str:
    """Content hash of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def model_files(place: str, *more: str) -> list[Path]:
    """The files of a local model or adapter that decide its output; a model on the hub has none here.

    place: a folder or a hub id. more: patterns of further files.
    """
    folder = Path(place).expanduser()
    names = ("config.json", "reward*.json", SETTINGS, "tokenizer.json", "*.safetensors", "*.jinja", *more)
    return [file for name in names for file in sorted(folder.glob(name)) if folder.is_dir()]


def hash_of(value: object) -> str:
    """Content hash of a JSON-able value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to fill: a reader finds the old content or the whole new one, never a part.

    Raises:
        OSError: the disk is full or not writable; the old content is untouched and no scrap is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # as of a write to a full disk
            error.filename = str(path)
        raise
    temporary.replace(path)
    sync(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file as :func:`atomic_file` does."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[object]) -> None:
    """Write JSON Lines atomically, a value a line; the rows are taken one at a time."""
    with atomic_file(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def read_jsonl(path: Path) -> list[Any]:
    """The values of a file that :func:`write_jsonl` wrote."""
    # not splitlines(): a text may hold a line separator of Unicode, which JSON leaves as it is
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def print_page(file: Path) -> None:
    """Print the page of a finished stage, once for all processes.

    Raises:
        UserError: it is gone; its folder has the name of the stage, and of the make target.
    """
    if not file.is_file():
        stage = file.parent.name
        raise UserError(f"{file} is missing; remove {file.parent} and run `make {stage}` again")
    if rank() == 0:
        print(file.read_text(encoding="utf-8"), flush=True)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is not JSON, as after damage to the disk.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); remove its folder and run again") from None


def _files(folder: Path, skip: Iterable[str] = ()) -> list[Path]:
    hidden = set(skip)
    return sorted(
        p
        for p in folder.rglob("*")
        if p.is_file() and p.name != MANIFEST and not hidden.intersection(p.relative_to(folder).parts)
    )


def write_manifest(folder: Path, extra: dict[str, Any], skip: Iterable[str] = ()) -> dict[str, Any]:
    """Sync every file of a folder, then write the manifest that makes the folder complete.

    Args:
        folder: what has been written.
        extra: what else the manifest says; its ``fingerprint`` enters the identity.
        skip: names of files or folders that are not part of the result.

    Returns:
        The manifest. Its ``identity`` hashes the contents, not times or machines.
    """
    hashes = {}
    for file in _files(folder, skip):
        sync(file)
        hashes[file.relative_to(folder).as_posix()] = sha256_of(file)
    identity = hash_of({"files": hashes, "fingerprint": extra.get("fingerprint")})
    manifest = json.loads(json.dumps({**extra, "identity": identity, "files": hashes}))
    manifest.pop(_CHECKSUM, None)
    write_json(folder / MANIFEST, {**manifest, _CHECKSUM: hash_of(manifest)})
    return dict(manifest)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder; None where it is damaged: no JSON object, or another one than was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        # those of earlier versions have no checksum
        whole = manifest.pop(_CHECKSUM, None) in (None, hash_of(manifest))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return None
    return dict(manifest) if whole else None


def files_of_manifest(folder: Path) -> dict[str, str] | None:
    """Content hashes by file, as a manifest lists them; None where it does not."""
    files = (read_manifest(folder) or {}).get("files")
    return files if isinstance(files, dict) else None


def fault_of(folder: Path, names: Iterable[str] = ("*",)) -> str | None:
    """What is wrong with a folder that has a manifest, or None: missing, damaged or changed files.

    names: patterns of the files to look at.
    """
    if not (folder / MANIFEST).exists():
        return f"{folder} has no {MANIFEST}"
    files, patterns = files_of_manifest(folder), tuple(names)
    if files is None:
        return f"{folder / MANIFEST} is damaged"
    for name, expected in files.items():
        file = folder / name
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            continue
        if not file.is_file():
            return f"{file} is {'a folder, and was a file' if file.is_dir() else 'missing'}"
        if sha256_of(file) != expected:
            return f"{file} is damaged: its content hash differs from the manifest's"
    return None


@contextlib.contextmanager
def library_errors_as_os_error(folder: Path) -> Iterator[None]:
    """Let every library's way of reporting a refused write come out as ``OSError`` with a place.

    folder: where it writes; stands for the file where the library does not name it.
    """
    try:
        yield
    except Exception as error:
        number = errno_of(error)
        if number is None or getattr(error, "filename", None) is not None:
            raise
        raise OSError(number, os.strerror(number), str(folder)) from error


@contextlib.contextmanager
def staged_folder(place: Path) -> Iterator[Path]:
    """A folder to fill beside its place, which must be free or empty by then: left without an error it takes
    that place, else it vanishes."""
    staging = place.with_name(f".{place.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        with library_errors_as_os_error(place):
            yield staging
        staging.rename(place)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextlib.contextmanager
def optimizer_state_of(checkpoint: Path) -> Iterator[None]:
    """Read an optimizer's state inside; going on with a fresh one in its place would be another run.

    Raises:
        UserError: a tensor or a file is missing.
    """
    try:
        yield
    except (KeyError, FileNotFoundError) as error:
        raise UserError(
            f"{checkpoint}: the optimizer state is incomplete ({error}); "
            f"remove {checkpoint} to go on from the one before"
        ) from None


def check_anchors(
    checkpoint: Path, state: dict[str, Any], anchors: dict[str, str], names: dict[str, str]
) -> None:
    """What a run depends on must be what it was when its checkpoint was written.

    state: of the checkpoint. anchors: hashes of today by their key in the state. names: what each stands for.

    Raises:
        UserError: one is another; names it.
    """
    for anchor, now in anchors.items():
        if state[anchor] != now:
            raise UserError(
                f"{checkpoint}: {names[anchor]} has changed since it was written, so the run cannot go on; "
                f"put the old one back, or remove {checkpoint.parents[1]} to start again"
            )


def step_of(checkpoint: Path | None) -> int:
    """Number of finished steps that a checkpoint's name says, 0 for none."""
    return int(checkpoint.name.partition("-")[2]) if checkpoint else 0


class Checkpoints:
    """The numbered checkpoints of one stage: ``checkpoints/step-<n>/``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextlib.contextmanager
    def writing(self, step: int, *, commits: bool = True) -> Iterator[Path]:
        """A folder to fill; on leaving it becomes the checkpoint of this step, or vanishes on an error.

        Call :meth:`clean` before, on one process, and let the others wait for that.

        Args:
            step: number of finished steps.
            commits: False on the other processes of a distributed run: they fill the same folder, one
                process renames it.
        """
        staging = self.folder / f"{_STAGING}{step:07d}"
        staging.mkdir(parents=True, exist_ok=True)
        try:
            with library_errors_as_os_error(self.folder):
                yield staging
                if commits:
                    self._commit(staging, step)
        except BaseException:
            if commits:
                shutil.rmtree(staging, ignore_errors=True)
            raise

    def _commit(self, staging: Path, step: int) -> None:
        write_manifest(staging, {"step": step})
        final = self.folder / f"step-{step:07d}"
        if final.exists():  # a damaged one of the same step: it was not used, so it may go
            shutil.rmtree(final)
        staging.rename(final)
        sync(self.folder)
        for old in self._all()[:-_KEPT]:
            shutil.rmtree(old)

    def _all(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("step-*") if p.is_dir())

    def clean(self) -> None:
        """Remove what an interrupted save left behind."""
        for scrap in self.folder.glob(f"{_STAGING}*"):
            shutil.rmtree(scrap, ignore_errors=True)

    def newest(self) -> Path | None:
        """The newest complete and undamaged checkpoint; damaged ones are named and passed over.

        Raises:
            UserError: there are checkpoints, and none of them is whole: starting over silently would lose
                work that the user believes is there.
        """
        faults: list[str] = []
        for folder in reversed(self._all()):
            fault = fault_of(folder)
            if fault is None:
                for line in faults:
                    print(f"warning: {line}; using {folder.name} instead", flush=True)
                return folder
            faults.append(fault)
        if faults:
            raise UserError(f"no checkpoint can be used: {faults[0]}; remove {self.folder} to start again")
        return None
