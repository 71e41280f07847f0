"""LoRA: by hand, against autograd, against PEFT both ways, and with files that are cut, bent or meant for another model."""
import json, math, os, random

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ftcourse.models import load
from ftcourse.tune import lora
from ftcourse.tune.lora import (LoRALinear, add_lora, adapters_off, find_targets, load_adapter, lora_param_count, lora_parameters, lora_state,
                                merge, remove_lora, save_adapter, unmerge)

IDS = torch.tensor([[72, 101, 108, 108, 111, 32, 119], [3, 1, 4, 1, 5, 9, 2]])
PEFT_KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def tiny(): return load("tiny")[0]


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=120, bos_token_id=0, eos_token_id=0)).eval()


MODELS = {"llama": tiny, "gpt2": gpt2}


def tuned(model, seed=1, std=0.1, **kwargs):
    "LoRA with random A and B."
    add_lora(model, **{"r": 4, "alpha": 8, **kwargs})
    gen = torch.Generator().manual_seed(seed)
    for p in lora_parameters(model): p.data.normal_(std=std, generator=gen)
    return model


@torch.no_grad()
def logits(model): return model(IDS).logits


# --- the layer ----------------------------------------------------------------------------------------------
def test_by_hand():
    base = nn.Linear(2, 3)
    base.weight.data, base.bias.data = torch.tensor([[1., 0], [0, 1], [1, 1]]), torch.tensor([0., 0, 10])
    layer = LoRALinear(base, r=1, alpha=3)
    layer.A.data, layer.B.data = torch.tensor([[1., -1]]), torch.tensor([[2.], [0], [1]])
    # x = (5, 1): W0 x + b = (5, 1, 16), A x = 4, B A x = (8, 0, 4), times 3
    assert layer(torch.tensor([5., 1])).tolist() == [29, 1, 28]
    assert layer(torch.tensor([[[5., 1]]])).tolist() == [[[29, 1, 28]]]


@pytest.mark.parametrize("r, alpha, rs, scale", [(4, 8, False, 2.0), (4, 8, True, 4.0), (16, 16, False, 1.0), (16, 16, True, 4.0), (1, 5, True, 5.0)])
def test_scale(r, alpha, rs, scale):
    # item 87
    layer = LoRALinear(nn.Linear(3, 3, bias=False), r, alpha, use_rslora=rs)
    layer.base.weight.data.zero_()
    layer.A.data.fill_(1 / 3), layer.B.data.fill_(1 / r)  # B A x = 1 for x = (1, 1, 1)
    assert_close(layer(torch.ones(3)), torch.full((3,), scale))
    assert_close(layer.delta() @ torch.ones(3), torch.full((3,), scale))


@pytest.mark.parametrize("name", MODELS)
def test_starts_at_the_base(name):
    # item 86
    model = MODELS[name]()
    before, state = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    add_lora(model, r=3, alpha=5)
    assert torch.equal(logits(model), before)
    model.train()
    assert {n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if p.requires_grad} == {"A", "B"}
    if name == "gpt2": model.eval()  # its own dropout
    model(IDS, labels=IDS).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert {n.rsplit(".", 1)[-1] for n in grads} == {"A", "B"}
    assert all(g.abs().max() == 0 for n, g in grads.items() if n.endswith(".A")) and all(g.abs().max() > 0 for n, g in grads.items() if n.endswith(".B"))
    for n, p in model.named_parameters():
        if n.endswith(("base.weight", "base.bias")): assert torch.equal(p, state[n.replace(".base", "")])
    remove_lora(model)
    assert torch.equal(logits(model), before) and not [m for m in model.modules() if isinstance(m, LoRALinear)]


def test_starts_at_the_base_in_16_bits():
    # item 86
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny().to(dtype)
        before = logits(model)
        add_lora(model)
        assert torch.equal(logits(model), before)
        assert {p.dtype for p in lora_parameters(model)} == {torch.float32}


