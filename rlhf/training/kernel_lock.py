"""DeepSpeed's CPU kernel: built once by ``make setup``, and the lock that a killed build leaves behind.

While the kernel is built, a file ``lock`` lies in torch's extension folder and other processes wait for it to
go (``torch.utils.file_baton``). A build that is killed never removes it: every later start would hang.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from rlhf.errors import UserError

QUIET_SECONDS = 600.0  # a build that has written nothing for so long is dead; DeepSpeed's takes a minute


def check_kernel_lock() -> None:
    """Refuse to start under the lock of a dead build; call it before DeepSpeed is used.

    Raises:
        UserError: a lock beside which nothing was written for ten minutes, and the command that removes it.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in root.glob("**/deepspeed_*/lock"):
        newest = max((file.stat().st_mtime for file in lock.parent.iterdir()), default=time.time())
        if time.time() - newest > QUIET_SECONDS:
            raise UserError(f"{lock} was left by a build that was killed; run `rm {lock}`, then start again")


def main() -> None:
    """Build the kernel where a C++ compiler is; never fails, since one process alone needs none."""
    if not (shutil.which("c++") and shutil.which("ninja")) or os.environ.get("DS_ACCELERATOR") != "cpu":
        return
    print("building DeepSpeed's CPU kernel for several processes, about a minute ...", flush=True)
    try:
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

        check_kernel_lock()
        ShareMemCommBuilder().load(verbose=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        print(f"DeepSpeed's kernel was not built ({reason}); its first start tries again", flush=True)


if __name__ == "__main__":
    main()
