"""Quantisation and QLoRA: by hand, by brute force, code for code against bitsandbytes, against plain layers that hold the dequantised weights, and merged."""
import copy, importlib.util, json, math, random, warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ftcourse.align.prefer import prefer
from ftcourse.data.batches import encode_rows, pack
from ftcourse.models import load
from ftcourse.tune import quantize
from ftcourse.tune.lora import LoRALinear, add_lora, adapters_off, find_targets, load_adapter, lora_parameters, merge, remove_lora, save_adapter, unmerge
from ftcourse.tune.quantize import (NF4, NF4Linear, absmax_dequantize, absmax_quantize, bits_per_weight, blockwise_quantize, double_dequantize,
                                    double_quantize, dynamic_levels, int8_linear, is_quantized, nf4_dequantize, nf4_levels, nf4_quantize, pack_codes, quantize_model,
                                    unpack_codes, weight_bytes)
from ftcourse.tune.sft import finetune, make_trainable
from ftcourse.tune.trees import reply_logps

# bitsandbytes' own table, to the last bit
PUBLISHED = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
             0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
IDS = torch.tensor([[72, 101, 108, 108, 111, 32, 119], [3, 1, 4, 1, 5, 9, 2]])
ROWS = [{"prompt": f"number {i}\n", "completion": ("cat", "dog and dog", "a long grey elephant")[i % 3]} for i in range(12)]
PAIRS = [{"prompt": f"number {i}\n", "chosen": "cat", "rejected": "a dog"} for i in range(6)]
QUICK = dict(progress=False, max_steps=2)
BACKENDS = ["ours", pytest.param("bitsandbytes", marks=pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tiny(): return load("tiny")[0]


def draw(*shape, seed=0, dtype=torch.float32): return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def moved(model, std=0.05, seed=1, **options):
    "LoRA with random A and B."
    add_lora(model, **{"r": 4, "alpha": 8, **options})
    gen = torch.Generator().manual_seed(seed)
    for p in lora_parameters(model): p.data.normal_(std=std, generator=gen)
    return model


def dense_twin(model):
    "A plain model that holds what the codes of `model` stand for, worked out from the original weights."
    twin = tiny()
    for n in find_targets(twin):
        layer = twin.get_submodule(n)
        layer.weight.data = nf4_dequantize(*nf4_quantize(layer.weight.data))
    return twin


@torch.no_grad()
def logits(model): return model(IDS).logits


@pytest.fixture(scope="module")
def bnb():
    import logging
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return pytest.importorskip("bitsandbytes")


# --- eight bits -----------------------------------------------------------------------------------------------------------
def test_absmax_by_hand():
    codes, absmax = absmax_quantize(torch.tensor([[1., -2., .5], [0., 0., 0.], [-3., 1., 0.]]), dim=-1)
    assert codes.tolist() == [[64, -127, 32], [0, 0, 0], [-127, 42, 0]] and absmax.tolist() == [[2], [0], [3]] and codes.dtype == torch.int8
    assert_close(absmax_dequantize(codes, absmax)[2], torch.tensor([-3, 126/127, 0]))
    codes, absmax = absmax_quantize(torch.tensor([[1., -2., .5], [4., 0., 0.]]))
    assert codes.tolist() == [[32, -64, 16], [127, 0, 0]] and absmax.item() == 4
    codes, _ = absmax_quantize(torch.tensor([7., -3.2, 1.]), bits=4)
    assert codes.tolist() == [7, -3, 1]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dim", [None, -1])
def test_absmax_moves_no_number_by_more_than_half_a_step(bits, dim):
    for scale in (1e-30, 1e-3, 1., 1e30):
        x = scale*draw(5, 33)
        codes, absmax = absmax_quantize(x, dim, bits)
        step = (x.abs().max() if dim is None else x.abs().max(1, keepdim=True).values)/(2**(bits-1) - 1)
        assert codes.abs().max() == 2**(bits-1) - 1
        assert ((absmax_dequantize(codes, absmax, bits) - x).abs() <= step/2*(1 + 1e-5)).all()


@pytest.mark.parametrize("quantizer", [absmax_quantize, nf4_quantize, lambda x: blockwise_quantize(x, dynamic_levels())], ids=["absmax", "nf4", "blockwise"])
@pytest.mark.parametrize("bad, words", [(torch.tensor([1., math.nan]), "1 of 2 numbers are NaN"), (torch.tensor([math.inf, -math.inf, 1.]), "2 of 3"), (torch.tensor([1, 2]), "torch.int64"),
                                        (torch.zeros(0), "empty"), (torch.zeros(3, 0), r"\(3, 0\)"), (torch.tensor([1e300], dtype=torch.float64), "infinite in float32")])
def test_what_cannot_be_quantised(quantizer, bad, words):
    with pytest.raises(ValueError, match=words): quantizer(bad)


@pytest.mark.parametrize("call, words", [
    (lambda: absmax_quantize(torch.ones(2), bits=9), "bits=9"), (lambda: nf4_quantize(torch.ones(2), 0), "block_size=0"), (lambda: nf4_quantize(torch.ones(2), 2.5), "block_size=2.5"),
    (lambda: nf4_levels(1.0), "offset=1.0"), (lambda: nf4_dequantize(torch.tensor([16], dtype=torch.uint8), torch.ones(1)), "from 0 to 15"),
    (lambda: nf4_dequantize(torch.tensor([3]), torch.ones(1)), "uint8"), (lambda: nf4_dequantize(*nf4_quantize(torch.ones(65)), block_size=32), "need 3 scales, but there are 2")])
def test_settings_that_do_not_fit(call, words):
    with pytest.raises(ValueError, match=words): call()


# --- LLM.int8 -------------------------------------------------------------------------------------------------------------
def test_int8_product_by_hand_and_with_outliers():
    x, w = torch.tensor([[127., 3., -8.]]), torch.tensor([[127., 0., 5.], [1., -127., 2.]])
    assert int8_linear(x, *absmax_quantize(w, dim=-1), threshold=math.inf).tolist() == [[127*127 - 40, 127 - 381 - 16]]
    assert int8_linear(x, *absmax_quantize(w, dim=-1), bias=torch.tensor([1., 2.]), threshold=math.inf).tolist() == [[127*127 - 39, 127 - 381 - 14]]
    x, w = draw(2, 16, 64), draw(8, 64, seed=1)
    x[0, 3, 5] = 60.  # one entry makes the column an outlier for all rows
    codes, absmax = absmax_quantize(w, dim=-1)
    exact = x @ absmax_dequantize(codes, absmax).T
    split, plain = ((int8_linear(x, codes, absmax, threshold=t) - exact).abs()[0, 3].max().item() for t in (6., math.inf))
    assert split < 0.1 < 5*split < plain
    assert_close(int8_linear(x, codes, absmax, threshold=0.), exact, atol=1e-4, rtol=1e-4)  # every column apart: nothing of x is rounded
    assert int8_linear(x.bfloat16(), codes, absmax).dtype == torch.bfloat16 and int8_linear(x[0, 0], codes, absmax).shape == (8,)


def test_int8_is_bitsandbytes(bnb):
    ops = torch.ops.bitsandbytes
    x, w = draw(16, 64, dtype=torch.float16), draw(24, 64, seed=1, dtype=torch.float16)
    x[:, 5] = 7 + x[:, 5].abs()  # a whole column above 6
    x[:, 9] *= 0.1  # so that no row has its scale from a column that goes apart
    x[2, 9] = -30.
    w_codes, w_absmax, _ = bnb.functional.int8_vectorwise_quant(w.clone())
    codes, absmax = absmax_quantize(w, dim=-1)
    assert (codes != w_codes).float().mean() < 0.002 and (codes.int() - w_codes.int()).abs().max() <= 1  # halves that another order of operations rounds the other way
    assert_close(absmax[:, 0], w_absmax)
    x_codes, x_absmax, columns = bnb.functional.int8_vectorwise_quant(x.clone(), threshold=6.0)
    assert columns.tolist() == [5, 9]
    theirs, _ = ops.int8_mixed_scaled_mm(x.float(), x_codes, w_codes, x_absmax, w_absmax, columns, None)
    assert_close(int8_linear(x.float(), w_codes, w_absmax[:, None]), theirs, atol=0.05, rtol=1e-3)


# --- NF4 ------------------------------------------------------------------------------------------------------------------
def test_the_table_is_the_published_one():
    assert NF4.tolist() == PUBLISHED
    assert (NF4 > 0).sum() == 8 and (NF4 < 0).sum() == 7


def test_nf4_by_hand():
    w = torch.tensor([[2., -2, 0, .3, 0], [0, 0, 0, -5, 1.2]])
    codes, absmax = nf4_quantize(w, block_size=4)  # blocks go on from row to row: 2 -2 0 .3 | 0 0 0 0 | -5 1.2
    assert codes.tolist() == [[15, 0, 7, 9, 7], [7, 7, 7, 0, 10]] and absmax.tolist() == [2, 0, 5] and codes.dtype == torch.uint8
    assert_close(nf4_dequantize(codes, absmax, block_size=4), torch.tensor([[2., -2, 0, 2*PUBLISHED[9], 0], [0, 0, 0, -5, 5*PUBLISHED[10]]]))


@pytest.mark.parametrize("block_size", [1, 3, 64, 100, 1000])
def test_nf4_is_the_nearest_level(block_size):
    levels = torch.tensor(PUBLISHED, dtype=torch.float64)
    for scale, dtype in ((1., torch.float32), (1e-30, torch.float32), (1e30, torch.float32), (1., torch.bfloat16), (1., torch.float64)):
        w = (scale*draw(7, 31)).to(dtype)
        codes, absmax = nf4_quantize(w, block_size)
        assert codes.shape == w.shape and len(absmax) == -(-w.numel()//block_size)
        for b, block in enumerate(w.flatten().double().split(block_size)):
            assert absmax[b] == block.abs().max()
            far = (block[:, None]/block.abs().max() - levels).abs()  # (n, 16)
            got = far.gather(1, codes.flatten().split(block_size)[b].long()[:, None])[:, 0]
            assert_close(got, far.min(1).values, atol=1e-7, rtol=0)


def test_a_tie_takes_the_lower_level_and_a_second_time_changes_nothing():
    middle = (NF4[7] + NF4[8])/2
    assert nf4_quantize(torch.stack([torch.tensor(1.), middle, torch.nextafter(middle, torch.tensor(1.))]))[0].tolist() == [15, 7, 8]
    codes, absmax = nf4_quantize(draw(9, 50))
    again = nf4_quantize(nf4_dequantize(codes, absmax))
    assert torch.equal(again[0], codes) and torch.equal(again[1], absmax)
    assert nf4_dequantize(codes, absmax, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_nf4_is_bitsandbytes_code_for_code(bnb, dtype, block_size):
    for shape in ((64, 96), (33, 37), (5, 3), (1, 1), (200, 64)):
        w = draw(*shape, dtype=dtype)*0.02
        if w.numel() > block_size: w.flatten()[:block_size] = 0  # a block of zeros
        packed, state = bnb.functional.quantize_4bit(w, blocksize=block_size, quant_type="nf4")
        codes, absmax = nf4_quantize(w, block_size)
        assert torch.equal(pack_codes(codes), packed.flatten()) and torch.equal(absmax, state.absmax)
        if shape[1] % 32: continue  # widths that their kernel doesn't take: torch.compile would be called
        as_row = bnb.functional.QuantState(state.absmax, torch.Size((1, w.numel())), blocksize=block_size, quant_type="nf4", dtype=dtype)
        assert torch.equal(bnb.functional.dequantize_4bit(packed, as_row).flatten(), nf4_dequantize(codes, absmax, block_size, dtype).flatten())


# --- double quantisation --------------------------------------------------------------------------------------------------
def test_the_dynamic_map():
    levels = dynamic_levels()
    assert len(levels) == 256 == len(levels.unique()) and (levels[1:] > levels[:-1]).all()
    assert levels[-1] == 1 and levels[127] == 0 and torch.equal(levels[:127], -levels[128:255].flip(0))
    assert_close(levels[128:131], torch.tensor([.55e-6, .325e-5, .775e-5]))  # one step in the first decade, two in the second


def test_double_quantisation_by_brute_force():
    absmax = draw(600).abs() + 1
    codes, absmax2, offset = double_quantize(absmax)
    assert offset == absmax.mean() and len(absmax2) == 3
    rest = absmax.double() - absmax.mean()
    for b, block in enumerate(rest.split(256)):
        assert absmax2[b].item() == pytest.approx(block.abs().max().item())
        far = (block[:, None]/block.abs().max() - dynamic_levels()).abs()
        assert_close(far.gather(1, codes.split(256)[b].long()[:, None])[:, 0], far.min(1).values, atol=2e-7, rtol=0)
    assert_close(double_dequantize(codes, absmax2, offset), absmax, atol=absmax2.max().item()*.0072, rtol=0)  # half of the widest step


def test_double_quantisation_is_bitsandbytes(bnb):
    assert torch.equal(dynamic_levels(), bnb.functional.create_dynamic_map())
    w = draw(512, 256)
    _, state = bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    codes, absmax2, offset = double_quantize(nf4_quantize(w)[1])
    assert torch.equal(offset, state.offset) and torch.equal(absmax2, state.state2.absmax)
    differ = codes.int() - state.absmax.int()
    assert (differ != 0).float().mean() < 0.01 and differ.abs().max() <= 1
    rest = nf4_quantize(w)[1] - offset  # where they differ, ours is at least as near: their CPU kernel looks the level up in a coarse table
    ours, theirs = ((dynamic_levels()[c.int()]*absmax2.repeat_interleave(256)[:len(c)] - rest).abs() for c in (codes, state.absmax))
    assert (ours <= theirs + 1e-6).all()
    assert torch.equal(double_dequantize(state.absmax, absmax2, offset), bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset)


@pytest.mark.parametrize("block_size, double, bits", [(64, False, 4.5), (64, True, 4.126953125), (32, False, 5.), (256, True, 4 + 8/256 + 32/65536)])
def test_bits_are_what_is_stored(block_size, double, bits):
    layer = NF4Linear(nn.Linear(512, 1024, bias=False), block_size, double)
    assert bits_per_weight(block_size, double) == bits
    assert 8*weight_bytes(layer)/(512*1024) == pytest.approx(bits, abs=32/(512*1024) + 1e-9)  # the mean, once


# --- a layer --------------------------------------------------------------------------------------------------------------
def test_packing():
    assert [hex(b) for b in pack_codes(torch.tensor([[1, 2, 3], [15, 0, 9]], dtype=torch.uint8))] == ["0x12", "0x3f", "0x9"]
    assert [hex(b) for b in pack_codes(torch.tensor([1, 2, 3], dtype=torch.uint8))] == ["0x12", "0x37"]
    rng = random.Random(0)
    for shape in ((1,), (7,), (3, 5), (2, 3, 4)):
        codes = torch.tensor([rng.randrange(16) for _ in range(math.prod(shape))], dtype=torch.uint8).view(shape)
        assert torch.equal(unpack_codes(pack_codes(codes), shape), codes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double", [False, True])
def test_a_layer_is_a_plain_one_with_the_dequantised_weight(backend, dtype, double):
    linear, x = nn.Linear(128, 24).to(dtype), draw(2, 5, 128, dtype=dtype).requires_grad_()
    linear.weight.data = draw(24, 128, dtype=dtype)*0.05
    codes, absmax = nf4_quantize(linear.weight.detach())
    dense = nn.Linear(128, 24, dtype=dtype)
    dense.weight.data, dense.bias = nf4_dequantize(codes, double_dequantize(*double_quantize(absmax)) if double else absmax, dtype=dtype), linear.bias
    layer = NF4Linear(linear, double=double, backend=backend)
    assert torch.equal(layer.weight, dense.weight) and layer.weight.dtype == dtype and isinstance(layer, nn.Linear)
    near = dict(atol=1e-5, rtol=1e-4) if dtype == torch.float32 else dict(atol=0.02, rtol=0.02)  # 16 bits: the bias is added after rounding
    assert_close(layer(x), dense(x), **near)
    for g, p in zip(*(torch.autograd.grad(f(x).pow(2).sum(), (x, linear.bias)) for f in (layer, dense))): assert_close(g, p, **near)
    with torch.no_grad(): assert_close(layer(x), dense(x), **near)
    if dtype == torch.float32:
        with torch.autocast("cpu", torch.bfloat16): assert_close(layer(x), dense(x), atol=0.02, rtol=0.02); assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("shape, block_size", [((3, 7), 4), ((3, 7), 64), ((4, 576), 100), ((5, 96), 64)])
def test_widths_that_are_no_whole_blocks(shape, block_size):
    linear = nn.Linear(shape[1], shape[0])
    layer = NF4Linear(linear, block_size, double=False)
    assert torch.equal(layer.weight, nf4_dequantize(*nf4_quantize(linear.weight.detach(), block_size), block_size))
    assert torch.autograd.gradcheck(layer.double(), (draw(2, shape[1], dtype=torch.double).requires_grad_(),))


def test_a_layer_moves_copies_and_saves():
    layer = NF4Linear(nn.Linear(64, 8))
    absmax2, weight = layer.absmax2.clone(), layer.weight
    half = copy.deepcopy(layer).to(torch.float16)
    assert half.absmax2.dtype == torch.float32 and torch.equal(half.absmax2, absmax2) and torch.equal(half.packed, layer.packed)
    assert half.weight.dtype == torch.float16 and torch.equal(half.weight, weight.half())
    assert torch.equal(half.float().weight, weight)  # nothing was lost on the way
    other = NF4Linear(nn.Linear(64, 8))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, weight) and "weight" not in layer.state_dict()
    assert not [n for n, p in layer.named_parameters() if n != "bias"]
    assert "block_size=64" in repr(layer) and layer.to("meta").packed.device.type == "meta"


def saved_by(forward):
    "Tensors that autograd keeps for a backward pass."
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t): out = forward()
    out.sum().backward()
    return kept


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_matrix_is_kept_for_the_backward_pass(backend):
    base = nn.Linear(128, 48, bias=False)
    x = draw(3, 128).requires_grad_()
    alone, tuned = NF4Linear(base, backend=backend), LoRALinear(NF4Linear(base, backend=backend), 2, 4)
    for f in (lambda: alone(x), lambda: tuned(x)): assert not [t.shape for t in saved_by(f) if t.numel() >= 48*128]
    assert [t for t in saved_by(lambda: LoRALinear(base, 2, 4)(x)) if t.numel() == 48*128]  # a plain base is kept: it is there anyway


def test_a_layer_is_bitsandbytes_linear(bnb):
    linear = nn.Linear(128, 24)
    theirs = bnb.nn.Linear4bit(128, 24, quant_type="nf4", compress_statistics=False)
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu")
    x = draw(4, 128).requires_grad_()
    ours = NF4Linear(linear, double=False)
    assert_close(ours(x), theirs.train()(x))
    assert_close(*(torch.autograd.grad(m(x).sin().sum(), x)[0] for m in (ours, theirs)))


# --- a model --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_every_linear_layer_but_the_head(backend):
    model, before = tiny(), weight_bytes(tiny())
    assert not is_quantized(model) and quantize_model(model, backend, double=False) is model and is_quantized(model)
    assert {n for n, m in model.named_modules() if isinstance(m, NF4Linear)} == set(find_targets(tiny()))
    assert model.lm_head.weight is model.model.embed_tokens.weight and not model.training
    assert_close(logits(model), logits(dense_twin(model)), atol=1e-5, rtol=1e-5)
    n = sum(m.weight.numel() for m in map(tiny().get_submodule, find_targets(tiny())))
    assert weight_bytes(model) == before - 4*n + n//2 + 4*n//64


def test_an_adapter_stays_on_a_base_that_is_quantised_under_it():
    after, before = moved(quantize_model(tiny())), quantize_model(moved(tiny()))
    assert torch.equal(logits(before), logits(after))
    assert {type(m.base) for m in before.modules() if isinstance(m, LoRALinear)} == {NF4Linear}


def test_models_that_cannot_be_quantised(monkeypatch):
    from transformers import GPT2Config, GPT2LMHeadModel
    for model, words in ((quantize_model(tiny()), "quantised already"), (merge(moved(tiny())), "is merged"), (nn.ReLU(), "no torch.nn.Linear"),
                         (GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9)), r"transformer.h.0.attn.c_attn is a Conv1D")):
        with pytest.raises(ValueError, match=words): quantize_model(model)
    for options, words in ((dict(backend="theirs"), "backend='theirs'"), (dict(backend="bitsandbytes", block_size=48), "can't do blocks of 48"), (dict(block_size=0), "block_size=0")):
        model = tiny()
        with pytest.raises(ValueError, match=words): quantize_model(model, **options)
        assert not is_quantized(model)  # as it was
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install"): quantize_model(tiny(), backend="bitsandbytes")
    assert {m.backend for m in quantize_model(tiny()).modules() if isinstance(m, NF4Linear)} == {"ours"}


def test_auto_avoids_widths_that_the_cpu_kernel_gets_wrong():
    "bitsandbytes 0.50 gives wrong weights on a CPU with AVX512 where a row is no whole number of blocks."
    model = quantize_model(nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 40)))
    assert model[0].backend == "ours" and model[1].backend in ("ours", "bitsandbytes")
    model = quantize_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 40)), skip=["1"])
    assert type(model[1]) is nn.Linear and type(model[0]) is NF4Linear