def test_a_starts_as_pefts():
    layer = LoRALinear(nn.Linear(400, 7), 50, 1)
    assert layer.A.abs().max() <= 1 / 20 and layer.A.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.02)
    one, same, other = (lora_state(add_lora(tiny(), seed=s)) for s in (3, 3, 4))
    assert all(torch.equal(one[k], same[k]) for k in one) and not all(torch.equal(one[k], other[k]) for k in one)
    torch.manual_seed(5); expected = torch.rand(1)
    torch.manual_seed(5); add_lora(tiny()); assert torch.equal(torch.rand(1), expected)  # nobody else's draws move


def test_gradients_by_autograd_and_by_differences():
    # item 87
    gen = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=gen, dtype=torch.double).requires_grad_()
    x, A, B, W, bias = draw(3, 2, 5), draw(2, 5), draw(4, 2), draw(4, 5).detach(), draw(4).detach()
    W2, A2, B2 = draw(3, 5).detach(), draw(3, 5), draw(3, 3)  # a second layer of another width and rank
    one = lambda x, A, B: lora._LoRAFunction.apply(x, 0.7, 1, W, b, A, B)[0]
    two = lambda x, A, B, A2, B2: lora._LoRAFunction.apply(x, 0.7, 2, W, W2, b, None, A, A2, B, B2)
    for b in (bias, None):
        assert torch.autograd.gradcheck(one, (x, A, B))
        assert torch.autograd.gradcheck(two, (x, A, B, A2, B2))
    grads = torch.autograd.grad(sum(o.pow(3).sum() for o in two(x, A, B, A2, B2)), (x, A, B, A2, B2))
    plain = torch.autograd.grad((x @ (W + 0.7 * B @ A).T).pow(3).sum() + (x @ (W2 + 0.7 * B2 @ A2).T).pow(3).sum(), (x, A, B, A2, B2))
    for g, p in zip(grads, plain): assert_close(g, p)
    (alone,) = torch.autograd.grad(two(x, A, B, A2, B2)[1].sum(), (A2,))  # the other output unused
    assert_close(alone, torch.autograd.grad((x @ (W2 + 0.7 * B2 @ A2).T).sum(), (A2,))[0])
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (g,) = torch.autograd.grad(one(x, A, B).pow(2).sum(), (A,), create_graph=True)
        g.sum().backward()


class Attention(nn.Module):
    "Three projections; keys and values of `y`, queries of `x`."
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 6) for _ in "qkv")

    def forward(self, x, y, order="qkv"):
        outs = {n: getattr(self, f"{n}_proj")(x if n == "q" else y) for n in order}
        return torch.cat([outs[n] for n in "qkv"], -1)


def test_layers_that_share_x():
    "One call or three: the same outputs and gradients, whoever reads what in which order."
    torch.manual_seed(0)
    model = tuned(Attention())
    layers = [model.q_proj, model.k_proj, model.v_proj]
    assert all(m.group == tuple(layers) for m in layers)
    x, y = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    def plain(x, y): return torch.cat([m.base(z) + m.scale * z @ m.A.T @ m.B.T for m, z in zip(layers, (x, y, y))], -1)
    def same(x, y, order="qkv"):
        results = []
        for f in (lambda: model(x, y, order), lambda: plain(x, y)):
            model.zero_grad()
            out = f()
            out.pow(2).sum().backward()
            results.append([out, *[p.grad for p in lora_parameters(model)]])
        for a, b in zip(*results): assert_close(a, b, rtol=1e-4, atol=1e-5)
    same(x, x), same(x, x)
    assert all(m.ready is None and len(m.group) == 3 for m in layers)
    with torch.no_grad(): assert_close(model(x, x), plain(x, x))
    with torch.inference_mode(): assert_close(model(x, x), plain(x, x))
    model.q_proj(x); x.mul_(2)  # worked out for an x that has changed since
    assert_close(model.k_proj(x), plain(x, x)[..., 6:12])
    for order, other in (("qkv", y), ("kvq", x), ("vkq", y)):  # not shared, or the first one last
        lora._group({f"{n}_proj": m for n, m in zip("qkv", layers)})
        same(x, other, order), same(x, other, order), same(x, x, "qkv")
    lora._group({f"{n}_proj": m for n, m in zip("qkv", layers)})
    model.q_proj(x)
    with adapters_off(model): assert torch.equal(model(x, x), torch.cat([m.base(x) for m in layers], -1))
    model.k_proj.scale = 5.0
    same(x, x)


