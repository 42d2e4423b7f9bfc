"""What only a GPU shows: that work waits for the current stream, and that a CUDA graph replays it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_cuda_streams import inputs
from torch import Tensor

import hpa_ext
from hpa_ext import backend as backends

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

STEPS: dict[str, Callable[[SimpleNamespace, str], Any]] = {
    "accumulate_gram_": lambda t, b: hpa_ext.accumulate_gram_(t.gram, t.x, 0.5, backend=b),
    "accumulate_importance_": lambda t, b: hpa_ext.accumulate_importance_([t.importance], [t.grad], backend=b),
    "change_statistics": lambda t, b: hpa_ext.change_statistics(t.before, t.after, backend=b),
    "merge_": lambda t, b: hpa_ext.merge_(t.after, t.before, t.mask, 0.25, backend=b),
    "project_": lambda t, b: hpa_ext.project_([t.after], [t.basis], backend=b),
}
# These answer with Python numbers: they wait for the device, and no graph can capture that.
WAITING: dict[str, Callable[[SimpleNamespace, str], Any]] = {
    "orthonormalize_": lambda t, b: hpa_ext.orthonormalize_(t.after[:9], t.basis, backend=b),
    "inverse_diagonal": lambda t, b: hpa_ext.inverse_diagonal(t.gram, backend=b),
    "balanced_mask": lambda t, b: hpa_ext.balanced_mask(t.safety, t.task, 9, 20, backend=b),
}


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request: pytest.FixtureRequest) -> str:
    check = {"cuda": backends.cuda_trouble, "triton": lambda: backends.triton_trouble(torch.device("cuda", 0))}
    if trouble := check[request.param]():
        pytest.skip(f"{request.param} cannot run here: {trouble}")
    return request.param


def on_gpu(values: dict[str, Tensor]) -> SimpleNamespace:
    return SimpleNamespace(**{name: tensor.cuda() for name, tensor in values.items()})


def flat(answer: Any) -> list[Any]:
    """Tensors of a result, on the CPU, and its numbers."""
    items = answer if isinstance(answer, (tuple, list)) else [answer]
    return [item.cpu() if isinstance(item, Tensor) else item for item in items]


def assert_equal(left: list[Any], right: list[Any]) -> None:
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_work_waits_for_the_stream_that_made_its_inputs(gpu_backend: str) -> None:
    for name, step in (STEPS | WAITING).items():
        values, wanted = inputs(0), on_gpu(inputs(0))
        expected = flat(step(wanted, gpu_backend))
        after = {key: tensor.cpu() for key, tensor in vars(wanted).items()}
        torch.cuda.synchronize()
        late = SimpleNamespace(**{key: torch.zeros_like(tensor, device="cuda") for key, tensor in values.items()})
        source = on_gpu(values)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000_000)  # a tenth of a second; another stream would read zeros
            for key, tensor in vars(late).items():
                tensor.copy_(getattr(source, key))
            answer = step(late, gpu_backend)
        side.synchronize()
        assert_equal(flat(answer), expected)
        for key, tensor in vars(late).items():
            assert torch.equal(tensor.cpu().nan_to_num(), after[key].nan_to_num()), (name, key)


@pytest.mark.parametrize("name", STEPS)
def test_a_cuda_graph_replays_a_call(name: str, gpu_backend: str) -> None:
    held = on_gpu(inputs(0))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # Triton compiles and uploads its tables in a first call
        STEPS[name](held, gpu_backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = STEPS[name](held, gpu_backend)
    for seed in (50, 70):
        wanted = on_gpu(inputs(seed))
        for key, tensor in vars(held).items():
            tensor.copy_(getattr(wanted, key))
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(flat(answer), flat(STEPS[name](wanted, gpu_backend)))
        for key, tensor in vars(held).items():
            assert torch.equal(tensor, getattr(wanted, key)), key
