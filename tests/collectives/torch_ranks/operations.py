"""Every call of torch.distributed on backend="launcher" beside the same call on Gloo. Run on two or more ranks."""

import datetime
import itertools
import warnings

import torch
import torch.distributed as dist
from checks import check, main, same

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int8, torch.uint8, torch.int32, torch.int64)
SIZES = (0, 1, 7, 1000, 50_001)


def rank() -> int:
    return dist.get_rank()


def size() -> int:
    return dist.get_world_size()


def values(count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Small whole numbers, another set on each rank: their sums are exact in every type."""
    numbers = torch.Generator().manual_seed(1000 * seed + rank())
    return torch.randint(1, 5, (count,), generator=numbers).to(dtype)


_gloo = None


def gloo() -> dist.ProcessGroup:
    global _gloo
    if _gloo is None:
        _gloo = dist.new_group(backend="gloo")
    return _gloo


@check
def the_group_is_ours() -> None:
    from launcher.collectives.torch_backend import LauncherProcessGroup

    group = dist.distributed_c10d._get_default_group()
    assert isinstance(group, LauncherProcessGroup)
    assert dist.get_backend() == "launcher"
    assert group.name() == "launcher"
    assert (group.rank(), group.size()) == (rank(), size())
    assert dist.is_backend_available("launcher")
    assert group.group_name == "0"


@check
def all_reduce() -> None:
    operations = {
        dist.ReduceOp.SUM: FLOATS + INTEGERS,
        dist.ReduceOp.MIN: FLOATS + INTEGERS,
        dist.ReduceOp.MAX: FLOATS + INTEGERS,
        dist.ReduceOp.PRODUCT: FLOATS + INTEGERS,
        dist.ReduceOp.BAND: INTEGERS,
        dist.ReduceOp.BOR: INTEGERS,
        dist.ReduceOp.BXOR: INTEGERS,
    }
    for op, dtypes in operations.items():
        for dtype, count in itertools.product(dtypes, SIZES):
            ours = values(count, dtype)
            theirs = ours.clone()
            if count % 2:
                dist.all_reduce(ours, op)
            else:
                work = dist.all_reduce(ours, op, async_op=True)
                work.wait()
                assert work.is_completed() and work.is_success() and work.exception() is None
                assert work.result()[0].data_ptr() == ours.data_ptr()
            dist.all_reduce(theirs, op, group=gloo())
            same(ours, theirs, f"{op} {dtype} {count}")


@check
def random_sums_of_two_ranks_have_gloos_bits() -> None:
    torch.manual_seed(rank())
    for dtype, count in itertools.product(FLOATS, (3, 5_000, 300_000)):
        ours = torch.randn(count).to(dtype)
        theirs = ours.clone()
        dist.all_reduce(ours)
        dist.all_reduce(theirs, group=gloo())
        if size() == 2:
            same(ours, theirs, f"{dtype}")
        else:  # another order of the same sum, and for 16 bits fewer roundings
            steps = size() * torch.finfo(dtype).eps
            assert torch.allclose(ours.double(), theirs.double(), rtol=steps, atol=4 * size() * steps), dtype
        everybody = [torch.empty_like(ours) for _ in range(size())]
        dist.all_gather(everybody, ours)
        for other in everybody:
            same(other, ours, "bits on all ranks")


@check
def average_and_premultiplied_sum() -> None:
    for dtype in FLOATS:
        tensor = values(33, dtype)
        total = tensor.clone()
        dist.all_reduce(total, group=gloo())
        average = tensor.clone()
        dist.all_reduce(average, dist.ReduceOp.AVG)
        assert torch.allclose(average.double(), total.double() / size(), rtol=torch.finfo(dtype).eps), dtype
        scaled = tensor.clone()
        dist.all_reduce(scaled, dist._make_nccl_premul_sum(0.5) if hasattr(dist, "_make_nccl_premul_sum") else half())
        same(scaled, (total.double() * 0.5).to(dtype), f"PREMUL_SUM {dtype}")
    whole = values(9, torch.int32)
    total = whole.clone()
    dist.all_reduce(total, group=gloo())
    dist.all_reduce(whole, dist.ReduceOp.AVG)
    same(whole, torch.div(total, size(), rounding_mode="trunc").int(), "AVG int32")


def half() -> dist.ReduceOp:
    from torch.distributed.distributed_c10d import _make_nccl_premul_sum

    return _make_nccl_premul_sum(0.5)


@check
def bools() -> None:
    flags = torch.tensor([rank() == 0, True, False])
    dist.all_reduce(flags, dist.ReduceOp.SUM)
    assert flags.tolist() == [True, True, False]
    flags = torch.tensor([rank() == 0, True, False])
    dist.all_reduce(flags, dist.ReduceOp.MIN)
    assert flags.tolist() == [False, True, False]


@check
def tensors_with_gaps() -> None:
    for make in (
        lambda t: t.view(10, 20).t(),
        lambda t: t.view(20, 10)[:, ::2],
        lambda t: t.view(2, 5, 4, 5).to(memory_format=torch.channels_last),
    ):
        ours = make(values(200, torch.float32))
        theirs = make(values(200, torch.float32)).contiguous()
        strides = ours.stride()
        dist.all_reduce(ours)
        dist.all_reduce(theirs, group=gloo())
        assert ours.stride() == strides
        same(ours.contiguous(), theirs, "all_reduce")
        dist.broadcast(ours, size() - 1)
        dist.broadcast(theirs, size() - 1, group=gloo())
        same(ours.contiguous(), theirs, "broadcast")
    wide = torch.zeros(size() * 12)[::2]
    dist.all_gather_into_tensor(wide, values(6, torch.float32))
    narrow = torch.zeros(size() * 6)
    dist.all_gather_into_tensor(narrow, values(6, torch.float32), group=gloo())
    same(wide.contiguous(), narrow, "all_gather_into_tensor")


@check
def parameters_that_want_gradients() -> None:
    parameter = torch.nn.Parameter(torch.full((3, 4), float(rank())).t())
    dist.broadcast(parameter.data, 1)
    assert parameter.eq(1).all()
    with torch.no_grad():
        dist.all_reduce(parameter)
    assert parameter.eq(size()).all() and parameter.requires_grad


@check
def broadcast_of_any_type() -> None:
    kinds = [*FLOATS, *INTEGERS, torch.bool, torch.complex64, torch.complex128, torch.int16]
    kinds += [getattr(torch, name) for name in ("float8_e4m3fn", "uint16", "uint32") if hasattr(torch, name)]
    for dtype, root in itertools.product(kinds, range(size())):
        tensor = torch.full((37,), rank() + 1).to(dtype)
        work = dist.broadcast(tensor, root, async_op=True)
        work.wait()
        expected = torch.full((37,), root + 1).to(dtype)
        same(tensor.view(torch.uint8), expected.view(torch.uint8), f"{dtype} from {root}")


@check
def reduce() -> None:
    for root in range(size()):
        ours, theirs = values(1001, torch.float32), values(1001, torch.float32)
        dist.reduce(ours, root)
        dist.reduce(theirs, root, group=gloo())
        if rank() == root:
            same(ours, theirs)
        else:
            same(ours, values(1001, torch.float32), "untouched")


@check
def all_gather() -> None:
    for dtype, count in itertools.product((torch.float32, torch.int64, torch.bool, torch.complex64), (0, 1, 999)):
        tensor = values(count, dtype)
        ours, theirs = ([torch.zeros_like(tensor) for _ in range(size())] for _ in range(2))
        dist.all_gather(ours, tensor)
        dist.all_gather(theirs, tensor, group=gloo())
        same(ours, theirs, f"{dtype} {count}")
    whole = torch.zeros(size() * 5)
    dist.all_gather(list(whole.split(5)), values(5, torch.float32))  # outputs that lie in a row
    theirs = torch.zeros(size() * 5)
    dist.all_gather_into_tensor(theirs, values(5, torch.float32), group=gloo())
    same(whole, theirs, "in a row")
    part = whole.zero_()[rank() * 5 :][:5]
    part.copy_(values(5, torch.float32))
    dist.all_gather_into_tensor(whole, part)
    same(whole, theirs, "in place")
    uneven = [torch.zeros(number + 1) for number in range(size())]
    dist.all_gather(uneven, torch.full((rank() + 1,), float(rank())))
    assert [tensor.tolist() for tensor in uneven] == [[float(number)] * (number + 1) for number in range(size())]


@check
def reduce_scatter() -> None:
    for dtype, count in itertools.product((torch.float32, torch.bfloat16, torch.int64), (1, 777)):
        tensor = values(count * size(), dtype)
        ours, theirs = tensor.new_zeros(count), tensor.new_zeros(count)
        dist.reduce_scatter_tensor(ours, tensor)
        dist.all_reduce(tensor, group=gloo())
        theirs.copy_(tensor[rank() * count :][:count])
        same(ours, theirs, f"{dtype} {count}")
    parts = [torch.full((number + 1,), float(rank())) for number in range(size())]
    own = torch.zeros(rank() + 1)
    dist.reduce_scatter(own, parts)
    assert own.tolist() == [float(sum(range(size())))] * (rank() + 1)
    own = torch.zeros(2)
    dist.reduce_scatter(own, [torch.full((2,), float(rank() + number)) for number in range(size())], dist.ReduceOp.MAX)
    assert own.tolist() == [float(size() - 1 + rank())] * 2
    mean = torch.zeros(3)
    dist.reduce_scatter_tensor(mean, torch.full((3 * size(),), float(rank())), dist.ReduceOp.AVG)
    assert torch.allclose(mean, torch.full((3,), (size() - 1) / 2))


@check
def scatter_and_gather() -> None:
    for dtype, root in itertools.product((torch.float32, torch.int8, torch.complex64), range(size())):
        parts = [torch.full((5,), 10 * rank() + number).to(dtype) for number in range(size())]
        own = torch.zeros(5, dtype=dtype)
        dist.scatter(own, parts if rank() == root else None, src=root)
        assert own.eq(10 * root + rank()).all()
        gathered = [torch.zeros(5, dtype=dtype) for _ in range(size())] if rank() == root else None
        dist.gather(parts[0], gathered, dst=root)
        for number, tensor in enumerate(gathered or ()):
            assert tensor.eq(10 * number).all()


@check
def all_to_all() -> None:
    tensor = torch.arange(4.0 * size()).view(2 * size(), 2) + 100 * rank()
    ours = torch.zeros_like(tensor)
    dist.all_to_all_single(ours, tensor)
    expected = [
        torch.arange(4.0 * size()).view(2 * size(), 2)[2 * rank() :][:2] + 100 * other for other in range(size())
    ]
    same(ours, torch.cat(expected))
    sent = [rank() + number for number in range(size())]
    received = [number + rank() for number in range(size())]
    uneven = torch.zeros(sum(received), 3)
    source = torch.cat([torch.full((count, 3), float(10 * rank() + number)) for number, count in enumerate(sent)])
    dist.all_to_all_single(uneven, source, received, sent)
    same(
        uneven,
        torch.cat([torch.full((count, 3), float(10 * number + rank())) for number, count in enumerate(received)]),
    )
    outputs = [torch.zeros(number + rank() + 1) for number in range(size())]
    dist.all_to_all(outputs, [torch.full((number + rank() + 1,), float(rank())) for number in range(size())])
    for number, output in enumerate(outputs):
        assert output.eq(number).all()


@check
def barrier() -> None:
    dist.barrier()
    dist.barrier(async_op=True).wait()
    if "timeout" in dist.barrier.__code__.co_varnames:
        dist.barrier(timeout=datetime.timedelta(seconds=20))


@check
def point_to_point() -> None:
    right, left = (rank() + 1) % size(), (rank() - 1) % size()
    tensor = torch.full((4,), float(rank()))
    got = torch.zeros(4)
    operations = [dist.P2POp(dist.isend, tensor, right), dist.P2POp(dist.irecv, got, left)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    assert got.eq(left).all()
    if rank() == 0:
        dist.send(torch.ones(3), 1)
        dist.isend(torch.ones(3), 1, tag=7).wait()
    elif rank() == 1:
        assert dist.recv(torch.zeros(3)) == 0
        tagged = torch.zeros(3)
        dist.irecv(tagged, 0, tag=7).wait()
        assert tagged.eq(1).all()
    objects = [{"rank": rank()}]
    if rank() == 0:
        dist.send_object_list(objects, 1)
    elif rank() == 1:
        received = [None]
        dist.recv_object_list(received, 0)
        assert received == [{"rank": 0}]


@check
def objects() -> None:
    gathered = [None] * size()
    dist.all_gather_object(gathered, {"rank": rank(), "text": "x" * rank()})
    assert gathered == [{"rank": number, "text": "x" * number} for number in range(size())]
    sent = [rank(), "word"]
    dist.broadcast_object_list(sent, src=1)
    assert sent == [1, "word"]
    own = [None]
    dist.scatter_object_list(own, [f"for {number}" for number in range(size())] if rank() == 0 else None, src=0)
    assert own == [f"for {rank()}"]
    collected = [None] * size() if rank() == 0 else None
    dist.gather_object(rank(), collected, dst=0)
    assert collected in (None, list(range(size())))


@check
def what_gloo_carries() -> None:
    sparse = torch.sparse_coo_tensor([[rank()]], [1.0], (size(),), check_invariants=True)
    dist.all_reduce(sparse)
    assert sparse.to_dense().tolist() == [1.0] * size()
    numbers = torch.full((3,), complex(rank(), 1))
    dist.all_reduce(numbers)
    assert numbers.eq(complex(sum(range(size())), size())).all()
    dist.distributed_c10d._get_default_group().monitored_barrier(datetime.timedelta(seconds=20))


@check
def many_at_once() -> None:
    """Asynchronous calls are carried out in order, whoever waits for which first."""
    tensors = [torch.full((1000 + number,), float(rank() + number)) for number in range(30)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    last = torch.ones(5)
    dist.all_reduce(last)  # comes after all of them
    assert all(work.is_completed() for work in works)
    works[-1].wait(datetime.timedelta(seconds=20))
    for number, tensor in enumerate(tensors):
        assert tensor.eq(sum(range(size())) + number * size()).all()
    assert last.eq(size()).all()


@check
def futures() -> None:
    tensor = torch.ones(10)
    work = dist.all_reduce(tensor, async_op=True)
    doubled = work.get_future().then(lambda future: future.value()[0] * 2)
    assert doubled.wait().eq(2 * size()).all()
    assert work.get_future().done()


@check
def an_asynchronous_call_does_not_block() -> None:
    """Works of different groups wait for the other ranks without each other."""
    second = dist.new_group()
    a, b = torch.ones(3), torch.ones(3)
    if rank() == 0:
        work = dist.all_reduce(a, async_op=True)
        dist.all_reduce(b, group=second)
        work.wait()
    else:
        dist.all_reduce(b, group=second)
        dist.all_reduce(a)
    assert a.eq(size()).all() and b.eq(size()).all()
    dist.destroy_process_group(second)


@check
def coalesced() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated names are what is tested
        tensors = [values(count, torch.float32) for count in (3, 400, 50_000)]
        expected = [tensor.clone() for tensor in tensors]
        with dist._coalescing_manager():
            for tensor in tensors:
                dist.all_reduce(tensor)
        for tensor in expected:
            dist.all_reduce(tensor, group=gloo())
        same(tensors, expected, "all_reduce")
        with dist._coalescing_manager(async_ops=True) as manager:
            for tensor in tensors:
                dist.all_reduce(tensor)
        manager.wait()
        dist.all_reduce_coalesced(expected)
        same(tensors, expected, "again")
        outputs = [torch.zeros(size() * count) for count in (3, 5)]
        with dist._coalescing_manager():
            for output in outputs:
                dist.all_gather_into_tensor(output, torch.full((output.numel() // size(),), float(rank())))
        for output in outputs:
            same(output.view(size(), -1)[:, 0], torch.arange(float(size())), "all_gather")
        with dist._coalescing_manager(device=torch.device("cpu"), async_ops=True) as manager:
            dist.broadcast(tensors[0], 0)
        manager.wait()
        dist.all_gather_coalesced(
            [[torch.zeros(2), torch.zeros(3)] for _ in range(size())], [torch.ones(2), torch.ones(3)]
        )


@check
def functional() -> None:
    import torch.distributed._functional_collectives as funcol

    group = dist.group.WORLD
    tensor = values(64 * size(), torch.float32)
    total = tensor.clone()
    dist.all_reduce(total, group=gloo())
    same(funcol.all_reduce(tensor, "sum", group).clone(), total, "all_reduce")
    gathered = funcol.all_gather_tensor(tensor, 0, group).clone()
    expected = torch.zeros(size() * tensor.numel())
    dist.all_gather_into_tensor(expected, tensor, group=gloo())
    same(gathered, expected, "all_gather_tensor")
    part = funcol.reduce_scatter_tensor(tensor, "sum", 0, group).clone()
    same(part, total.view(size(), -1)[rank()], "reduce_scatter_tensor")
    same(funcol.broadcast(tensor, 0, group).clone(), expected.view(size(), -1)[0], "broadcast")
    several = funcol.all_reduce_coalesced([tensor, tensor * 2], "sum", group)
    same([each.clone() for each in several], [total, total * 2], "all_reduce_coalesced")
    exchanged = funcol.all_to_all_single(tensor, None, None, group).clone()
    theirs = torch.zeros_like(tensor)
    dist.all_to_all_single(theirs, tensor, group=gloo())
    same(exchanged, theirs, "all_to_all_single")


@check
def subgroups() -> None:
    for members in ([0], [1, 0], list(range(size()))):
        group = dist.new_group(members)
        if rank() in members:
            assert dist.get_backend(group) == "launcher"
            tensor = torch.ones(3) * rank()
            dist.all_reduce(tensor, group=group)
            assert tensor.eq(sum(members)).all()
            if len(members) > 1:
                dist.broadcast(tensor.fill_(rank()), max(members), group=group)
                assert tensor.eq(max(members)).all()
            dist.destroy_process_group(group)
    alone, groups = dist.new_subgroups(1)
    dist.all_reduce(torch.ones(1), group=alone)
    assert len(groups) == size()
    whole = dist.distributed_c10d._get_default_group()
    part = whole.split_group([0])
    assert (part is None) == (rank() != 0)
    if part is not None:
        part.allreduce([torch.ones(2)]).wait()
        part.shutdown()
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, size()), mesh_dim_names=("a", "b"))
    total = torch.ones(2)
    dist.all_reduce(total, group=mesh.get_group("b"))
    assert total.eq(size()).all()


@check
def dtensor() -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    mesh = dist.device_mesh.init_device_mesh("cpu", (size(),))
    whole = torch.arange(8.0 * size() * 3).view(8 * size(), 3)
    sharded = distribute_tensor(whole, mesh, [Shard(0)])
    same(sharded.redistribute(mesh, [Replicate()]).to_local(), whole, "replicate")
    # to_local of an array that was exchanged by all-to-all
    columns = distribute_tensor(torch.arange(6.0 * size() * size()).view(6 * size(), size()), mesh, [Shard(0)])
    same(columns.redistribute(mesh, [Shard(1)]).full_tensor(), columns.full_tensor(), "all to all")
    partial = torch.distributed.tensor.DTensor.from_local(torch.ones(4), mesh, [Partial()])
    assert partial.full_tensor().eq(size()).all()
    product = distribute_tensor(torch.ones(4 * size(), 4), mesh, [Shard(0)]) @ distribute_tensor(
        torch.eye(4), mesh, [Replicate()]
    )
    assert product.full_tensor().eq(1).all()


@check
def direct_calls() -> None:
    """The short forms that torch's own ProcessGroup takes."""
    group = dist.distributed_c10d._get_default_group()
    tensor = torch.ones(3)
    group.allreduce(tensor).wait()
    group.allreduce([tensor], dist.ReduceOp.MAX).wait()
    group.allreduce([tensor], op=dist.ReduceOp.MIN).wait()
    assert tensor.eq(size()).all()
    group.broadcast(tensor.fill_(rank()), 1).wait()
    assert tensor.eq(1).all()
    group.reduce(tensor, 0, dist.ReduceOp.SUM).wait()
    outputs = [torch.zeros(3) for _ in range(size())]
    group.allgather(outputs, torch.full((3,), float(rank()))).wait()
    assert outputs[1].eq(1).all()
    group._allgather_base(torch.zeros(size() * 3), torch.ones(3)).wait()
    group.barrier().wait()


@check
def wrong_arguments_are_refused_before_anybody_waits() -> None:
    for call in (
        lambda: dist.all_gather_into_tensor(torch.zeros(3), torch.zeros(3)),
        lambda: dist.all_gather_into_tensor(torch.zeros(3 * size()), torch.zeros(3, dtype=torch.int32)),
        lambda: dist.reduce_scatter_tensor(torch.zeros(3), torch.zeros(3)),
        lambda: dist.all_to_all_single(torch.zeros(4), torch.zeros(4), [1] * size(), [1] * size()),
    ):
        try:
            call()
        except (ValueError, RuntimeError):
            continue
        raise AssertionError("was taken")
    dist.barrier()


@check
def the_core_did_it() -> None:
    calls = dist.distributed_c10d._get_default_group().statistics()["calls"]
    assert calls["small"] > 0 and calls["pipelined"] + calls["shared"] + calls["pulled"] > 0, calls


if __name__ == "__main__":
    main()
