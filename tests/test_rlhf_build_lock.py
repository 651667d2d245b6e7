"""The lock of a killed build is removed, that of a living one is waited for, and nothing else is touched."""

import os
import threading
import time

import pytest

from rlhf.errors import UserError
from rlhf.runs.stage import processes
from rlhf.training import kernel_lock as build_lock
from rlhf.training.kernel_lock import settle_locks

HOUR = 3600.0


@pytest.fixture(params=["named", "cache", "home"])
def root(request, tmp_path, monkeypatch):
    """Where torch keeps the extensions, as its three ways to say so have it."""
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if request.param == "named":
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "named"))
        return tmp_path / "named"
    if request.param == "cache":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return tmp_path / "cache" / "torch_extensions" / "py311_cpu"
    return tmp_path / "home" / ".cache" / "torch_extensions" / "py312_cu126"


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


def written(file, ago):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    os.utime(file, (time.time() - ago,) * 2)
    return file


def test_the_lock_of_a_dead_build_goes_and_is_told(root):
    lock = written(root / "deepspeed_shm_comm" / "lock", HOUR)
    other = written(lock.with_name("shm.o"), 2 * HOUR)
    said = []
    settle_locks(said.append)
    assert not lock.exists()
    assert other.exists()
    assert said == [f"deepspeed: removed {lock}, left by a build that was killed (60 min ago)"]
    settle_locks(said.append)
    assert len(said) == 1


def test_without_a_lock_nothing_is_said(root):
    settle_locks(pytest.fail)
    built = written(root / "deepspeed_shm_comm" / "deepspeed_shm_comm.so", HOUR)
    settle_locks(pytest.fail)
    assert built.exists()


def test_the_locks_of_others_are_none_of_our_business(kernels):
    lock = written(kernels / "my_kernel" / "lock", HOUR)
    settle_locks(pytest.fail)
    assert lock.exists()


@pytest.mark.parametrize("young", ["lock", "shm.o"])
def test_a_living_build_is_waited_for_and_its_lock_named(kernels, young):
    folder = kernels / "deepspeed_shm_comm"
    for name in ("lock", "shm.o"):
        written(folder / name, 0 if name == young else HOUR)
    lock, said = folder / "lock", []
    waiting = threading.Thread(target=settle_locks, args=(said.append,), kwargs={"poll_seconds": 0.01})
    waiting.start()
    time.sleep(0.15)
    assert lock.exists()
    assert waiting.is_alive()
    assert len(said) == 1
    assert said[0].startswith(
        f"deepspeed: waiting for the build in {folder}; if none is running, remove {lock} "
    )
    lock.unlink()
    waiting.join(timeout=5)
    assert not waiting.is_alive()
    assert len(said) == 1


def test_one_process_tells_that_all_wait(kernels, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    written(kernels / "deepspeed_shm_comm" / "lock", 0)
    said = []
    settle_locks(said.append, quiet_seconds=0.1, poll_seconds=0.01)
    assert [line.split()[1] for line in said] == ["removed"]


def test_a_build_that_dies_while_it_is_waited_for_is_not_waited_for_for_ever(kernels):
    lock, said = written(kernels / "deepspeed_shm_comm" / "lock", 0), []
    settle_locks(said.append, quiet_seconds=0.1, poll_seconds=0.01)
    assert not lock.exists()
    assert [line.split()[1] for line in said] == ["waiting", "removed"]


def test_two_at_once_remove_one_dead_lock_once_and_never_a_new_one(kernels, monkeypatch):
    """Whoever comes first builds at once; the other has seen the old lock and must not take the new one."""
    folder = kernels / "deepspeed_shm_comm"
    quiet_for = build_lock._quiet_for
    together = threading.Barrier(2)

    def slowly(place):
        age = quiet_for(place)
        time.sleep(0.02)  # time for the other to remove the lock and to begin a build
        return age

    monkeypatch.setattr(build_lock, "_quiet_for", slowly)
    for _ in range(10):
        lock, said, builds = written(folder / "lock", HOUR), [], []

        def start(lock=lock, said=said, builds=builds):
            together.wait()
            settle_locks(said.append, poll_seconds=0.005)
            try:  # as torch does
                os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            time.sleep(0.08)
            builds.append(lock.exists())  # nobody took it
            lock.unlink(missing_ok=True)

        both = [threading.Thread(target=start) for _ in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join(timeout=10)
        assert builds
        assert all(builds)
        assert sum("removed" in line for line in said) == 1


def test_a_lock_that_cannot_be_removed_is_an_error_that_names_it(kernels, monkeypatch):
    lock = written(kernels / "deepspeed_shm_comm" / "lock", HOUR)

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(lock), "unlink", refused)
    with pytest.raises(UserError) as caught:
        settle_locks(print)
    assert str(caught.value).startswith(
        f"{lock} was left by a killed build and cannot be removed (Permission d"
    )


def test_several_processes_settle_the_locks_before_deepspeed_is_used(kernels, monkeypatch, capsys):
    from rlhf.recipe.schema import Distributed
    from rlhf.training import runtime

    class Reached(Exception):
        pass

    def deepspeed(*_, **__):
        assert not lock.exists()
        raise Reached

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")  # set by what is tested; so it is put back
    monkeypatch.setattr(runtime, "DeepSpeedPlugin", deepspeed)
    monkeypatch.setattr(runtime, "PartialState", deepspeed)
    monkeypatch.setattr(runtime.torch, "set_num_threads", lambda _: None)
    assert processes() == 2
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        for join in (
            lambda: runtime.Runtime(Distributed(), seed=0, max_grad_norm=1.0, micro_batch_size=1),
            lambda: runtime.join_cpu_processes(Distributed()),
        ):
            lock = written(kernels / "deepspeed_shm_comm" / "lock", HOUR)
            with pytest.raises(Reached):
                join()
            assert capsys.readouterr().out.count("deepspeed: removed") == 1