# --- QLoRA ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_whole_models_gradients(backend, checkpointing):
    # item 90: frozen codes, activations computed twice
    batch = pack(encode_rows(ROWS[:4], load("tiny")[1]))
    found = []
    for model in (moved(quantize_model(tiny(), backend, double=False)), moved(dense_twin(tiny()))):
        make_trainable(model, "qlora", checkpointing=checkpointing)
        model.train()
        loss = reply_logps(model, batch)[0].sum()
        loss.backward()
        found.append([loss.detach(), *[p.grad for p in lora_parameters(model)]])
        assert not [n for n, p in model.named_parameters() if p.grad is not None and n.rsplit(".", 1)[-1] not in "AB"]
    for ours, plain in zip(*found): assert_close(ours, plain, atol=1e-4, rtol=1e-3)


class Attention(nn.Module):
    "Three projections of the same input, of two widths."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, d) for d in (48, 16, 16))

    def forward(self, x): return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_that_share_x(backend):
    "Forward and backward of each layer use its own codes."
    model, x = quantize_model(Attention(), backend, double=False), draw(2, 5, 64).requires_grad_()
    moved(model, std=.3)
    layers = model.q_proj, model.k_proj, model.v_proj
    assert model.v_proj.group == layers
    weights = [nf4_dequantize(*nf4_quantize(m.weight.detach())) for m in Attention().children()]
    y = model(x)
    plain = torch.cat([x @ W.T + m.base.bias + 2*x @ m.A.T @ m.B.T for W, m in zip(weights, layers)], -1)
    assert_close(y, plain, atol=1e-4, rtol=1e-4)
    for g, p in zip(*(torch.autograd.grad(z.sin().sum(), [x, *lora_parameters(model)]) for z in (y, plain))): assert_close(g, p, atol=1e-4, rtol=1e-4)