def test_groups_of_a_llama():
    "They stay together in training, in use and in copies; GPT-2 has none."
    import copy
    model = tuned(tiny()).train()
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        logits(model)
        with adapters_off(model): logits(model)
    for m in (model, copy.deepcopy(model)):
        block = m.model.layers[1]
        assert block.self_attn.v_proj.group == tuple(getattr(block.self_attn, n) for n in ("q_proj", "k_proj", "v_proj"))
        assert block.mlp.up_proj.group == (block.mlp.gate_proj, block.mlp.up_proj) and block.mlp.down_proj.group == (block.mlp.down_proj,)
        assert all(l.ready is None for l in m.modules() if isinstance(l, LoRALinear))
    assert all(len(l.group) == 1 for l in tuned(gpt2()).modules() if isinstance(l, LoRALinear))


def test_16_bit_base_float32_adapters():
    "Gradients are float32, pile up in float32, and are those of float32 but for x's and dy's rounding."
    torch.manual_seed(0)
    base, x, dy = nn.Linear(32, 48, bias=False), torch.randn(64, 32), torch.randn(64, 48)
    for dtype in (torch.bfloat16, torch.float16):
        exact, layer = LoRALinear(base, 4, 8), LoRALinear(nn.Linear(32, 48, bias=False), 4, 8)
        layer.base.weight.data = base.weight.data.clone()
        exact.B.data.normal_(); layer.A.data, layer.B.data = exact.A.data.clone(), exact.B.data.clone()
        layer.to(dtype)
        assert layer.A.dtype == layer.B.dtype == torch.float32 and torch.equal(layer.A, exact.A)  # not even rounded on the way
        exact(x).backward(dy); layer(x.to(dtype)).backward(dy.to(dtype))
        for p, q in ((layer.A, exact.A), (layer.B, exact.B)):
            assert p.grad.dtype == torch.float32 and (p.grad - q.grad).norm() < 0.02 * q.grad.norm()
        once = layer.A.grad.clone()
        for _ in range(299): layer(x.to(dtype)).backward(dy.to(dtype))
        assert_close(layer.A.grad, 300 * once, rtol=1e-4, atol=1e-4)  # a 16-bit sum would stall


def test_autocast():
    model = tuned(tiny())
    exact = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(IDS, labels=IDS).loss
        low = logits(model)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in lora_parameters(model)) and (low - exact).abs().max() < 0.1


def test_dropout():
    base = nn.Linear(50, 3)
    layer = LoRALinear(base, 2, 2, dropout=0.5)
    layer.B.data.fill_(1.)
    x = torch.ones(4000, 50)
    wide = (layer.train()(x) - base(x)).detach()
    exact = (layer.eval()(x) - base(x)).detach()
    assert wide.std(0).min() > 0.01 and (wide.mean(0) - exact[0]).abs().max() < 0.05  # the mean is the same
    assert exact.std(0).max() < 1e-5  # and none of it in use


def test_checkpointing_and_hooks():
    "Gradients are the same when blocks are computed again in the backward pass."
    plain, again = tuned(tiny()).train(), tuned(tiny()).train()
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for m in (plain, again): m(IDS, labels=IDS).loss.backward()
    for p, q in zip(lora_parameters(plain), lora_parameters(again)): assert_close(p.grad, q.grad)


@pytest.mark.parametrize("bad", [dict(r=0), dict(r=-1), dict(r=1.5), dict(dropout=1.0), dict(dropout=-0.1)])
def test_refuses_numbers(bad):
    with pytest.raises(ValueError, match=next(iter(bad))): LoRALinear(nn.Linear(2, 2), **{"r": 1, "alpha": 1, **bad})


def test_refuses_layers():
    for layer in (nn.Embedding(3, 2), nn.Conv2d(1, 1, 1), nn.LayerNorm(3)):
        with pytest.raises(ValueError, match=type(layer).__name__): LoRALinear(layer, 1, 1)


