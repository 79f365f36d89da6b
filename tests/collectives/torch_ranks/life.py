"""How process groups of backend="launcher" begin and end. Run on two ranks."""

import gc
import itertools
import os

import torch
import torch.distributed as dist
from checks import check, main

COUNT = itertools.count()


def begin(backend: str = "launcher") -> None:
    """A store for each time: torch's own would be met by a rank that is ahead before the last one is gone."""
    store = dist.FileStore(f"store.{next(COUNT)}", 2)
    dist.init_process_group(backend, store=store, rank=int(os.environ["RANK"]), world_size=2)


def total(group: dist.ProcessGroup | None = None) -> float:
    tensor = torch.full((9000,), float(dist.get_rank() + 1))
    dist.all_reduce(tensor, group=group)
    assert tensor.eq(tensor[0]).all()
    return tensor[0].item()


@check
def comes_and_goes() -> None:
    for _ in range(3):
        begin()
        assert total() == 3
        second = dist.new_group()
        assert total(second) == 3
        dist.destroy_process_group(second)
        assert total() == 3
        dist.destroy_process_group()
        assert not dist.is_initialized()


@check
def names_of_devices() -> None:
    begin("cpu:launcher,cuda:nccl")
    assert total() == 3
    assert dist.get_backend_config() == "cpu:launcher,cuda:nccl"
    gathered = [None, None]
    dist.all_gather_object(gathered, "x")
    assert gathered == ["x", "x"]
    dist.destroy_process_group()


@check
def work_that_nobody_waits_for_is_finished() -> None:
    begin()
    tensors = [torch.ones(50_000) for _ in range(20)]
    for tensor in tensors:
        dist.all_reduce(tensor, async_op=True)
    dist.destroy_process_group()
    for tensor in tensors:
        assert tensor.eq(2).all()


@check
def memory_of_the_pool_outlives_its_group() -> None:
    begin()
    group = dist.distributed_c10d._get_default_group()
    kept = group.pool.tensor(100_000, torch.float32)
    assert kept.storage_offset() == 0
    kept.fill_(dist.get_rank() + 1)
    dist.all_reduce(kept)
    address = kept.data_ptr()
    for _ in range(3):  # what one tensor leaves the next one takes
        other = group.pool.tensor(5000, torch.bfloat16)
        addresses = {other.data_ptr()}
        del other
    assert len(addresses) == 1
    dist.destroy_process_group()
    del group
    gc.collect()
    assert kept.data_ptr() == address
    assert kept.eq(3).all()
    kept.add_(1)
    assert kept.sum() == 400_000


@check
def a_forked_child_is_refused() -> None:
    begin()
    assert total() == 3
    child = os.fork()
    if child == 0:
        code = 1
        try:
            dist.all_reduce(torch.ones(1))
        except dist.DistBackendError as error:
            code = 0 if "fork" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert total() == 3
    dist.destroy_process_group()


@check
def calls_after_the_end_are_refused() -> None:
    begin()
    group = dist.distributed_c10d._get_default_group()
    dist.barrier()
    dist.destroy_process_group()
    for call in (lambda: group.allreduce([torch.ones(1)]), lambda: group.barrier().wait()):
        try:
            call()
        except dist.DistBackendError as error:
            assert error.reason == "closed", error
        else:
            raise AssertionError("was carried out")


if __name__ == "__main__":
    main(initialize=False)
