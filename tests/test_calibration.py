"""Calibration: the block-by-block statistics are those of plain forward passes, whatever the architecture."""

from __future__ import annotations

import errno
import gc
import os
import weakref

import method_oracle as oracle
import numpy as np
import pytest
import tiny_models as tiny
import torch
from torch import nn

from hpa.calibration import CalibrationStream, CalibrationWarning, calibrate, find_layers
from hpa.checkpoint.hidden_states import HiddenStates
from hpa.config import CalibrationConfig
from hpa.layers import InputStatistics

BOTH = ("diagonal", "gram")
F64 = {"gram_dtype": "float64"}


def statistics_of(model, batches, *, want=BOTH, layers=None, **options) -> dict[str, InputStatistics]:
    found = {}
    for _, block in calibrate(model, batches, layers, want=want, config=CalibrationConfig(**options)):
        found |= block
    return found


def masks_of(batches):
    return [batch["attention_mask"] for batch in batches]


def full(gram: torch.Tensor) -> np.ndarray:
    lower = gram.double().tril()
    return (lower + lower.tril(-1).T).numpy()


def assert_same_statistics(found: InputStatistics, x: np.ndarray, *, rtol: float) -> None:
    expected = oracle.hessian(x, len(x))
    assert found.tokens == len(x)
    np.testing.assert_allclose(full(found.gram), expected, rtol=0, atol=rtol * np.abs(expected).max())
    # An inverse diagonal amplifies relative errors of the matrix by at most its condition number, which damping bounds
    # by cols / 0.01.
    np.testing.assert_allclose(
        found.inverse_diagonal, oracle.inverse_diagonal(expected), rtol=rtol * len(expected) * 100
    )


MODELS = {
    "llama": (tiny.llama, [tiny.text_batch(1), tiny.text_batch(2, samples=2, length=7)]),
    "llama left-padded": (tiny.llama, [tiny.text_batch(3, left=True)]),
    "qwen2, two kinds of masks": (tiny.qwen2, [tiny.text_batch(4), tiny.text_batch(5)]),
    "gpt-neox": (tiny.gpt_neox, [tiny.text_batch(6)]),
    "llava": (tiny.llava, [tiny.image_batch(7), tiny.image_batch(8, samples=2, length=9)]),
    "a plain stack": (tiny.plain, [{k: v for k, v in tiny.text_batch(9).items() if k != "labels"}]),
}


@pytest.mark.parametrize("case", MODELS)
def test_blocks_one_by_one_see_what_whole_forward_passes_see(case):
    make, batches = MODELS[case]
    model = make().double()
    batches = [{k: v.double() if v.is_floating_point() else v for k, v in batch.items()} for batch in batches]
    layers = find_layers(model)
    x = tiny.inputs_by_forward(model, batches, [spec.name for spec in layers], masks_of(batches))
    stream = CalibrationStream(model, batches, want=BOTH, config=CalibrationConfig(**F64))
    found = {}
    for number in stream.numbers:
        found |= stream.block(number)
    assert stream.route == "blocks"
    assert set(found) == {spec.name for spec in layers}
    for name, statistics in found.items():
        # The same float64 operations on the same numbers; what differs is the order in which tokens are summed.
        assert_same_statistics(statistics, x[name], rtol=1e-13)