# --- targets ------------------------------------------------------------------------------------------------
def test_targets_are_pefts():
    import peft
    for make in MODELS.values():
        for targets in ("all-linear", ["q_proj", "down_proj"] if make is tiny else ["c_attn"], r".*\.1\..*(_proj|c_fc)"):
            theirs = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
            names = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
            assert set(find_targets(make(), targets)) == names, targets


@pytest.mark.parametrize("targets", [["query"], "query", [], ["q_proj", "querry"], "q_proj"])
def test_targets_that_match_nothing(targets):
    with pytest.raises(ValueError, match="q_proj") as e: add_lora(tiny(), targets=targets)
    assert "down_proj" in str(e.value)


def test_output_layer_is_a_target_only_when_named():
    assert "lm_head" not in find_targets(tiny()) and find_targets(tiny(), ["lm_head"]) == ["lm_head"]
    tied = tuned(tiny(), targets=["lm_head"])
    before = logits(tied)
    with pytest.raises(ValueError, match="lm_head.*tied"): merge(tied)
    assert torch.equal(logits(tied), before)


def test_twice_or_never():
    model = add_lora(tiny())
    with pytest.raises(ValueError, match="already"): add_lora(model)
    for f in (lora_parameters, merge, unmerge, remove_lora, lora_state):
        with pytest.raises(ValueError, match=f.__name__): f(tiny())
    with pytest.raises(ValueError, match="adapters_off"):
        with adapters_off(tiny()): pass


def test_counts():
    assert lora_param_count([(12288, 12288)] * 192, 4) == 18_874_368  # the paper's r = 4 row: 18.9 M
    assert round(175e9 / lora_param_count([(12288, 12288)] * 192, 4), -1) == 9270
    assert lora_param_count([(3, 5)], 2) == 2 * 5 + 3 * 2 and lora_param_count([], 8) == 0


# --- merging ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rs", [False, True])
def test_merged_is_unmerged(name, rs):
    # item 87
    model = MODELS[name]()
    base = logits(model)
    before = logits(tuned(model, use_rslora=rs))
    assert (before - base).abs().max() > 0.01
    merge(model)
    assert_close(logits(model), before, rtol=0, atol=1e-5)
    with adapters_off(model): assert torch.equal(logits(model), base)
    with pytest.raises(ValueError, match="already"): merge(model)
    unmerge(model)
    assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="isn't merged"): unmerge(model)
    merge(model), remove_lora(model)
    assert_close(logits(model), before, rtol=0, atol=1e-5)
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in MODELS[name]().named_parameters()}


def test_16_bits_come_back_exactly():
    model = tuned(tiny().bfloat16(), std=0.01)
    weights = [m.base.weight.clone() for m in model.modules() if isinstance(m, LoRALinear)]
    for _ in range(3): unmerge(merge(model))
    assert all(torch.equal(w, m.base.weight) for w, m in zip(weights, (m for m in model.modules() if isinstance(m, LoRALinear))))


def test_moves_while_merged():
    model = tuned(tiny())
    before = logits(model)
    unmerge(merge(model).to(torch.float64))
    assert {m.base.weight.dtype for m in model.modules() if isinstance(m, LoRALinear)} == {torch.float64}
    assert {p.dtype for p in lora_parameters(model)} == {torch.float32}
    assert_close(logits(model.float()), before)


def test_off_survives_errors_and_nests():
    # item 86
    base = logits(tiny())
    model = tuned(tiny())
    on = logits(model)
    with pytest.raises(KeyError):
        with adapters_off(model): raise KeyError
    assert torch.equal(logits(model), on)
    with adapters_off(model):
        with adapters_off(model): assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), on)
    with adapters_off(model): assert not model(IDS).logits.requires_grad


