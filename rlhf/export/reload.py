"""An exported model as anybody loads it: transformers and nothing of this project.

``python -I reload.py FOLDER KIND ROWS OUT THREADS``: KIND is an auto class of transformers, ROWS a JSON file
of token ids a row, OUT the safetensors file that gets the logits of each row.
"""

import json
import sys
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

LAST = 64  # tokens of a row whose logits are compared


@torch.no_grad()
def logits_of(model: Any, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Logits of every row by its number, float32: of its last tokens [T, V], or of the row [labels]."""
    model.set_attn_implementation("eager")
    for weight in model.parameters():  # a mapped file is aligned otherwise, which can change how sums round
        weight.data = weight.data.clone(memory_format=torch.contiguous_format)
    found = {}
    for number, ids in enumerate(rows):
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0]
        found[str(number)] = (logits[-LAST:] if logits.ndim > 1 else logits).float().cpu().contiguous()
    return found


def main() -> None:
    """Write the logits of what the words on the command line name."""
    folder, kind, rows, out, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    with open(rows, encoding="utf-8") as file:
        save_file(logits_of(model, json.load(file)), out)


if __name__ == "__main__":
    main()