@pytest.mark.parametrize("memory", [0, 1500, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_on_disk_change_no_bit(tmp_path, memory, dtype):
    batches = [tiny.text_batch(seed, samples=1 + seed % 2, length=5 + seed) for seed in range(5)]
    model = tiny.llama().to(dtype)
    hidden = HiddenStates(memory, tmp_path)
    stream = CalibrationStream(model, batches, want=("gram",), hidden=hidden)
    expected = statistics_of(model, batches, want=("gram",))
    stream.capture()
    sizes = [batch["input_ids"].numel() * model.config.hidden_size * dtype.itemsize for batch in batches]
    assert hidden.bytes_held + hidden.bytes_on_disk == sum(sizes)
    assert len(hidden) == 5
    assert hidden.bytes_held == sum(sizes) if memory is None else hidden.bytes_held <= memory
    assert memory != 1500 or hidden.bytes_held > 0
    assert list(tmp_path.iterdir()) == []  # a killed process leaves nothing behind
    for number in stream.numbers:
        for name, statistics in stream.block(number).items():
            assert torch.equal(statistics.gram, expected[name].gram), name
    assert len(hidden) == 0


def test_hidden_states_hold_tensors_of_any_shape_and_type_in_any_order(tmp_path):
    hidden = HiddenStates(64, tmp_path)
    rng = np.random.default_rng(0)
    kept: dict[int, torch.Tensor] = {}
    for _ in range(300):
        index = int(rng.integers(0, 6))
        shape = tuple(int(n) for n in rng.integers(0, 5, size=rng.integers(0, 4)))
        dtype = [torch.float32, torch.bfloat16, torch.float64, torch.int64][int(rng.integers(0, 4))]
        tensor = (100 * torch.from_numpy(rng.normal(size=shape))).to(dtype)
        kept[index] = tensor.T if tensor.ndim == 2 else tensor  # views too
        hidden[index] = kept[index]
        assert hidden.bytes_held <= 64
        for number, expected in kept.items():
            assert torch.equal(hidden[number], expected)
            assert hidden[number].dtype == expected.dtype
    assert len(hidden) == len(kept)
    hidden.clear()
    assert (len(hidden), hidden.bytes_held, hidden.bytes_on_disk) == (0, 0, 0)


def test_a_full_disk_under_hidden_states_is_told_with_its_folder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    hidden = HiddenStates(0, tmp_path)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left on device for the hidden states") as raised:
        hidden[0] = torch.ones(3)
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path))
    hidden.clear()


def test_batches_of_an_iterator_are_taken_one_by_one_and_let_go():
    """Pictures of all samples at once can take more than the model."""
    alive, most = weakref.WeakSet(), 0

    def batches():
        nonlocal most
        for seed in range(6):
            batch = tiny.image_batch(seed)
            alive.add(batch["pixel_values"])
            most = max(most, len(alive))
            yield batch
            del batch
            gc.collect()

    model = tiny.llava()
    stream = CalibrationStream(model, batches(), want=("gram",))
    expected = statistics_of(model, [tiny.image_batch(seed) for seed in range(6)], want=("gram",))
    found = {name: seen for number in stream.numbers for name, seen in stream.block(number).items()}
    assert most <= 2  # the first is looked at before the rest is asked for
    assert not alive
    assert all(torch.equal(found[name].gram, expected[name].gram) for name in expected)


def test_the_whole_route_sees_every_batch_of_an_iterator():
    model, batches = tiny.llama(), [tiny.text_batch(seed) for seed in range(3)]
    expected = statistics_of(model, batches, want=("gram",))
    for block in model.model.layers:  # a model that works on the hidden states between its blocks
        block.register_forward_hook(lambda _module, _args, output: output * 1.0)
    with pytest.warns(CalibrationWarning, match="one by one"):
        found = statistics_of(model, iter(batches), want=("gram",))
    assert all(torch.equal(found[name].gram, expected[name].gram) for name in expected)


def test_float32_models_accumulate_in_float32():
    model, batches = tiny.llama(), [tiny.text_batch(1)]
    x = tiny.inputs_by_forward(model, batches, [spec.name for spec in find_layers(model)], masks_of(batches))
    for name, statistics in statistics_of(model, batches).items():
        assert statistics.gram.dtype == torch.float32
        assert_same_statistics(statistics, x[name], rtol=30 * 2**-24)  # at most 27 tokens are summed


def test_the_decoder_of_llava_is_found_and_nothing_else():
    names = [spec.name for spec in find_layers(tiny.llava())]
    linears = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert names == [f"model.language_model.layers.{i}.{linear}" for i in range(2) for linear in linears]
    assert {(spec.block, spec.blocks) for spec in find_layers(tiny.llava())} == {(1, 2), (2, 2)}


@pytest.mark.parametrize(
    ("make", "groups"),
    [
        (tiny.llama, [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]),
        (tiny.gpt_neox, [{"query_key_value"}, {"dense"}, {"dense_h_to_4h"}, {"dense_4h_to_h"}]),
        (tiny.plain, [{"up", "gate"}, {"down"}]),
    ],
    ids=["llama", "gpt-neox", "plain"],
)
def test_layers_share_statistics_exactly_where_they_share_their_input(make, groups):
    batch = tiny.text_batch(1)
    batch.pop("labels")
    for _, block in calibrate(make(), [batch], want=("gram",)):
        shared: dict[int, set[str]] = {}
        for name, statistics in block.items():
            shared.setdefault(id(statistics), set()).add(name.rpartition(".")[2])
        assert sorted(map(sorted, shared.values())) == sorted(map(sorted, groups))
        keys = {statistics.input_key for statistics in block.values()}
        assert keys <= set(block)
        assert len(keys) == len(groups)


