"""Copies between host memory and a GPU: what arrives is what was sent, whatever the shapes and strides."""

import contextlib
import threading
from unittest import mock

import pytest
import torch
from torch import nn

from shared.parallel import lanes

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
SHAPES = [(), (0, 3), (7,), (33, 5), (4, 3, 2, 5), (1, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_goes_through_staging_arrives(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """There and back, in parts smaller and larger than the tensor, none of them a multiple of it."""
    source = torch.randn(shape).mul(100).to(dtype)
    for chunk in (1, 24, 1 << 12):
        staging = lanes.Staging(DEVICE, chunk)
        for _ in range(2):  # the second begins with the other half
            there, back = torch.zeros_like(source, device=DEVICE), torch.zeros_like(source)
            staging.send(*lanes._bytes_in_order(there, source))
            staging.fetch(*lanes._bytes_in_order(back, there))
            assert torch.equal(there.cpu(), source)
            assert torch.equal(back, source)


@pytest.mark.parametrize(
    "source",
    [
        torch.arange(24).view(2, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        torch.arange(24).view(4, 6).t(),
        torch.arange(24).view(4, 6)[:, 1:5],
        torch.arange(6).expand(3, 6),
        torch.arange(24)[8:],
    ],
    ids=["by pixels", "transposed", "cut out", "expanded", "from the middle"],
)
def test_strides_do_not_matter(source: torch.Tensor) -> None:
    """The order in memory is the target's, of a source that has another too."""
    for into in (torch.zeros_like(source), torch.zeros(source.shape, dtype=source.dtype)):
        lanes.Staging(DEVICE, 40).send(*lanes._bytes_in_order(into, source))
        assert torch.equal(into, source)


def test_a_target_with_gaps_is_refused() -> None:
    """Bytes between its elements would be overwritten."""
    into = torch.zeros(4, 6)[:, 1:5]
    with pytest.raises(ValueError, match="one piece"):
        lanes._bytes_in_order(into, torch.zeros(4, 4))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_a_moved_model_is_the_same() -> None:
    """As Module.to: tied weights stay tied, buffers come too, and layouts stay."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False), nn.BatchNorm2d(9))
    model.append(conv := nn.Conv2d(9, 4, 3)).requires_grad_(False)
    conv.weight.data = conv.weight.data.to(memory_format=torch.channels_last)
    model[1].weight = model[0].weight
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lanes.move(model, DEVICE)
    assert model[1].weight is model[0].weight
    for name, tensor in model.state_dict().items():
        assert tensor.device == DEVICE and tensor.stride() == expected[name].stride()
        assert torch.equal(tensor.cpu(), expected[name])


@pytest.mark.parametrize("inference", [False, True])
def test_threads_are_in_the_callers_mode(inference: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor made in inference mode may be written to only in it, and the mode is each thread's own."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(torch.cuda, "current_stream", mock.Mock())
        monkeypatch.setattr(torch.cuda, "Stream", mock.Mock())
        monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(lanes.os, "cpu_count", lambda: 8)
    names: set[str] = set()

    def fill(into: torch.Tensor) -> None:
        into.copy_(torch.ones(3))
        names.add(threading.current_thread().name)

    with torch.inference_mode(inference):
        made = [torch.zeros(3) for _ in range(12)]
        lanes.side_by_side(fill, made, torch.device("cuda", 0))
    assert threading.current_thread().name not in names
    assert all(tensor.sum() == 3 for tensor in made)
