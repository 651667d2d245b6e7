"""The push of an exported model to the hub, where the recipe asks for it."""

from __future__ import annotations

from pathlib import Path

from rlhf.errors import UserError, first_line
from rlhf.recipe.load import Recipe


def push(recipe: Recipe, folder: Path, name: str) -> None:
    """Push an exported folder to ``export.repo``-``name``; nothing where the recipe names no repository.

    The account is the one that ``hf auth login`` or HF_TOKEN has set up.

    Raises:
        UserError: the hub refuses, or cannot be reached; the folder stays.
    """
    if recipe.export.repo is None:
        return
    from huggingface_hub import HfApi

    repo, api = f"{recipe.export.repo}-{name}", HfApi()
    try:
        api.create_repo(repo, private=recipe.export.private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"{recipe.name}: {name}")
    except Exception as error:  # of the hub, of the network, of the files
        raise UserError(
            f"export.repo: {repo} did not take the model ({first_line(error, 200)}); it is in {folder}: look "
            f"at the account (hf auth whoami), or push it yourself: hf upload {repo} {folder}"
        ) from None
    print(f"export: pushed to {repo}", flush=True)
