"""A dead build's lock of DeepSpeed's kernel is named before anything waits for it; building never fails."""

import os
import sys
import time
import types

import pytest

from rlhf.errors import UserError
from rlhf.recipe.schema import Distributed
from rlhf.training import kernel_lock
from rlhf.training.kernel_lock import check_kernel_lock

HOUR = 3600.0


@pytest.fixture(params=["named", "cache"])
def kernel(request, tmp_path, monkeypatch):
    """The build folder of the kernel, where either variable puts it."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    named = request.param == "named"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR" if named else "XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / ("" if named else "torch_extensions/py311_cpu") / "deepspeed_shm_comm"


def written(file, ago):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    os.utime(file, (time.time() - ago,) * 2)


def test_a_dead_builds_lock_is_named_with_the_command_that_removes_it(kernel):
    check_kernel_lock()
    written(kernel / "lock", HOUR)
    written(kernel / "shm.o", 2 * HOUR)
    with pytest.raises(UserError) as caught:
        check_kernel_lock()
    lock = kernel / "lock"
    assert (
        str(caught.value) == f"{lock} was left by a build that was killed; run `rm {lock}`, then start again"
    )


@pytest.mark.parametrize("young", ["lock", "shm.o"])
def test_a_living_build_is_left_alone(kernel, young):
    for name in ("lock", "shm.o"):
        written(kernel / name, 0 if name == young else HOUR)
    check_kernel_lock()
    assert (kernel / "lock").exists()


def test_several_processes_check_the_lock_before_deepspeed_is_used(kernel, monkeypatch):
    from rlhf.training import runtime

    monkeypatch.setenv("WORLD_SIZE", "2")
    written(kernel / "lock", HOUR)
    for join in (
        lambda: runtime.Runtime(Distributed(), seed=0, max_grad_norm=1.0, micro_batch_size=1),
        lambda: runtime.join_cpu_processes(Distributed()),
    ):
        with pytest.raises(UserError, match="left by a build that was killed"):
            join()


def test_a_build_that_fails_is_one_line_and_no_error(monkeypatch, capsys):
    class Builder:
        def load(self, verbose):
            raise RuntimeError("no header\nhere")

    builders = types.SimpleNamespace(ShareMemCommBuilder=Builder)
    monkeypatch.setitem(sys.modules, "deepspeed.ops.op_builder.cpu", builders)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(kernel_lock.shutil, "which", lambda name: name)
    monkeypatch.setattr(kernel_lock, "check_kernel_lock", lambda: None)
    kernel_lock.main()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("building DeepSpeed's CPU kernel")
    assert second == "DeepSpeed's kernel was not built (no header here); its first start tries again"
    monkeypatch.setattr(kernel_lock.shutil, "which", lambda name: None)
    kernel_lock.main()
    assert capsys.readouterr().out == ""
