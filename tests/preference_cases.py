"""A tiny reward model and encoded comparisons for the tests of the reward package, without any stage."""

import functools
import random
import tempfile
from pathlib import Path

import torch
from conftest import tiny_recipe
from transformers.models.llama.modeling_llama import LlamaModel

from reward.model.batch import encode
from reward.model.model import new_reward_model
from reward.training.trainer import ForwardPlan, train_preference_model
from rlhf.data.comparisons import Comparison, Counts, Message, distinct_responses
from rlhf.data.readers.native import read_native
from rlhf.models.tiny import write_tiny_model
from rlhf.tokenization.dialogue import load_dialogue

EOS, VOCABULARY = 1, 259


@functools.cache
def scratch():
    """A folder with the tiny model that goes when the tests end."""
    folder = tempfile.TemporaryDirectory()
    write_tiny_model(Path(folder.name, "tiny"))
    return folder


def tiny(*overrides):
    """Recipe and dialogue of the tiny model, wherever the current folder is."""
    recipe = tiny_recipe(f"model.path={scratch().name}/tiny", *overrides)
    return recipe, load_dialogue(recipe)


def awake(recipe, dialogue, seed=0):
    """A reward model whose adapter says something: in a fresh one B is 0, so A gets no gradient."""
    model = new_reward_model(recipe, dialogue)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def cases(number, seed=0, *, responses=(2, 5), prompt=(1, 12), said=(0, 8), first=0):
    """Encoded comparisons of random tokens; some responses are cut, so that their EOS is not spoken."""
    rng = random.Random(seed)
    examples = []
    for n in range(number):
        k = rng.randint(*responses)
        texts = [[rng.randrange(3, VOCABULARY) for _ in range(rng.randint(*said))] for _ in range(k)]
        ranks = [rng.randrange(3) for _ in range(k)]
        ranks[rng.randrange(k)] = 3 if min(ranks) == 0 else 0  # never all tied
        examples.append(
            {
                "prompt": [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(*prompt))],
                "responses": [[*text, EOS] for text in texts],
                "spoken": [len(text) + (not text or rng.random() < 0.6) for text in texts],
                "ranks": ranks,
                "index": first + n,
            }
        )
    return examples


def words(number, seed=0, k=3):
    """Comparisons as they are before encoding."""
    rng = random.Random(seed)
    some = ["good", "bad", "fine", "dull", "great", "slow"]
    return [
        Comparison((Message("user", f"{n} {rng.choice(some)}"),), tuple(rng.sample(some, k)),
                   tuple(rng.sample(range(k), k)), "test")
        for n in range(number)
    ]  # fmt: skip


def rows_of_all(examples):
    """Every response behind its prompt, flat and in order."""
    return [[*e["prompt"], *response] for e in examples for response in e["responses"]]


def plain_scores(model, examples):
    """What Hugging Face's own classifier says, one row at a time: no packing, no padding, no mask."""
    return torch.stack([model(input_ids=torch.tensor([row])).logits[0, 0] for row in rows_of_all(examples)])


def gradients(model):
    """Gradients of everything that learns, which then is without one."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def learning(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_equal_tensors(mine, expected, *, atol=2e-5):
    assert set(mine) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            mine[name], gradient, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def taught(folder, rows, *overrides, share=True, trunk=None, model=None, member=0, members=1):
    """A model trained on encoded comparisons by the real trainer, its files below ``folder``."""
    recipe, dialogue = tiny("reward.checkpoint_every=1000", *overrides)
    model = new_reward_model(recipe, dialogue, recipe.seed + member) if model is None else model
    plan = ForwardPlan(share, trunk)
    return train_preference_model(
        recipe, recipe.reward, dialogue, model, rows, plan, folder=folder, member=member, members=members
    )


def encoded(number, *overrides, seed=0, k=3):
    """Real text through the recipe's own encoding."""
    return encode(words(number, seed, k), tiny(*overrides)[1])


def stored(part="train"):
    """Comparisons that a stage in the current folder has written, equal responses as one as in training."""
    _, dialogue = tiny()
    some = read_native(f"runs/tiny/comparisons/{part}.jsonl", "stop", Counts())
    distinct = [distinct_responses(c, lambda text: tuple(dialogue.encode_response(text))) for c in some]
    return [c for c in distinct if len(set(c.ranks)) > 1]


def asked(some):
    """Prompts and responses, one line each."""
    return [c.prompt for c in some for _ in c.responses], [r for c in some for r in c.responses]


def ignoring(monkeypatch):
    """Let the decoder look at no more than a mask [N, T], as some architectures do."""
    forward = LlamaModel.forward

    def plain(self, *args, attention_mask=None, **options):
        flat = None if attention_mask is None or attention_mask.ndim == 4 else attention_mask
        return forward(self, *args, attention_mask=flat, **options)

    monkeypatch.setattr(LlamaModel, "forward", plain)