def test_dropout_and_single_layers_take_the_other_way():
    linear, x = nn.Linear(64, 8), draw(3, 64).requires_grad_()
    quantized, dense = NF4Linear(linear, double=False), nn.Linear(64, 8)
    dense.weight.data, dense.bias = nf4_dequantize(*nf4_quantize(linear.weight.detach())), linear.bias
    outs = []
    for base in (quantized, dense):
        layer = LoRALinear(base, 2, 4, dropout=.5, generator=torch.Generator().manual_seed(0))
        layer.B.data = draw(8, 2)
        torch.manual_seed(3)
        y = layer.train()(x)
        outs.append([y, *torch.autograd.grad(y.sin().sum(), (x, layer.A, layer.B)), layer.eval()(x)])
    for a, b in zip(*outs): assert_close(a, b)


def test_qlora_trains_the_same_with_both_backends(bnb, monkeypatch):
    start = finetune("tiny", ROWS, method="qlora", lr=0.01, **{**QUICK, "max_steps": 12})
    losses = [h["loss"] for h in start.history if "loss" in h]
    assert losses[-1] < losses[0] - 0.5 and {p.dtype for p in lora_parameters(start.model)} == {torch.float32}
    assert {m.backend for m in start.model.modules() if isinstance(m, NF4Linear)} == {"bitsandbytes"}
    monkeypatch.setattr(quantize, "_backend_for", lambda *args: "ours")
    ours = finetune("tiny", ROWS, method="qlora", lr=0.01, **{**QUICK, "max_steps": 12})
    assert [h["loss"] for h in ours.history if "loss" in h] == pytest.approx(losses, rel=1e-3)