class RewritingBlock(nn.Module):
    """Feeds one buffer to two layers, with other values the second time."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)

    def forward(self, x):
        buffer = x.clone()
        y = self.first(buffer)
        buffer.mul_(3.0)
        return x + y + self.second(buffer)


def test_a_buffer_that_is_written_between_two_layers_is_not_shared():
    model = nn.Module()
    model.blocks = nn.ModuleList([RewritingBlock()])
    model.embed = nn.Embedding(9, 6)
    model.forward = lambda input_ids: model.blocks[0](model.embed(input_ids))
    ids = torch.arange(8).reshape(2, 4)
    found = statistics_of(model, [{"input_ids": ids}], want=("gram",))
    first, second = found["blocks.0.first"], found["blocks.0.second"]
    assert first is not second
    np.testing.assert_allclose(full(second.gram), 9 * full(first.gram), rtol=1e-6)


def test_a_peft_model_gives_the_statistics_of_the_merged_model_under_the_same_names():
    model = tiny.llama().double()
    wrapped = tiny.with_lora(model)
    batches = [tiny.text_batch(1)]
    adapted = statistics_of(wrapped, batches, **F64)
    merged = wrapped.merge_and_unload()
    expected = statistics_of(merged, batches, **F64)
    assert list(adapted) == list(expected) == [spec.name for spec in find_layers(merged)]
    for name in adapted:
        np.testing.assert_allclose(full(adapted[name].gram), full(expected[name].gram), rtol=1e-10, atol=1e-12)
        assert adapted[name].input_key == expected[name].input_key


@pytest.mark.parametrize(("normalize", "divisor"), [("tokens", "tokens"), ("samples", "samples"), ("none", None)])
def test_normalisation_divides_by_what_it_says(normalize, divisor):
    model, batches = tiny.llama().double(), [tiny.text_batch(1), tiny.text_batch(2, samples=5)]
    name = "model.layers.1.mlp.down_proj"
    x = tiny.inputs_by_forward(model, batches, [name], masks_of(batches))[name]
    statistics = statistics_of(model, batches, normalize=normalize, **F64)[name]
    count = {"tokens": len(x), "samples": 8, None: 1}[divisor]
    assert (statistics.tokens, statistics.samples) == (len(x), 8)
    expected = oracle.hessian(x, count)
    np.testing.assert_allclose(full(statistics.gram), expected, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(statistics.inverse_diagonal, oracle.inverse_diagonal(expected), rtol=1e-9)


@pytest.mark.parametrize("token_filter", ["all", "text", "answer"])
def test_token_filters_count_the_positions_they_name(token_filter):
    model, batch = tiny.llava().double(), tiny.image_batch(3)
    batch["pixel_values"] = batch["pixel_values"].double()
    keep = {
        "all": batch["attention_mask"] == 1,
        "text": (batch["attention_mask"] == 1) & (batch["input_ids"] != tiny.IMAGE_TOKEN),
        "answer": (batch["attention_mask"] == 1) & (batch["labels"] != -100),
    }[token_filter]
    name = "model.language_model.layers.1.mlp.up_proj"
    x = tiny.inputs_by_forward(model, [batch], [name], [keep])[name]
    statistics = statistics_of(model, [batch], token_filter=token_filter, **F64)[name]
    assert 0 < len(x) == int(keep.sum())
    assert_same_statistics(statistics, x, rtol=1e-13)


def test_padding_leaves_no_trace():
    model, batch = tiny.llama().double(), tiny.text_batch(1)
    noisy = {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, 7, batch["input_ids"])}
    assert not torch.equal(noisy["input_ids"], batch["input_ids"])
    one, two = statistics_of(model, [batch], **F64), statistics_of(model, [noisy], **F64)
    for name in one:
        np.testing.assert_array_equal(full(one[name].gram), full(two[name].gram))


def test_embeddings_instead_of_token_ids_give_the_same():
    model, batch = tiny.llama().double(), tiny.text_batch(1)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    other = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}
    one, two = statistics_of(model, [batch], **F64), statistics_of(model, [other], **F64)
    for name in one:
        np.testing.assert_array_equal(full(one[name].gram), full(two[name].gram))


def test_image_features_made_beforehand_give_the_same():
    model, batch = tiny.llava(), tiny.image_batch(2)
    with torch.no_grad():
        features = model.get_image_features(batch["pixel_values"], return_dict=True)
    other = {k: v for k, v in batch.items() if k != "pixel_values"} | {"mm_encoder_outputs": {"image": features}}
    one, two = statistics_of(model, [batch], want=("gram",)), statistics_of(model, [other], want=("gram",))
    for name in one:
        np.testing.assert_array_equal(full(one[name].gram), full(two[name].gram))


def test_inference_mode_around_the_caller_changes_nothing():
    model, batch = tiny.llama(), tiny.text_batch(1)
    expected = statistics_of(model, [batch])
    with torch.inference_mode():
        found = statistics_of(model, [batch])
    for name in expected:
        np.testing.assert_array_equal(full(found[name].gram), full(expected[name].gram))
        assert found[name].input_key == expected[name].input_key


def test_under_autocast_gram_matrices_stay_float32_and_factor():
    model, batch = tiny.llama(), tiny.text_batch(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = statistics_of(model, [batch])
    exact = statistics_of(model, [batch])
    for name, statistics in found.items():
        assert statistics.gram.dtype == torch.float32
        assert torch.isfinite(statistics.inverse_diagonal).all()
        error = np.abs(full(statistics.gram) - full(exact[name].gram)).max() / np.abs(full(exact[name].gram)).max()
        assert error < 0.05  # the activations went through bfloat16 (2^-8 a step), their products did not
        symmetric = np.linalg.eigvalsh(full(statistics.gram))
        # A Gram matrix in bfloat16 would be off by 2^-9 of its size, far below zero.
        assert symmetric.min() > -1e-5 * symmetric.max()


def test_bfloat16_models_are_read_exactly():
    model = tiny.llama().bfloat16()
    batches = [tiny.text_batch(1)]
    names = [spec.name for spec in find_layers(model)]
    x = tiny.inputs_by_forward(model, batches, names, masks_of(batches))
    for name, statistics in statistics_of(model, batches).items():
        assert_same_statistics(statistics, x[name], rtol=30 * 2**-24)


def test_the_model_is_left_as_it_was_found():
    model = tiny.llama()
    model.train()
    model.model.layers[1].eval()
    model.model.layers[0].self_attn.attention_dropout = 0.5
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    one, two = statistics_of(model, [tiny.text_batch(1)]), statistics_of(model, [tiny.text_batch(1)])
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(not module._forward_pre_hooks and "forward" not in vars(module) for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    for name in one:  # dropout would show
        np.testing.assert_array_equal(full(one[name].gram), full(two[name].gram))


def test_a_failing_forward_pass_also_leaves_the_model_as_it_was():
    model = tiny.llama()
    model.train()
    bad = {"input_ids": torch.tensor([[1, 10**6]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    with pytest.raises(IndexError):
        statistics_of(model, [bad])
    assert all(module.training for module in model.modules())
    assert all(not module._forward_pre_hooks and "forward" not in vars(module) for module in model.modules())


def test_few_tokens_take_the_low_rank_route_and_give_the_same_diagonal(monkeypatch):
    import hpa_ext

    calls = []
    original = hpa_ext.inverse_diagonal

    def spy(*args, **kwargs):
        calls.append("low rank" if kwargs.get("activations") is not None else "dense")
        return original(*args, **kwargs)

    monkeypatch.setattr(hpa_ext, "inverse_diagonal", spy)
    model, batch = tiny.llama(), tiny.text_batch(1, samples=1, length=6)
    x = tiny.inputs_by_forward(model, [batch], ["model.layers.0.mlp.down_proj"], masks_of([batch]))
    found = statistics_of(model, [batch], want=("diagonal",))
    assert len(x["model.layers.0.mlp.down_proj"]) < 0.8 * 16
    assert set(calls) == {"low rank"}
    dense = statistics_of(model, [batch], want=BOTH)
    assert set(calls) == {"low rank", "dense"}
    for name in found:
        assert found[name].gram is None
        # float32 sums of at most six tokens, amplified by a condition number below cols / 0.01
        np.testing.assert_allclose(found[name].inverse_diagonal, dense[name].inverse_diagonal, rtol=24 * 100 * 2**-22)
    name = "model.layers.0.mlp.down_proj"
    np.testing.assert_allclose(
        found[name].inverse_diagonal, oracle.inverse_diagonal(oracle.hessian(x[name], len(x[name]))), rtol=1e-5
    )


def test_the_pivot_of_sparsegpt_is_offered_for_comparison():
    model, batches, name = tiny.llama().double(), [tiny.text_batch(1)], "model.layers.0.mlp.down_proj"
    x = tiny.inputs_by_forward(model, batches, [name], masks_of(batches))[name]
    found = statistics_of(model, batches, diag_mode="sgpt", want=("diagonal",), **F64)[name].inverse_diagonal
    np.testing.assert_allclose(found, oracle.pivots(oracle.hessian(x, len(x))), rtol=1e-9)
    assert not np.allclose(found, oracle.inverse_diagonal(oracle.hessian(x, len(x))), rtol=0.01)


def test_damping_is_a_share_of_the_mean_diagonal():
    model, batches, name = tiny.llama().double(), [tiny.text_batch(1)], "model.layers.0.mlp.down_proj"
    x = tiny.inputs_by_forward(model, batches, [name], masks_of(batches))[name]
    found = statistics_of(model, batches, damping=0.3, want=("diagonal",), **F64)[name]
    np.testing.assert_allclose(
        found.inverse_diagonal, oracle.inverse_diagonal(oracle.hessian(x, len(x)), 0.3), rtol=1e-9
    )
    assert found.damping == 0.3


def test_each_block_is_freed_before_the_next_is_run():
    model, batch = tiny.llama(), tiny.text_batch(1)
    seen = []
    for _, block in calibrate(model, [batch], want=("gram",)):
        gc.collect()
        assert all(reference() is None for reference in seen), "an earlier block's Gram matrix is still held"
        seen = [weakref.ref(statistics.gram) for statistics in block.values()]
        del block, _
    assert len(seen) == 7


def test_weights_of_a_block_may_be_overwritten_once_it_was_yielded():
    model, batch = tiny.llama().double(), tiny.text_batch(1)
    expected = statistics_of(model, [batch], **F64)
    found = {}
    for number, block in calibrate(model, [batch], want=BOTH, config=CalibrationConfig(**F64)):
        found |= block
        with torch.no_grad():
            for parameter in model.model.layers[number - 1].parameters():
                parameter.fill_(torch.nan)
    for name in expected:
        np.testing.assert_array_equal(full(found[name].gram), full(expected[name].gram))


def test_a_model_that_works_between_its_blocks_takes_the_whole_route():
    model = tiny.plain(gain=0.5).double()
    batches = [{k: v for k, v in tiny.text_batch(i).items() if k != "labels"} for i in (1, 2)]
    names = [spec.name for spec in find_layers(model)]
    x = tiny.inputs_by_forward(model, batches, names, masks_of(batches))
    with pytest.warns(CalibrationWarning, match="cannot be run one by one"):
        found = statistics_of(model, batches, **F64)
    assert list(found) == names
    for name in names:
        assert_same_statistics(found[name], x[name], rtol=1e-13)


class TupleBlock(tiny.PlainBlock):
    def forward(self, x):
        return super().forward(x), None


class TupleStack(tiny.PlainStack):
    """Blocks that return tuples, as many libraries' do."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList([TupleBlock(10, 14) for _ in range(3)])

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for block in self.h:
            x = block(x)[0]
        return self.head(x)