# --- files --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("setting", [{}, {"use_rslora": True}, {"targets": "one"}, {"targets": "regex"}])
def test_peft_reads_ours_and_we_read_pefts(tmp_path, name, setting):
    # items 86 and 87
    import peft
    make = MODELS[name]
    some = {"one": ["v_proj"] if name == "llama" else ["c_fc"], "regex": r".*\.1\..*" if name == "llama" else r".*h\.0\..*"}
    setting = {k: some[v] if k == "targets" else v for k, v in setting.items()}
    model = tuned(make(), **setting)
    ours = logits(model)
    theirs = peft.PeftModel.from_pretrained(make(), save_adapter(model, tmp_path / "ours")).eval()
    assert_close(logits(theirs), ours, rtol=0, atol=1e-6)
    theirs.save_pretrained(tmp_path / "theirs")
    back, tokenizer = load_adapter(tmp_path / "theirs", make())
    assert_close(logits(back), ours, rtol=0, atol=1e-6)
    assert tokenizer is None and all(torch.equal(lora_state(model)[k], v) for k, v in lora_state(back).items())


def test_pefts_training_is_ours():
    "Three optimiser steps from the same A and B end in the same numbers."
    import peft
    ours = tuned(tiny(), r=2, alpha=6).train()
    theirs = peft.get_peft_model(tiny(), peft.LoraConfig(r=2, lora_alpha=6, target_modules="all-linear")).train()
    peft.set_peft_model_state_dict(theirs, lora_state(ours))
    for model, params in ((ours, lora_parameters(ours)), (theirs, [p for p in theirs.parameters() if p.requires_grad])):
        opt = torch.optim.AdamW(params, 1e-3)
        for _ in range(3): model(input_ids=IDS, labels=IDS).loss.backward(), opt.step(), opt.zero_grad()
    for k, v in peft.get_peft_model_state_dict(theirs).items(): assert_close(lora_state(ours)[k], v, rtol=1e-4, atol=1e-6)


def test_opens_the_recorded_base(tmp_path):
    model = tuned(tiny())
    folder = save_adapter(model, tmp_path / "a")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    for again, tokenizer in (load_adapter(folder), load(str(folder))):
        assert torch.equal(logits(again), logits(model)) and tokenizer is not None
    unnamed = save_adapter(model, tmp_path / "b")
    config = json.loads((unnamed / "adapter_config.json").read_text())
    (unnamed / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="model="): load_adapter(unnamed)
    with pytest.warns(UserWarning, match="other-base"): load_adapter(save_adapter(model, tmp_path / "c", "other-base"), tiny())


def test_one_base_several_adapters(tmp_path):
    first, second = save_adapter(tuned(tiny(), seed=1), tmp_path / "1"), save_adapter(tuned(tiny(), seed=2, targets=["q_proj"], r=2), tmp_path / "2")
    model = tiny()
    weight, base = model.model.layers[0].self_attn.q_proj.weight, logits(model)
    outs = [logits(load_adapter(f, model)[0]) for f in (first, second, first)]
    assert torch.equal(outs[0], outs[2]) and not torch.equal(outs[0], outs[1])
    assert model.model.layers[0].self_attn.q_proj.weight is weight
    assert torch.equal(logits(remove_lora(model)), base)
    with pytest.raises(ValueError, match="unmerge"): load_adapter(first, merge(tuned(model)))


