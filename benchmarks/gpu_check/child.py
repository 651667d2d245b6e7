"""What has to be measured inside a process that owns the GPU: ``... .child KIND TASK RESULT``, JSON files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from benchmarks.gpu_check import beside
from benchmarks.harness import Figures, machine, peak_bytes, serve
from benchmarks.ppo.sides import ours, prepare
from benchmarks.ppo.task import Task
from rlhf.errors import exit_on_user_error
from rlhf.models.base import best_device
from rlhf.models.tiny import write_tiny_model
from rlhf.plan.lengths import Lengths
from rlhf.plan.shapes import PUBLISHED, Shape, from_config
from rlhf.plan.stages import plan
from rlhf.runs.artifacts import write_json
from rlhf.training.matrix_units import product_rate

PROMPTS = "recipes/prompts/sentiment_train.jsonl"
PACKAGES = ("torch", "transformers", "peft", "trl", "deepspeed", "bitsandbytes")


def sizes_in_config(shape: Shape) -> dict[str, Any]:
    """A shape as fields of a configuration of transformers."""
    return {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "tie_word_embeddings": shape.tied,
    }


SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "0.6b": (Qwen3Config, sizes_in_config(PUBLISHED["qwen3-0.6b"])),
    "8b": (LlamaConfig, sizes_in_config(PUBLISHED["llama-3.1-8b"])),
}
_SMALL = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}  # fmt: skip


def products_a_second(size: int, dtype: torch.dtype) -> float:
    """Operations a second of the best of several products of two squares on the best device."""
    return 1e9 * product_rate(dtype, size, size, size, best_device())


def device(size: int) -> Figures:
    """The machine, its cards, and what its matrix products reach."""
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        **machine(PACKAGES),
        "cuda": torch.version.cuda,
        "cards": [{"name": c.name, "memory_gb": round(c.total_memory / 1e9, 1)} for c in cards],
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if cards else None,
        **{
            f"{name}_tflops": products_a_second(size, getattr(torch, name)) / 1e12
            for name in ("float32", "bfloat16")
        },
    }


def random_base(shape: str, quick: bool) -> Any:
    """A random model of a known shape in bfloat16 on the best device; ``quick``: of a few megabytes."""
    kind, values = SHAPES[shape]
    config = kind(**{**values, **(_SMALL if quick else {})}, eos_token_id=1, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device(best_device()):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def ppo(shape: str, quick: bool) -> Figures:
    """Steps of ``make ppo`` over a random model of a known shape; ``quick``: small in every respect.

    Returns:
        Seconds a step and by phase, tokens a second, the share of the bfloat16 peak, memory in bytes: of the
        GPU (``gpu_bytes``, the most that tensors held) and of the process, what ``make plan`` says of it, and
        what was measured over that.
    """
    base = random_base(shape, quick)
    number, response = (4, 8) if quick else (16, 64)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tokenizer"
        write_tiny_model(folder)
        rows = prepare(str(folder), PROMPTS, number, 16, 64, 0)
        steps = 2 if quick else 3
        task = Task(str(folder), "", "all", response, epochs=2, steps=steps, micro_batch=min(8, number))
        found = ours(task, rows, Path(scratch), base)
    asked = task.recipe(number)
    recipe = asked.model_copy(update={"model": asked.model.model_copy(update={"dtype": "bfloat16"})})
    lengths = Lengths(max(len(row["ids"]) for row in rows), 2, None, True)
    moments = plan(
        recipe, from_config(base.config.to_dict(), shape), lengths, gpu=torch.cuda.is_available(), world=1
    ).moments
    peak = products_a_second(512 if quick else 8192, torch.bfloat16)
    planned = max(m.parts.total for m in moments if m.stage == "ppo")
    kept = ("s_per_step", "generate_s", "score_s", "update_s", "tokens_per_s", "flops_per_s", "gpu_bytes")
    return {
        **{name: found[name] for name in kept},
        "share_of_bfloat16_peak": found["flops_per_s"] / peak,
        "parameters": sum(p.numel() for p in base.parameters()),
        "process_bytes": peak_bytes(),
        "planned_bytes": planned,
        "measured_over_planned": (found["gpu_bytes"] or peak_bytes()) / planned,
    }


def sides(folder: str, names: list[str], samples: int, quick: bool) -> Figures:
    """Sides of :mod:`benchmarks.gpu_check.beside` at the shape of 0.6B; the first call writes the model."""
    place = Path(folder)
    if not (place / "rows.json").is_file():
        write_tiny_model(place)  # for its tokenizer
        random_base("0.6b", quick).save_pretrained(folder)
        rows = prepare(folder, PROMPTS, (4 if quick else 16) // samples, 16, 64, 0)
        write_json(place / "rows.json", {"rows": [row for row in rows for _ in range(samples)]})
    return beside.run(place, names, samples, quick=quick)


KINDS: dict[str, Callable[..., Figures]] = {"device": device, "ppo": ppo, "sides": sides}

if __name__ == "__main__":
    exit_on_user_error(lambda: serve(KINDS))
