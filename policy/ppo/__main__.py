"""The `ppo` stage: prompts and a reward model in, a policy out.

``python -m policy.ppo RECIPE [section.key=value ...]``, or under ``deepspeed --module``, writes
``runs/<name>/ppo/policy`` and ``.../value``.
"""

from __future__ import annotations

from pathlib import Path

from rlhf.collect.judges import check_judge
from rlhf.errors import exit_on_user_error
from rlhf.recipe.load import Recipe, check_batch_sizes, from_command_line
from rlhf.runs.initial_adapter import start_inputs, start_parents
from rlhf.runs.processes import processes
from rlhf.runs.stage import open_stage

TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja")
"""Files of a model folder in which a change makes other token ids of the same text."""


def tokenizer_files(recipe: Recipe) -> list[str]:
    """What text becomes token ids by; none for a model that is not in a local folder."""
    return [str(file) for name in TOKENIZER if (file := Path(recipe.model.path) / name).is_file()]


def main() -> None:
    """The `ppo` target."""
    recipe = from_command_line()
    check_batch_sizes(recipe, processes(), "ppo")
    section = recipe.ppo
    rewards = ("reward",) if section.own_reward else ()
    parents = ("comparisons", *rewards, *start_parents(recipe, "ppo"))
    inputs = [*section.ptx_texts, *section.function_files]
    inputs += [*start_inputs(recipe, "ppo"), *tokenizer_files(recipe)]
    reads = [*section.named_models, *filter(None, [section.test_reward_model])]
    stage = open_stage(recipe, "ppo", section="ppo", parents=parents, inputs=inputs, reads=reads)
    if stage is None:
        return
    for number, reward in enumerate(section.rewards):
        if reward.scored_by is not None:
            check_judge(reward.scored_by, recipe, f"ppo.rewards[{number}]", in_ppo=True)
    from policy.ppo.run import build_trainer, save

    trainer = build_trainer(stage.recipe, stage)
    trainer.train()
    stage.finish(save(trainer))


if __name__ == "__main__":
    exit_on_user_error(main)