@pytest.mark.parametrize("new_config, word", [({"r": 5}, "lora_A"), ({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias"), ({"r": 0}, "r=0"), ({"lora_alpha": None}, "lora_alpha"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"), ({"peft_type": "IA3"}, "LORA"), ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.lora_A")])
def test_settings_we_cannot_honour(tmp_path, new_config, word):
    folder = save_adapter(tuned(tiny()), tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **new_config}))
    untouched(folder, word)


def untouched(folder, word):
    "The folder is refused with `word` in the message, and the model in memory stays as it was."
    for model in (tiny(), tuned(tiny(), seed=9, r=3)):
        before, keys = logits(model), list(model.state_dict())
        needs = [p.requires_grad for p in model.parameters()]
        with pytest.raises(ValueError) as e: load_adapter(folder, model)
        assert word in str(e.value), str(e.value)
        assert torch.equal(logits(model), before) and list(model.state_dict()) == keys and [p.requires_grad for p in model.parameters()] == needs


def edited(tmp_path, edit):
    from safetensors.torch import load_file, save_file
    folder = save_adapter(tuned(tiny()), tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


A, B = PEFT_KEY.format("A"), PEFT_KEY.format("B")
EDITS = {
    "missing": (lambda t: t.pop(B), B), "turned": (lambda t: t.update({A: t[A].T.contiguous()}), A), "short": (lambda t: t.update({A: t[A][:, :-1].contiguous()}), A),
    "stranger": (lambda t: t.update({"base_model.model.h.0.attn.lora_A.weight": t[A].clone()}), "h.0.attn"), "nan": (lambda t: t[B].fill_(math.nan), B),
    "whole numbers": (lambda t: t.update({A: t[A].long()}), A), "one element": (lambda t: t.update({B: t[B].flatten()}), B),
}


@pytest.mark.parametrize("name", EDITS)
def test_tensors_that_do_not_fit(tmp_path, name):
    untouched(edited(tmp_path, EDITS[name][0]), EDITS[name][1])


def test_for_another_base(tmp_path):
    folder = save_adapter(tuned(gpt2()), tmp_path / "a", "gpt2")
    untouched_with_warning = pytest.warns(UserWarning, match="gpt2")
    with untouched_with_warning: untouched(folder, "transformer.h.0")


def test_cut_anywhere(tmp_path):
    folder = save_adapter(tuned(tiny()), tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    whole, rng, model = path.read_bytes(), random.Random(0), tiny()
    before = logits(model)
    for cut in [0, 1, 7, 8, 9, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(60))]:
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="adapter_model.safetensors"): load_adapter(folder, model)
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="tensor 'base_model.model.model.layers"): load_adapter(folder, model)
    path.unlink()
    with pytest.raises(ValueError, match="adapter_model.safetensors"): load_adapter(folder, model)
    assert torch.equal(logits(model), before)


def test_flipped_bytes(tmp_path):
    "A changed byte gives an error or finite numbers, never another kind of exception and never a half-changed model."
    folder = save_adapter(tuned(tiny()), tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    whole, rng = path.read_bytes(), random.Random(1)
    header = 8 + int.from_bytes(whole[:8], "little")
    base = logits(tiny())
    for _ in range(60):
        broken = bytearray(whole)
        broken[rng.randrange(header if rng.random() < 0.8 else len(whole))] = rng.randrange(256)
        path.write_bytes(broken)
        model = tiny()
        try: load_adapter(folder, model)
        except ValueError: assert torch.equal(logits(model), base)


def test_config_that_is_no_json(tmp_path):
    folder = save_adapter(tuned(tiny()), tmp_path / "a")
    for text in ("", "{", "[]", "3", '{"peft_type": 1}'):
        (folder / "adapter_config.json").write_text(text)
        untouched(folder, "adapter_config.json")
    (folder / "adapter_config.json").write_bytes(b"\xff\xfe\x00")
    untouched(folder, "adapter_config.json")
    (folder / "adapter_config.json").unlink()
    untouched(folder, "adapter_config.json")


def test_writes_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = save_adapter(tuned(tiny(), seed=1), tmp_path / "a")
    old = {p.name: p.read_bytes() for p in folder.iterdir()}
    def full(fd): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="space"): save_adapter(tuned(tiny(), seed=2), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == old


def test_layers_that_differ_are_not_saved(tmp_path):
    model = tuned(tiny())
    next(m for m in model.modules() if isinstance(m, LoRALinear)).alpha = 3
    with pytest.raises(ValueError, match="alpha"): save_adapter(model, tmp_path)


# --- the real model -----------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.real
def test_real_model_peft_and_merge(tmp_path):
    # items 86 and 87
    import peft
    make = lambda: load("smollm2-135m", dtype=torch.float32)[0]
    model = make()
    base = logits(model)
    assert torch.equal(logits(add_lora(model, r=8, alpha=16)), base)
    gen = torch.Generator().manual_seed(0)
    for p in lora_parameters(model): p.data.normal_(std=0.01, generator=gen)
    ours = logits(model)
    theirs = peft.PeftModel.from_pretrained(make(), save_adapter(model, tmp_path / "a")).eval()
    assert_close(logits(theirs), ours, rtol=1e-6, atol=1e-4)  # logits up to 30, thirty blocks
    assert_close(logits(merge(model)), ours, rtol=1e-5, atol=2e-4)
