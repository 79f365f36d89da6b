"""Packing, unpacking and compression on a GPU, against torch's own arithmetic."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.collectives.elements import DType

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

TYPES = (DType.float32, DType.float16, DType.bfloat16)


def gradients(dtype: Any, sizes: list[int], shift: int) -> list[Any]:
    """Tensors of random values, ``shift`` elements off a boundary."""
    import torch

    generator = torch.Generator("cuda").manual_seed(3)
    return [
        torch.randn(size + shift, device="cuda", generator=generator).mul_(100.0).to(dtype)[shift:] for size in sizes
    ]


def same_bits(first: Any, second: Any) -> bool:
    import torch

    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


@pytest.mark.parametrize("tensor_dtype", TYPES)
@pytest.mark.parametrize("bucket_dtype", TYPES)
@pytest.mark.parametrize("dense", [False, True])
def test_pack_and_unpack(tensor_dtype: DType, bucket_dtype: DType, dense: bool) -> None:
    import torch

    from launcher.collectives.cuda import GradientBucket

    outer, inner = getattr(torch, tensor_dtype.name), getattr(torch, bucket_dtype.name)
    sizes = [1, 3, 0, 8, 1000, 32768, 32769, 200_001, 17] + [5] * 1300  # more tensors than a launch takes
    for shift in (0, 1):
        tensors = gradients(outer, sizes, shift)
        bucket = GradientBucket(tensors, bucket_dtype, dense=dense)
        packed = torch.zeros(bucket.count + 16, dtype=inner, device="cuda")
        bucket.pack(tensors, packed, 0.125)
        for tensor, offset in zip(tensors, bucket.offsets, strict=True):
            want = (tensor.float() * 0.125).to(inner)
            assert same_bits(packed[offset : offset + tensor.numel()], want)
        assert not packed[bucket.count :].any()
        targets = [torch.zeros_like(tensor) for tensor in tensors]
        bucket.unpack(packed, targets, 4.0)
        for target, tensor, offset in zip(targets, tensors, bucket.offsets, strict=True):
            want = (packed[offset : offset + tensor.numel()].float() * 4.0).to(outer)
            assert same_bits(target, want)


def test_a_graph_replays_pack_with_new_values() -> None:
    import torch

    from launcher.collectives.cuda import GradientBucket

    tensors = gradients(torch.float32, [1000, 70_000, 33], 0)
    bucket = GradientBucket(tensors, DType.bfloat16)
    packed = torch.zeros(bucket.count, dtype=torch.bfloat16, device="cuda")
    bucket.pack(tensors, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bucket.pack(tensors, packed)
        bucket.unpack(packed, tensors, 0.5)
    for tensor in tensors:
        tensor.fill_(3.0)
    graph.replay()
    torch.cuda.synchronize()
    assert all(bool((tensor == 1.5).all()) for tensor in tensors)


def test_what_does_not_fit_is_refused() -> None:
    import torch

    from launcher.collectives.cuda import GradientBucket

    tensors = gradients(torch.float32, [10, 20], 0)
    bucket = GradientBucket(tensors)
    packed = torch.zeros(bucket.count, device="cuda")
    with pytest.raises(ValueError, match="tensors: 1; expected 2"):
        bucket.pack(tensors[:1], packed)
    with pytest.raises(ValueError, match=r"tensors\[1\]: 5 of float32"):
        bucket.pack([tensors[0], tensors[1][:5]], packed)
    with pytest.raises(ValueError, match="bucket: 10 of float32"):
        bucket.pack(tensors, packed[:10])
    with pytest.raises(ValueError, match="strides"):
        GradientBucket([torch.zeros(4, 4, device="cuda").t()])
    with pytest.raises(TypeError, match="on cpu"):
        GradientBucket([torch.zeros(4)])


@pytest.mark.parametrize("wire", [DType.float16, DType.bfloat16])
@pytest.mark.parametrize("shift", [0, 1])
def test_the_error_is_kept(wire: DType, shift: int) -> None:
    import torch

    from launcher.collectives.cuda import Compressor

    inner = getattr(torch, wire.name)
    for count in (1, 5, 8192, 100_003):
        error = torch.zeros(count, device="cuda")
        compressor = Compressor(wire, error)
        kept = torch.zeros(count, device="cuda")
        target = torch.zeros(count + shift, dtype=inner, device="cuda")[shift:]
        for round_number in range(3):
            generator = torch.Generator("cuda").manual_seed(round_number)
            source = torch.randn(count + shift, device="cuda", generator=generator).mul_(3e4)[shift:]
            compressor.compress(source, target)
            value = source + kept
            sent = (value.clamp(-65504.0, 65504.0) if wire == DType.float16 else value).to(inner)
            kept = value - sent.float()
            assert same_bits(target, sent)
            assert same_bits(error, kept)
        back = torch.zeros(count, device="cuda")
        compressor.decompress(target, back)
        assert same_bits(back, target.float())


def test_no_number_stays_in_the_error() -> None:
    import torch

    from launcher.collectives.cuda import Compressor

    source = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e9, 1.0], device="cuda")
    error = torch.zeros(5, device="cuda")
    target = torch.zeros(5, dtype=torch.float16, device="cuda")
    Compressor(DType.float16, error).compress(source, target)
    assert bool(torch.isnan(target[0]))
    assert target[1:].tolist() == [float("inf"), -float("inf"), 65504.0, 1.0]
    assert error.tolist() == [0.0, 0.0, 0.0, 1e9 - 65504.0, 0.0]