def test_qlora_starts_at_the_quantised_model():
    bot = finetune("tiny", ROWS, method="qlora", batch_size=12, **{**QUICK, "max_steps": 1})
    logps, mask = reply_logps(quantize_model(tiny()), pack(encode_rows(ROWS, bot.tokenizer)))
    assert bot.history[0]["loss"] == pytest.approx(-(logps.sum()/mask.sum()).item(), rel=1e-5)


def test_save_open_and_go_on(tmp_path):
    whole = finetune("tiny", ROWS, method="qlora", save_every=2, progress=False, max_steps=4)
    finetune("tiny", ROWS, tmp_path/"run", method="qlora", save_every=2, progress=False, max_steps=4)
    (tmp_path/"run"/"checkpoint-4").rename(tmp_path/"away")
    again = finetune("tiny", ROWS, tmp_path/"run", method="qlora", save_every=2, progress=False, max_steps=4, resume=True)
    for a, b in zip(lora_parameters(again.model), lora_parameters(whole.model)): assert torch.equal(a, b)
    assert json.loads((tmp_path/"run"/"ftcourse.json").read_text())["quantized"] == "nf4"
    with pytest.warns(UserWarning, match="trained on a base in 4-bit codes"): opened, _ = load(tmp_path/"run")
    assert not torch.equal(logits(opened), logits(whole.model))
    assert torch.equal(logits(quantize_model(opened)), logits(whole.model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        onto, _ = load_adapter(tmp_path/"run", quantize_model(tiny()))
    assert torch.equal(logits(onto), logits(whole.model))
    with pytest.warns(UserWarning, match="4-bit"): further = finetune(str(tmp_path/"run"), ROWS, method="qlora", **QUICK)
    assert is_quantized(further.model)


def test_what_codes_cannot_do(tmp_path):
    model, tokenizer = load("tiny")
    with pytest.raises(ValueError, match="4-bit codes, which can't be trained"): finetune((quantize_model(model), tokenizer), ROWS, method="full", **QUICK)
    bot = finetune("tiny", ROWS, method="qlora", **QUICK)
    remove_lora(bot.model)
    with pytest.raises(ValueError, match="4-bit codes without an adapter"): bot.save(tmp_path)


@pytest.mark.parametrize("reference", ["cached", "online"])
def test_preferences_with_qlora(reference):
    "The reference is the quantised base, so the first loss is ln 2 exactly."
    bot = prefer("tiny", PAIRS, method="qlora", reference=reference, batch_size=6, **{**QUICK, "max_steps": 4})
    losses = [h["loss"] for h in bot.history if "loss" in h]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < losses[0] and is_quantized(bot.model)


# --- merging --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
def test_merged_into_the_dequantised_base(backend):
    # item 88, item 87
    model = moved(quantize_model(tiny(), backend, double=False))
    original, codes = tiny(), {n: m.base for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    unmerged, base = logits(model), logits(quantize_model(tiny(), backend, double=False))
    merge(model)
    for n, layer in model.named_modules():
        if not isinstance(layer, LoRALinear): continue
        W = original.get_submodule(n).weight.detach()
        by_hand = nf4_dequantize(*nf4_quantize(W)) + 2*layer.B.detach() @ layer.A.detach()  # alpha/r = 8/4
        assert_close(layer.base.weight, by_hand) and type(layer.base) is nn.Linear
    assert_close(logits(model), unmerged, atol=1e-5, rtol=1e-5)
    with adapters_off(model): assert_close(logits(model), base, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="merged already"): merge(model)
    unmerge(model)
    assert torch.equal(logits(model), unmerged) and all(m.base is codes[n] for n, m in model.named_modules() if isinstance(m, LoRALinear))


def test_quantising_again_and_the_original_base_change_the_outputs(tmp_path):
    # item 88
    model = moved(quantize_model(tiny()), std=0.02)
    trained = logits(model)
    on_original, _ = load_adapter(save_adapter(model, tmp_path), tiny())
    merged = logits(merge(model))
    assert not any(isinstance(m, (NF4Linear, LoRALinear)) for m in remove_lora(model).modules())
    again = logits(quantize_model(model))
    far = [(x - trained).abs().mean().item() for x in (merged, logits(on_original), again)]
    assert far[0] < 1e-6 and far[1] > 100*far[0] and far[2] > 100*far[0], far


def test_merged_16_bits_moves_and_comes_back():
    model = moved(quantize_model(tiny().bfloat16()))
    state = {n: b.clone() for n, b in model.named_buffers()}
    merge(model)
    assert {m.base.weight.dtype for m in model.modules() if isinstance(m, LoRALinear)} == {torch.bfloat16}
    unmerge(model.to(torch.float32))
    assert all(torch.equal(b, state[n]) for n, b in model.named_buffers() if b.dtype == torch.uint8 or "absmax" in n)
    assert {m.base.weight.dtype for m in model.modules() if isinstance(m, LoRALinear)} == {torch.float32}


def test_codes_of_others_are_refused_when_merging(bnb):
    # item 88
    theirs = bnb.nn.Linear4bit(64, 8, bias=False, quant_type="nf4").to("cpu")
    model = add_lora(nn.Sequential(theirs), r=2)
    lora_parameters(model)[1].data.fill_(.1)
    x = draw(3, 64)
    before = model.train()(x)
    with pytest.raises(ValueError, match="0 is a Linear4bit with a weight in codes"): merge(model)
    assert_close(model(x), before)


def test_peft_trains_the_same_and_merges_into_codes(bnb):
    # item 88: PEFT on bitsandbytes' own layers
    import peft
    linear, x = nn.Linear(128, 64, bias=False), draw(5, 128)
    base = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compress_statistics=False)
    base.load_state_dict(linear.state_dict())
    model = nn.Sequential(base.to("cpu"))
    model.is_loaded_in_4bit = True
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"])).train()
    ours = LoRALinear(NF4Linear(linear, double=False), 4, 8)
    layer = theirs.base_model.model[0]
    ours.A.data, ours.B.data = layer.lora_A["default"].weight.data.clone(), draw(64, 4)*.01
    layer.lora_B["default"].weight.data = ours.B.data.clone()
    assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)
    grads = [torch.autograd.grad(f(x).sin().sum(), w) for f, w in ((ours, (ours.A, ours.B)), (theirs, (layer.lora_A["default"].weight, layer.lora_B["default"].weight)))]
    for a, b in zip(*grads): assert_close(a, b, atol=1e-4, rtol=1e-4)
    unmerged = ours(x)
    with pytest.warns(UserWarning, match="rounding errors"): merged = theirs.merge_and_unload()
    assert (merged(x) - unmerged).abs().mean() > 1000*(merge(nn.Sequential(ours))(x) - unmerged).abs().mean()


# --- the commands ---------------------------------------------------------------------------------------------------------
def test_the_command_takes_it(tmp_path):
    from typer.testing import CliRunner
    from ftcourse.cli import app
    (tmp_path/"rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    done = CliRunner().invoke(app, ["sft", str(tmp_path/"rows.jsonl"), "--model", "tiny", "--method", "qlora", "--max-steps", "2", "--out", str(tmp_path/"run"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path/"run"/"config.json").read_text())["method"] == "qlora"
