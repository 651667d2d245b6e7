"""The teacher's log-probs in files: computed once, read by every student, checked, shared between runs.

A folder holds ``index.json`` and one numpy file a shard of sequences, an array of one record a token. The
index says what the log-probs depend on (the key) and the content hash of every shard. A shard is written
before the index names it, so a kill loses one at most; a damaged one is named and computed again. Files are
memory-mapped.

One record: ``token`` (id), ``log_prob_of_token`` (that the teacher gives it), ``index`` [k] and ``log_prob``
[k] of the teacher's most likely tokens before it was seen, and ``log_rest`` of all others together. Natural
logarithms, float32; ids have 16 bits where the vocabulary allows: 310 bytes a token for k = 50.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from policy.distillation.data import Passage, content_hash
from policy.distillation.loss import teacher_log_probs
from policy.distillation.teacher import PromptedModel, Teacher
from rlhf.errors import UserError
from rlhf.models.log_probs import chunk_of
from rlhf.models.token_batches import token_batches
from rlhf.recipe.load import Recipe
from rlhf.recipe.schema import Distill
from rlhf.runs.artifacts import hash_of, read_json, sha256_of, write_atomically, write_json
from rlhf.runs.stage import differences
from rlhf.tokenization.dialogue import Dialogue

INDEX = "index.json"


def record_type(k: int, vocabulary: int) -> np.dtype[Any]:
    """The layout of one record."""
    word = np.uint16 if vocabulary <= 2**16 else np.uint32
    return np.dtype(
        [
            ("token", word),
            ("log_prob_of_token", np.float32),
            ("index", word, (k,)),
            ("log_prob", np.float32, (k,)),
            ("log_rest", np.float32),
        ]
    )


class TeacherCache:
    """The log-probs of one teacher on one list of sequences.

    Args:
        folder: where they are or will be.
        key: all that they depend on, JSON-able.
        lengths: tokens of each sequence.
        k: stored tokens at each place.
        vocabulary: size of the vocabulary.
        shard: sequences in a file.

    Raises:
        UserError: the folder holds the log-probs of another teacher, or on other sequences; says what
        differs.
    """

    def __init__(
        self,
        folder: Path,
        key: dict[str, Any],
        lengths: Sequence[int],
        *,
        k: int,
        vocabulary: int,
        shard: int,
    ) -> None:
        self.folder, self.lengths = folder, list(lengths)
        self.k, self.vocabulary = k, vocabulary
        self.type = record_type(k, vocabulary)
        self._shard = shard
        self._index: dict[str, Any] = {"key": key, "identity": hash_of(key), "shards": {}}
        self._opened: dict[int, NDArray[Any]] = {}
        if (folder / INDEX).is_file():
            found = read_json(folder / INDEX)
            if not isinstance(found, dict) or not {"key", "identity", "shards"} <= found.keys():
                raise UserError(f"{folder / INDEX}: not the index of a teacher's log-probs; remove {folder}")
            if found["identity"] != self._index["identity"]:
                changes = differences(found["key"], key) or ["the index itself"]
                raise UserError(
                    f"{folder} holds the log-probs of another teacher or on other sequences "
                    f"({'; '.join(changes[:3])}): name another folder with "
                    "distill.teacher_cache, or remove it"
                )
            self._index = found

    @property
    def identity(self) -> str:
        """Hash of all that the log-probs depend on."""
        return str(self._index["identity"])

    @property
    def shards(self) -> int:
        """Number of files when all are there."""
        return -(-len(self.lengths) // self._shard)

    def sequences_of(self, number: int) -> range:
        """The sequences of a shard."""
        return range(number * self._shard, min((number + 1) * self._shard, len(self.lengths)))

    def missing(self) -> list[int]:
        """Shards to be computed: those not written yet, and damaged ones, which are named.

        One process asks for all.
        """
        wanted: list[int] = []
        for number in range(self.shards):
            file = self._file(number)
            expected = self._index["shards"].get(file.name)
            if expected is None:
                wanted.append(number)
            elif not file.is_file() or sha256_of(file) != expected:
                what = "is missing" if not file.is_file() else "is damaged: its content hash differs"
                print(f"warning: {file} {what}; it is computed again", flush=True)
                wanted.append(number)
        return wanted

    def write(self, number: int, records: NDArray[Any]) -> None:
        """Keep a shard's records, those of its sequences one after the other.

        Raises:
            OSError: the disk is full; the shards before are untouched.
        """
        expected = sum(self.lengths[row] for row in self.sequences_of(number))
        if records.dtype != self.type or len(records) != expected:
            raise ValueError(f"shard {number} wants {expected} records of {self.type}, not {len(records)}")
        content = io.BytesIO()
        np.save(content, records)
        file = self._file(number)
        write_atomically(file, content.getvalue())
        self._index["shards"][file.name] = sha256_of(file)
        write_json(self.folder / INDEX, self._index)
        self._opened.pop(number, None)

    def records(self, row: int, passage: Passage | None = None) -> NDArray[Any]:
        """The records of one sequence, memory-mapped, one a token.

        passage: the sequence, for a check.

        Raises:
            RuntimeError: the records are about other tokens.
        """
        number = row // self._shard
        if number not in self._opened:
            self._opened[number] = np.load(self._file(number), mmap_mode="r")
        first = sum(self.lengths[before] for before in range(number * self._shard, row))
        found: NDArray[Any] = self._opened[number][first : first + self.lengths[row]]
        if passage and not np.array_equal(found["token"], passage.ids):
            raise RuntimeError(f"the teacher's log-probs of sequence {row} are about other tokens")
        return found

    def _file(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.npy"


def key_of(
    recipe: Recipe, section: Distill, teacher: Teacher, dialogue: Dialogue, passages: Sequence[Passage]
) -> dict[str, Any]:
    """All that the teacher's log-probs depend on."""
    return {
        "teacher": teacher.weights(),
        "tokenizer": dialogue.fingerprint(),
        "prompt": {"sha256": teacher.context.sha256, "ids": hash_of(teacher.context.prefix_ids)},
        "sequences": {"sha256": content_hash(passages), "number": len(passages)},
        "max_tokens": section.max_tokens,
        "top_k": section.top_k,
        "shard_sequences": section.shard_sequences,
        "seed": recipe.seed,
    }


