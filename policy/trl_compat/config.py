"""trl's ``PPOConfig``: every argument of trl 1.12, and what became of it here.

An argument is used (:data:`MAPPED`), changes nothing that is learned (:data:`UNUSED`), or is refused when it
is given another value than its default (:data:`REFUSED`), with where to go instead.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import TrainingArguments

from rlhf.errors import UserError
from rlhf.recipe.schema import Ppo
from rlhf.training.trackers import TRACKERS

_SAME = {  # arguments that a field of the recipe's section `ppo` takes as they are
    "per_device_train_batch_size": "micro_batch_size",
    "local_rollout_forward_batch_size": "rollout_batch_size",
    "num_mini_batches": "minibatches",
    "num_ppo_epochs": "epochs",
    "cliprange": "clip_range",
    "cliprange_value": "value_clip_range",
    "vf_coef": "value_coef",
    **{name: name for name in ("temperature", "kl_coef", "kl_estimator", "gamma", "lam", "whiten_rewards",
                               "learning_rate", "adam_epsilon", "max_grad_norm")},
}  # fmt: skip
MAPPED = {
    **{name: f"ppo.{field}" for name, field in _SAME.items()},
    "output_dir": "folder of the run",
    "gradient_accumulation_steps": "ppo.batch_size = this x per_device_train_batch_size x processes",
    "num_train_epochs": "ppo.steps, where total_episodes is not given",
    "total_episodes": "ppo.steps = total_episodes / ppo.batch_size, rounded up",
    "lr_scheduler_type": "ppo.schedule",
    "warmup_steps": "ppo.warmup_steps; below 1 a share of all steps",
    "optim": "ppo.optimizer",
    "bf16": "the policy's frozen weights in bfloat16",
    "fp16": "the policy's frozen weights in float16",
    "gradient_checkpointing": "layers that train keep their input alone; equal results",
    "save_strategy": "ppo.checkpoint_every; `no`: at the end alone",
    "save_steps": "ppo.checkpoint_every",
    "seed": "the seed of all sampling and shuffling",
    "report_to": "trackers: tensorboard, wandb, trackio; `all` is those that are installed",
    "response_length": "dialogue.max_response_tokens",
    "stop_token": "dialogue.end_of_turn; without one, EOS ends a response too",
    "stop_token_id": "dialogue.end_of_turn",
    "missing_eos_penalty": "ppo.missing_eos: subtract, ppo.missing_eos_penalty",
    **dict.fromkeys(
        ("world_size", "num_total_batches", "micro_batch_size", "local_batch_size", "batch_size",
         "local_mini_batch_size", "mini_batch_size"),
        "computed, as in trl",
    ),
}  # fmt: skip
"""What an argument is here."""

_LOG = "the log is metrics.jsonl in output_dir, a line a step"
_LOADER = "prompts are drawn from memory by the seed"
_EVAL = "generate_completions() answers eval_dataset; `make evaluate` compares with intervals"
_HUB = "nothing is uploaded: push the folder that save_model wrote"
_SCRIPT = "for the script's own use, as in trl"
UNUSED = {
    **dict.fromkeys(("sft_model_path", "reward_model_path", "do_train", "do_eval", "do_predict", "run_name",
                     "project"), _SCRIPT),
    **dict.fromkeys(("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node",
                     "logging_nan_inf_filter", "include_num_input_tokens_seen", "log_level",
                     "log_level_replica", "disable_tqdm", "skip_memory_metrics",
                     "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), _LOG),
    **dict.fromkeys(("dataset_num_proc", "dataloader_drop_last", "dataloader_num_workers",
                     "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
                     "dataloader_multiprocessing_context", "dataloader_in_order", "remove_unused_columns",
                     "label_names", "length_column_name", "ignore_data_skip", "accelerator_config"), _LOADER),
    **dict.fromkeys(("num_sample_generations", "eval_strategy", "eval_steps", "eval_delay",
                     "per_device_eval_batch_size", "eval_on_start", "eval_do_concat_batches",
                     "eval_use_gather_object", "eval_accumulation_steps", "prediction_loss_only",
                     "include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval"), _EVAL),
    **dict.fromkeys(("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push",
                     "hub_revision"), _HUB),
    **dict.fromkeys(("save_only_model", "save_on_each_node", "save_total_limit"),
                    "the last two checkpoints are kept, whole"),
    **dict.fromkeys(("gradient_checkpointing_kwargs", "use_cache", "torch_empty_cache_steps", "local_rank",
                     "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
                     "ddp_static_graph", "ds3_gather_for_generation", "tf32"),
                    "how it is computed, not what"),
}  # fmt: skip
"""Arguments that change nothing that is learned, and why."""

_LAUNCH = "start the script under the deepspeed launcher: ZeRO 2 over its processes"
_ADAM = "AdamW has torch's betas and no weight decay"
_REWARD = "PPO has no labels"
REFUSED = {
    "push_to_hub": _HUB,
    "max_steps": "give total_episodes",
    "lr_scheduler_kwargs": "the schedules have no further arguments",
    **dict.fromkeys(("optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2"),
                    _ADAM),
    "average_tokens_across_devices": "losses are means over all processes always",
    "label_smoothing_factor": _REWARD,
    **dict.fromkeys(("activation_checkpointing", "activation_checkpointing_kwargs"),
                    "use gradient_checkpointing"),
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel",
                     "liger_kernel_config"), "adapters are folded into plain matrix products instead"),
    "neftune_noise_alpha": "policy and sampler must be one model",
    "auto_find_batch_size": "`make plan` says what fits",
    **dict.fromkeys(("enable_jit_checkpoint", "restore_callback_states_from_checkpoint",
                     "resume_from_checkpoint"),
                    "a run goes on from the newest checkpoint in output_dir by itself"),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
                    "the last weights are kept; ppo.max_kl of a recipe ends a run early"),
    "full_determinism": "runs are deterministic on a CPU; on a GPU set torch's own switch",
    "data_seed": "seed is the one seed",
    "use_cpu": "hide the GPUs: CUDA_VISIBLE_DEVICES=",
    **dict.fromkeys(("parallelism_config", "ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "deepspeed"),
                    _LAUNCH),
    "train_sampling_strategy": "prompts are shuffled by the seed",
    "debug": "look at metrics.jsonl",
    **dict.fromkeys(("model_adapter_name", "ref_adapter_name"),
                    "pass the base and a peft_config: the reference is the base without the adapter"),
}  # fmt: skip
"""Where an argument went that cannot be given here."""

_SCHEDULES = {name: name for name in ("linear", "cosine", "constant", "cosine_with_min_lr")}
_OPTIMIZERS = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "paged_adamw_8bit": "paged_adamw_8bit"}


@dataclass
class PPOConfig(TrainingArguments):
    """The arguments of trl 1.12's ``PPOConfig`` with its defaults; :data:`MAPPED` says what each is here."""

    learning_rate: float = 3e-6
    gradient_checkpointing: bool = True
    bf16: bool | None = None  # type: ignore[assignment]
    logging_steps: float = 10
    dataset_num_proc: int | None = None
    num_mini_batches: int = 1
    total_episodes: int | None = None
    local_rollout_forward_batch_size: int = 64
    num_sample_generations: int = 10
    response_length: int = 53
    stop_token: Literal["eos"] | None = None
    stop_token_id: int | None = None
    temperature: float = 0.7
    missing_eos_penalty: float | None = None
    sft_model_path: str = "EleutherAI/pythia-160m"
    world_size: int | None = None
    num_total_batches: int | None = None
    micro_batch_size: int | None = None
    local_batch_size: int | None = None
    batch_size: int | None = None
    local_mini_batch_size: int | None = None
    mini_batch_size: int | None = None
    push_to_hub: bool = False
    reward_model_path: str = "EleutherAI/pythia-160m"
    model_adapter_name: str | None = None
    ref_adapter_name: str | None = None
    num_ppo_epochs: int = 4
    whiten_rewards: bool = False
    kl_coef: float = 0.05
    kl_estimator: Literal["k1", "k3"] = "k1"
    cliprange: float = 0.2
    vf_coef: float = 0.1
    cliprange_value: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    ds3_gather_for_generation: bool = True

    def __post_init__(self) -> None:
        """Refuse what would be ignored.

        Raises:
            UserError: an argument has no counterpart here and another value than its default.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if field.name in MAPPED or field.name in UNUSED or value in (default, None):
                continue
            where = REFUSED.get(field.name, "trl 1.12 did not have it")
            raise UserError(f"PPOConfig: {field.name}={value!r} has no counterpart here: {where}")
        if self.bf16 is None:
            self.bf16 = False
        if self.stop_token and self.stop_token_id is not None:
            raise UserError(
                "PPOConfig: stop_token and stop_token_id are two answers to one question; give one"
            )
        self.report_to = _trackers(self.report_to)
        super().__post_init__()

    def section(self, rows: int, processes: int) -> Ppo:
        """The recipe section ``ppo`` that these arguments mean; fills in the computed ones, as trl does.

        Args:
            rows: prompts of the data set.
            processes: over which a batch is spread.

        Raises:
            UserError: a batch does not divide, or a schedule or an optimizer is not there.
        """
        self.world_size = processes
        self.local_batch_size = self.per_device_train_batch_size * self.gradient_accumulation_steps
        self.micro_batch_size = self.per_device_train_batch_size * processes
        self.batch_size = self.local_batch_size * processes
        if self.total_episodes is None:
            self.total_episodes = int(self.num_train_epochs * rows)
        for name in ("batch_size", "local_batch_size"):
            if getattr(self, name) % self.num_mini_batches:
                raise UserError(
                    f"PPOConfig: {name} {getattr(self, name)} does not divide into num_mini_batches "
                    f"{self.num_mini_batches}"
                )
        self.mini_batch_size = self.batch_size // self.num_mini_batches
        self.local_mini_batch_size = self.local_batch_size // self.num_mini_batches
        self.num_total_batches = max(1, math.ceil(self.total_episodes / self.batch_size))
        every = self.save_steps if str(_plain(self.save_strategy)) == "steps" else self.num_total_batches
        if every < 1:  # a share of all steps
            every = math.ceil(every * self.num_total_batches)
        try:
            return Ppo.model_validate(
                {
                    **{field: getattr(self, name) for name, field in _SAME.items()},
                    "steps": self.num_total_batches,
                    "batch_size": self.batch_size,
                    "missing_eos": "ignore" if self.missing_eos_penalty is None else "subtract",
                    "missing_eos_penalty": self.missing_eos_penalty or 0.0,
                    "schedule": _one_of("lr_scheduler_type", self.lr_scheduler_type, _SCHEDULES),
                    "warmup_steps": self._warmup(),
                    "optimizer": _one_of("optim", self.optim, _OPTIMIZERS),
                    "checkpoint_every": int(every),
                }
            )
        except ValueError as error:
            fault: Any = error.errors()[0] if hasattr(error, "errors") else {"loc": (), "msg": str(error)}
            raise UserError(f"PPOConfig: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None

    def _warmup(self) -> int:
        """Steps of the warm-up; below 1 it is a share of all steps."""
        steps = self.num_total_batches or 1
        return math.ceil(self.warmup_steps * steps) if self.warmup_steps < 1 else int(self.warmup_steps)


def _plain(value: Any) -> Any:
    """The value of an enumeration of transformers."""
    return getattr(value, "value", value)


def _trackers(report_to: str | Sequence[str] | None) -> list[str]:
    """The experiment trackers that ``report_to`` names.

    Raises:
        UserError: one of them is not here.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    if names == ["all"]:
        return [name for name in TRACKERS if importlib.util.find_spec(name) is not None]
    names = [name for name in names if name != "none"]
    if others := [name for name in names if name not in TRACKERS]:
        raise UserError(f"PPOConfig: report_to={others[0]}: use one of {', '.join(TRACKERS)}, or none")
    return names


def _one_of(name: str, value: Any, known: dict[str, str]) -> str:
    found = known.get(str(_plain(value)))
    if found is None:
        raise UserError(f"PPOConfig: {name}={_plain(value)}: use one of {', '.join(known)}")
    return found
