"""Keys of recipes under their former names: a recipe that has one is told the present one."""

RENAMED = {
    "collect.comparisons": "collect.prompts",
    "distill.teacher_file": "distill.teacher_cache",
    "distill.warmup": "distill.warmup_steps",
    "evaluate.samples": "evaluate.samples_per_prompt",
    "pmp.centring": "pmp.center_rewards_coef",
    "pmp.comparisons": "pmp.limit",
    "pmp.warmup": "pmp.warmup_ratio",
    "ppo.clip": "ppo.clip_range",
    "ppo.kl_control": "ppo.kl_controller",
    "ppo.kl_horizon": "ppo.kl_controller_horizon",
    "ppo.kl_target": "ppo.kl_controller_target",
    "ppo.max_bad_updates": "ppo.max_nonfinite_updates",
    "ppo.retokenise": "ppo.retokenize",
    "ppo.samples": "ppo.samples_per_prompt",
    "ppo.score_normalisation": "ppo.score_normalization",
    "ppo.stop_kl": "ppo.target_kl",
    "ppo.value_clip": "ppo.value_clip_range",
    "ppo.warmup": "ppo.warmup_steps",
    "reward.centring": "reward.center_rewards_coef",
    "reward.comparisons": "reward.limit",
    "reward.warmup": "reward.warmup_ratio",
    "sft.judged": "sft.eval_samples",
    "sft.warmup": "sft.warmup_ratio",
    "tax.arms": "tax.variants",
    "tax.humaneval.samples": "tax.humaneval.samples_per_prompt",
    "tax.others": "tax.models",
    "tax.pieces": "tax.cache",
    "tax.tokens_at_once": "tax.tokens_per_batch",
    "tax.toxicity.samples": "tax.toxicity.samples_per_prompt",
}
"""Present name of every key that had another one, by its former path."""

REMOVED = {"ppo.check_invariants": "remove it: the invariants are checked on every run"}
"""Keys that are gone, and why."""

FORMER = {**{key: f"it is called {present} now" for key, present in RENAMED.items()}, **REMOVED}
"""What to say of a key that was valid once."""