def shard_records(
    teacher: PromptedModel, passages: Sequence[Passage], cache: TeacherCache, budget: int
) -> NDArray[Any]:
    """The records of passages, one after the other; a token that nothing stands before has an empty one.

    Args:
        teacher: the model under the prompt.
        passages: those of one shard.
        cache: whose records they will be.
        budget: tokens of the passages in memory at once.
    """
    starts = np.cumsum([0, *(len(p.ids) for p in passages)])
    records = np.zeros(int(starts[-1]), dtype=cache.type)
    records["token"] = np.concatenate([p.ids for p in passages])
    for batch in token_batches([len(p.teacher_ids) for p in passages], budget):
        some = [passages[n] for n in batch]
        hidden_ND = teacher.states(some)
        firsts = [teacher.first_of(p) for p in some]
        targets = np.concatenate([p.ids[first:] for p, first in zip(some, firsts, strict=True)])
        top_k, target_N = teacher_log_probs(
            hidden_ND,
            teacher.head,
            torch.from_numpy(targets.astype(np.int64)).to(hidden_ND.device),
            k=cache.k,
            chunk=chunk_of(cache.vocabulary),
            vocabulary=cache.vocabulary,
        )
        places = np.concatenate(
            [np.arange(starts[n] + first, starts[n + 1]) for n, first in zip(batch, firsts, strict=True)]
        )
        for name, tensor in zip(("index", "log_prob", "log_rest"), top_k, strict=True):
            records[name][places] = tensor.cpu().numpy()
        records["log_prob_of_token"][places] = target_N.cpu().numpy()
    return records
