"""Which implementation runs, and what happens when the one that was asked for cannot."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

import hpa_ext
from hpa_ext import backend


@pytest.fixture
def fresh_lookup(checked_path: None) -> object:
    """Forgets the module that was found, before and after the test; direct calls have it from the import on."""
    backend.extension.cache_clear()
    yield
    backend.extension.cache_clear()


def test_the_device_decides_when_nothing_names_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.automatic(torch.device("cpu")) == "cpu"
    assert backend.automatic(torch.device("meta")) == "reference"
    for cuda, triton, serves in (
        (None, None, "cuda"),
        (None, "no compiler", "cuda"),
        ("not built", None, "triton"),
        ("not built", "no compiler", "reference"),
    ):
        monkeypatch.setattr(backend, "cuda_trouble", lambda why=cuda: why)
        monkeypatch.setattr(backend, "triton_trouble", lambda device, why=triton: why)
        assert backend.automatic(torch.device("cuda", 1)) == serves
    assert backend.select(None, torch.device("cpu")).merge_.__module__ == "hpa_ext.cpu"


def test_the_environment_forces_a_backend_and_the_argument_goes_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPA_BACKEND", "reference")
    assert backend.select(None, torch.device("cpu")).merge_.__module__ == "hpa_ext.reference"
    assert backend.select("cpu", torch.device("cpu")).merge_.__module__ == "hpa_ext.cpu"


def test_an_unknown_backend_raises_and_says_who_named_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="^backend: expected one of 'cpu', .*'reference', got 'metal'"):
        hpa_ext.change_statistics(torch.zeros(1, 1), torch.zeros(1, 1), backend="metal")
    monkeypatch.setenv("HPA_BACKEND", "numpy")
    with pytest.raises(ValueError, match="^HPA_BACKEND: expected one of .*, got 'numpy'"):
        hpa_ext.change_statistics(torch.zeros(1, 1), torch.zeros(1, 1))


def test_a_backend_that_does_not_serve_the_device_raises() -> None:
    with pytest.raises(ValueError, match="^backend: 'cpu' serves tensors on the CPU, got tensors on cuda:0"):
        backend.select("cpu", torch.device("cuda", 0))


def test_triton_says_why_it_cannot_run_and_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="^backend: 'triton' serves tensors on a GPU .*, got tensors on cpu"):
        hpa_ext.change_statistics(torch.zeros(1, 1), torch.zeros(1, 1), backend="triton")
    gpu = torch.device("cuda", 0)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(backend.shutil, "which", lambda name: None)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(hpa_ext.BackendError, match="^backend: 'triton' cannot run here: .* C compiler"):
        backend.select("triton", gpu)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("HPA_BACKEND", "triton")
    with pytest.raises(hpa_ext.BackendError, match="^HPA_BACKEND: 'triton' cannot run here: .*`pip install triton`"):
        backend.select(None, gpu)


def test_a_missing_module_raises_at_the_first_call_and_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, fresh_lookup: object
) -> None:
    monkeypatch.setitem(sys.modules, "hpa_ext._cpu", None)
    with pytest.raises(hpa_ext.BackendError, match=r"hpa_ext._cpu cannot be loaded .*`pip install \.`"):
        hpa_ext.change_statistics(torch.zeros(1, 1), torch.zeros(1, 1))
    assert hpa_ext.change_statistics(torch.zeros(1, 1), torch.ones(1, 1), backend="reference").change_norm_sq == 1


@pytest.mark.parametrize(("version", "interface"), [("0.0.9", backend.INTERFACE), (hpa_ext.__version__, 0)])
def test_a_module_of_another_version_is_refused(
    monkeypatch: pytest.MonkeyPatch, fresh_lookup: object, version: str, interface: int
) -> None:
    stale = ModuleType("hpa_ext._cpu")
    stale.__version__, stale.INTERFACE, stale.__file__ = version, interface, "/elsewhere/_cpu.so"
    monkeypatch.setitem(sys.modules, "hpa_ext._cpu", stale)
    with pytest.raises(hpa_ext.BackendError, match=rf"/elsewhere/_cpu.so is of version {version} \(interface"):
        hpa_ext.change_statistics(torch.zeros(1, 1), torch.zeros(1, 1))


def test_instruction_sets_can_be_chosen_and_unknown_ones_raise(isa: str) -> None:
    extension = backend.extension()
    assert extension.isa() == isa
    assert extension.available_isas()[0] == "baseline"
    with pytest.raises(ValueError, match="^isa: expected one of 'baseline'.*, got 'avx1024'"):
        extension.select_isa("avx1024")
    assert extension.isa() == isa
