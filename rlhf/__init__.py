"""The ground that every stage stands on: recipes, data, dialogue, the shared base model, artifacts."""

import logging
import os
import warnings

NAME = "pairwright"
__version__ = "0.1.0"

# Nothing is sent anywhere: trainers of trl report usage to the hub unless told not to.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One progress bar a stage is enough; our own warnings are printed, those of libraries are not ours to mend.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DATASETS_VERBOSITY", "error")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
if not (os.path.exists("/dev/nvidia0") or os.path.exists("/dev/kfd")):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it found nothing else
for _library in ("transformers", "torch.distributed"):
    warnings.filterwarnings("ignore", category=FutureWarning, module=_library)
for _name in ("bitsandbytes", "DeepSpeed"):
    logging.getLogger(_name).setLevel(logging.ERROR)