def test_blocks_that_return_tuples_are_driven_one_by_one():
    torch.manual_seed(0)
    model = TupleStack().double().eval()
    batches = [{k: v for k, v in tiny.text_batch(1).items() if k != "labels"}]
    names = [spec.name for spec in find_layers(model)]
    x = tiny.inputs_by_forward(model, batches, names, masks_of(batches))
    found = statistics_of(model, batches, **F64)  # a CalibrationWarning would be an error
    for name in names:
        assert_same_statistics(found[name], x[name], rtol=1e-13)


class FlatteningBlock(tiny.PlainBlock):
    """Shows one layer all positions in a row, and one layer an axis more."""

    def forward(self, x):
        up = self.up(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
        return x + self.down(torch.tanh(up) * self.gate(x[:, None])[:, 0])


def test_padding_is_dropped_from_flattened_and_stretched_inputs_too():
    model = tiny.plain().double()
    torch.manual_seed(0)
    model.h = nn.ModuleList([FlatteningBlock(10, 14).double() for _ in range(2)])
    batch = {k: v for k, v in tiny.text_batch(1).items() if k != "labels"}
    names = [spec.name for spec in find_layers(model)]
    x = tiny.inputs_by_forward(model, [batch], names, masks_of([batch]))
    for name, statistics in statistics_of(model, [batch], **F64).items():
        assert_same_statistics(statistics, x[name], rtol=1e-13)


def test_inputs_that_do_not_have_a_row_for_each_position_are_an_error():
    class Pooling(tiny.PlainBlock):
        def forward(self, x):
            return x + self.down(torch.tanh(self.up(x.mean(dim=1))) * self.gate(x.mean(dim=1)))[:, None]

    model = tiny.plain()
    model.h[1] = Pooling(10, 14)
    batch = {k: v for k, v in tiny.text_batch(1).items() if k != "labels"}
    with pytest.raises(
        ValueError, match=r"layer h\.1\.up: its input \(3, 10\) does not have one row for each position"
    ):
        statistics_of(model, [batch])


def test_the_projector_is_block_zero_where_asked_for():
    model, batches = tiny.llava().double(), [tiny.image_batch(1), tiny.image_batch(2)]
    batches = [{**batch, "pixel_values": batch["pixel_values"].double()} for batch in batches]
    specs = [spec for spec in find_layers(model, include_projector=True) if spec.block == 0]
    assert [spec.name.rpartition(".")[2] for spec in specs] == ["linear_1", "linear_2"]
    x = tiny.inputs_by_forward(model, batches, [spec.name for spec in specs])
    found = statistics_of(model, batches, include_projector=True, **F64)
    assert len(found) == 2 + 14
    for spec in specs:
        assert_same_statistics(found[spec.name], x[spec.name], rtol=1e-13)
    decoder = statistics_of(model, batches, **F64)
    for name, statistics in decoder.items():
        np.testing.assert_array_equal(full(statistics.gram), full(found[name].gram))


def test_a_layer_that_is_never_called_has_no_statistics_but_no_error():
    class Lazy(tiny.PlainBlock):
        def forward(self, x):
            return x + self.down(torch.tanh(self.up(x)))

    model = tiny.plain()
    model.h[1] = Lazy(10, 14)
    batch = {k: v for k, v in tiny.text_batch(1).items() if k != "labels"}
    found = statistics_of(model, [batch])["h.1.gate"]
    assert found.zero
    assert found.tokens == 0
    assert found.inverse_diagonal is None


def test_activations_that_are_all_zero_are_marked():
    model = tiny.plain()
    nn.init.zeros_(model.embed.weight)
    for block in model.h:
        nn.init.zeros_(block.down.bias)
        nn.init.zeros_(block.up.bias)
    batch = {k: v for k, v in tiny.text_batch(1).items() if k != "labels"}
    for want in (("diagonal",), BOTH):
        found = statistics_of(model, [batch], want=want)["h.0.up"]
        assert found.zero
        assert found.inverse_diagonal is None
        assert found.tokens > 0


def test_activations_that_are_not_finite_name_the_layer():
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 0] = torch.inf
    for samples in (1, 4):  # the low-rank route and the dense one
        with pytest.raises(ValueError, match=r"layer model\.layers\.1\.mlp\.down_proj: .* not finite .*feature 3\)"):
            statistics_of(model, [tiny.text_batch(1, samples=samples, length=6)], want=("diagonal",))


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "batches: expected at least one batch"),
        (
            [{"input_ids": torch.ones(1, 3, dtype=torch.long)}],
            {"token_filter": "answer"},
            r"batches\[0\]: labels: needed",
        ),
        (
            [{"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 1, 3, 3)}],
            {},
            r"batches\[0\]: attention_mask: expected 2 dimensions",
        ),
    ],
)
def test_bad_batches_are_named(batches, options, message):
    with pytest.raises(ValueError, match=message):
        statistics_of(tiny.llama(), batches, **options)


def test_bad_arguments_are_named():
    model, batch = tiny.llama(), tiny.text_batch(1)
    with pytest.raises(TypeError, match=r"batches\[0\]: expected a dictionary of model arguments, got Tensor"):
        statistics_of(model, [batch["input_ids"]])
    with pytest.raises(ValueError, match="want: expected 'diagonal', 'gram' or both"):
        statistics_of(model, [batch], want=("inverse",))
    with pytest.raises(ValueError, match="has no projector"):
        find_layers(model, include_projector=True)
    with pytest.raises(ValueError, match=r"no module at 'model\.blocks'"):
        find_layers(model, blocks="model.blocks")
    with pytest.raises(ValueError, match="found no list of decoder blocks"):
        find_layers(nn.Linear(3, 3))
    assert [spec.name for spec in find_layers(model, blocks="model.layers")] == [s.name for s in find_layers(model)]
