"""Ways to fine-tune on one skeleton: against PEFT, hooks and plain arithmetic; files, refusals, and models left as they were."""
import copy, json, struct

import peft, pytest, torch, transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.testing import assert_close

from ftcourse.align.shootout import load_study
from ftcourse.data.batches import Tree, pack
from ftcourse.data.sets import emoji_codes
from ftcourse.models import generate, load
from ftcourse.tune.methods import (METHODS, Bottleneck, Scale, Shift, attach, detach, fold, get_method, load_method, method_of, off, save_method,
                                   saved_bytes, trainable)
from ftcourse.tune.lora import LoRALinear, add_lora, has_lora
from ftcourse.tune.quantize import NF4Linear, is_quantized
from ftcourse.tune.sft import SFT, make_trainable, sft_loss
from ftcourse.tune.trainer import Run, TreeTrainer
from ftcourse.tune.trees import can_use_trees, reply_logps

IDS = torch.tensor([[72, 101, 108, 108, 111, 32, 116, 104], [119, 111, 114, 108, 100, 33, 33, 33]])
MASK = torch.tensor([[1]*8, [1]*5 + [0]*3])
TEXT = [n for n in METHODS if n != "head"]
PARTS = [n for n in TEXT if METHODS[n].adds]
TREES = [Tree((5, 6, 7, 8), ((9, 10, 11), (12, 13)), ((1, 1, 1), (1, 1))), Tree((20, 21, 22, 23, 24, 25), ((26, 27),), ((1, 1),)), Tree((30, 31), ((32,),), ((1,),))]


def llama(): return load("tiny")[0].eval()


def gpt2():
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()
    for n, p in model.named_parameters():
        if n.endswith("bias"): p.data.normal_(std=0.1)  # GPT-2's start at 0, where a lost bias isn't seen
    return model


def bert(kind="BertForMaskedLM", **more):
    torch.manual_seed(0)
    return getattr(transformers, kind)(transformers.BertConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, **more)).eval()


def shaken(model, size=0.1):
    "The model with what learns changed at random."
    gen = torch.Generator().manual_seed(1)
    for p in trainable(model).values(): p.data.add_(torch.randn(p.shape, generator=gen).to(p.dtype), alpha=size)
    return model


@torch.no_grad()
def logits(model, **more): return model(IDS, **more).logits


def as_it_is(model): return {n: (type(m), id(m)) for n, m in model.named_modules()}, {n: (p.requires_grad, p.dtype, p.clone()) for n, p in model.named_parameters()}, method_of(model)


def assert_same(a, b):
    assert a[0] == b[0] and a[2] == b[2] and list(a[1]) == list(b[1])
    for n in a[1]: assert a[1][n][:2] == b[1][n][:2] and torch.equal(a[1][n][2], b[1][n][2]), n


@pytest.mark.parametrize("name", TEXT)
def test_starts_at_the_base_and_trains_only_its_own(name):
    # item 86
    d, f, kv, n = 64, 512, 32, 2  # of the tiny Llama
    block = 2*d*d + 2*d*kv + 3*d*f + 2*d
    counts = dict(full=sum(p.numel() for p in llama().parameters()), freeze=block, bitfit=n*(2*d + 2*kv + 2*f + d), ia3=n*(2*kv + f), adapter=n*2*(2*16*d + 16 + d), prompt=16*d, prefix=n*2*16*kv,
                  lora=n*8*(2*(d + d) + 2*(d + kv) + 3*(d + f)))
    counts["qlora"] = counts["lora"]
    base, model = llama(), attach(llama(), name)
    assert sum(p.numel() for p in trainable(model).values()) == counts[name] and saved_bytes(model) == 4*counts[name]
    assert all(p.dtype == torch.float32 for p in trainable(model).values()) and method_of(model) == name
    if name in ("prompt", "prefix", "qlora"): assert not torch.allclose(logits(model), logits(base), atol=1e-4)
    else: assert torch.equal(logits(model), logits(base))
    batch = pack(TREES, share=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    sft_loss(*reply_logps(shaken(model, 0.01), batch)).backward()
    opt.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])} - {"lm_head.weight"}
    assert changed == set(trainable(model))


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_soft_prompts_equal_pefts(make, name):
    kind = dict(prompt=peft.PromptTuningConfig, prefix=peft.PrefixTuningConfig)[name]
    model, theirs = shaken(attach(make(), name, n_tokens=5), 0.3), peft.get_peft_model(make(), kind(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    soft = model.base_model.soft
    rows = soft.embeds if name == "prompt" else torch.stack([soft.keys, soft.values], 1).permute(3, 0, 1, 2, 4).flatten(1)
    assert theirs.prompt_encoder["default"].embedding.weight.shape == rows.shape
    theirs.prompt_encoder["default"].embedding.weight.data = rows.detach()
    with torch.no_grad(): expected, padded = theirs(IDS).logits, theirs(IDS, attention_mask=MASK).logits
    skip = 5 if name == "prompt" else 0
    assert_close(logits(model), expected[:, skip:])
    assert_close(logits(model, attention_mask=MASK)[MASK > 0], padded[:, skip:][MASK > 0])
    assert_close(logits(model, position_ids=torch.arange(8)[None]), expected[:, skip:])


@pytest.mark.parametrize("make, config", [(llama, {}), (gpt2, {}), (bert, dict(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]))])
def test_ia3_equals_pefts_and_folds(make, config):
    # item 87
    model, theirs = shaken(attach(make(), "ia3")), peft.get_peft_model(make(), peft.IA3Config(task_type=None if make is bert else "CAUSAL_LM", **config)).eval()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Scale)}
    twins = {n: m for n, m in theirs.base_model.model.named_modules() if hasattr(m, "ia3_l")}
    assert set(layers) == set(twins) and all(layers[n].inputs == twins[n].is_feedforward for n in layers)
    for n, m in layers.items(): twins[n].ia3_l["default"].data = m.l.data.view_as(twins[n].ia3_l["default"])
    tuned = logits(model)
    assert_close(tuned, logits(theirs))
    assert_close(logits(fold(model)), tuned, rtol=0, atol=1e-5)
    assert method_of(model) is None and not [m for m in model.modules() if isinstance(m, Scale)]
    assert set(model.state_dict()) == set(make().state_dict())


def test_bitfit_is_training_the_biases():
    # item 87
    plain, model = gpt2().requires_grad_(False), attach(gpt2(), "bitfit")
    biases = [p.requires_grad_(True) for n, p in plain.named_parameters() if n.endswith("bias")]
    assert sum(p.numel() for p in biases) == saved_bytes(model)//4
    by_peft = peft.get_peft_model(gpt2(), peft.LoraConfig(r=1, bias="all", target_modules=["c_attn"], fan_in_fan_out=True))
    assert saved_bytes(model)//4 == sum(p.numel() for n, p in by_peft.named_parameters() if p.requires_grad and "lora" not in n)
    for m, params in ((plain, biases), (model, trainable(model).values())):
        m(IDS, labels=IDS).loss.backward()
        torch.optim.SGD(params, 0.5).step()
    assert (logits(plain) - logits(gpt2())).abs().max() > 1e-2
    assert_close(logits(model), logits(plain))
    assert_close(logits(fold(model)), logits(plain))


@pytest.mark.parametrize("make, after, n", [(llama, "both", 4), (llama, "feed-forward", 2), (gpt2, "both", 4), (bert, "both", 4), (bert, "feed-forward", 2)])
def test_adapters_are_what_hooks_compute(make, after, n):
    model, plain = shaken(attach(make(), "adapter", m=3, after=after)), make()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Bottleneck)}
    assert len(layers) == n
    for name, m in layers.items():
        plain.get_submodule(name).register_forward_hook(lambda _, x, y, m=m: y + torch.relu(y @ m.D.T + m.d) @ m.U.T + m.u)
    assert_close(logits(model), logits(plain))
    with pytest.raises(ValueError, match="adapter modules can't become part of the weights"): fold(model)
    assert_close(logits(model), logits(plain))


def test_adapters_stand_after_attention_and_feed_forward():
    ends = lambda **o: {n.split("layers.0.")[1] for n, m in attach(llama(), "adapter", **o).named_modules() if isinstance(m, Bottleneck) and "layers.0." in n}
    assert ends() == {"self_attn.o_proj", "mlp.down_proj"} and ends(after="feed-forward") == {"mlp.down_proj"}
    names = {n for n, m in attach(bert(), "adapter", after="feed-forward").named_modules() if isinstance(m, Bottleneck)}
    assert names == {f"bert.encoder.layer.{i}.output.dense" for i in (0, 1)}


@pytest.mark.parametrize("make", [llama, gpt2])
def test_gradients_of_a_soft_prompt_are_those_of_vectors_before_the_text(make):
    model, plain = attach(make(), "prompt", n_tokens=3), make().requires_grad_(False)
    embeds = model.base_model.soft.embeds.detach().clone().requires_grad_()
    weights = torch.randn(2, 8, 300, generator=torch.Generator().manual_seed(0))[..., :plain.config.vocab_size]
    (model(IDS).logits*weights).sum().backward()
    (plain(inputs_embeds=torch.cat([embeds.expand(2, -1, -1), plain.get_input_embeddings()(IDS)], 1)).logits[:, 3:]*weights).sum().backward()
    assert_close(model.base_model.soft.embeds.grad, embeds.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_soft_prompts_and_trees(make, name):
    # item 51
    model = make()
    assert can_use_trees(model)
    before = reply_logps(model, pack(TREES))[0]
    shaken(attach(model, name, n_tokens=4), 0.3)
    with torch.no_grad():
        assert can_use_trees(model)                                      # asked anew: what was found for the base doesn't hold
        shared, alone = (reply_logps(model, pack(TREES, share=share))[0] for share in (True, False))
        assert_close(shared, alone, rtol=0, atol=2e-5)
        assert (shared - before).abs().max() > 1e-2
        r = 0
        for tree in TREES:                                               # and plain rows through the model itself
            for reply in tree.replies:
                row = model(torch.tensor([tree.prompt_ids + reply])).logits[0].log_softmax(-1)
                expected = row[len(tree.prompt_ids) - 1:-1].gather(1, torch.tensor(reply)[:, None])[:, 0]
                assert_close(shared[r, :len(reply)], expected, rtol=0, atol=2e-5)
                r += 1
        assert_close(reply_logps(detach(model), pack(TREES))[0], before, rtol=0, atol=2e-5)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_a_row_in_pieces_is_the_row(make, name):
    model = shaken(attach(make(), name, n_tokens=4), 0.5)
    with torch.no_grad():
        whole, cache = model(IDS).logits, transformers.DynamicCache(config=model.config)
        pieces = [model(IDS[:, i:j], past_key_values=cache, use_cache=True).logits for i, j in ((0, 4), (4, 5), (5, 8))]
        mask, cache = torch.ones_like(IDS), transformers.DynamicCache(config=model.config)
        masked = [model(IDS[:, i:j], attention_mask=mask[:, :j], position_ids=torch.arange(i, j)[None], past_key_values=cache, use_cache=True).logits for i, j in ((0, 4), (4, 8))]
    assert_close(torch.cat(pieces, 1), whole)
    assert_close(torch.cat(masked, 1), whole)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_generates_with_a_soft_prompt(name):
    (model, tokenizer), bare = load("tiny"), llama()
    for m in (model, bare):
        for layer in m.model.layers: layer.self_attn.o_proj.weight.data *= 40   # so that what is looked at matters
    prompts = ["Hello there, my friend of old", "Hello there, my friend of ol", "Hello there, my friend of old days and nights"]  # a shared beginning and filling
    model = shaken(attach(model.eval(), name, n_tokens=4), 0.5)
    answers = generate(model, tokenizer, prompts, max_new_tokens=6)
    for prompt, answer in zip(prompts, answers):
        ids = tokenizer(prompt)["input_ids"]
        start = len(ids)
        with torch.no_grad():
            for _ in range(6):
                if name == "prompt": row = bare(inputs_embeds=torch.cat([model.model.soft.embeds, bare.get_input_embeddings()(torch.tensor(ids))])[None]).logits[0, -1]
                else: row = model(torch.tensor([ids])).logits[0, -1]     # the whole row again, without a cache
                ids.append(int(row.argmax()))
        assert answer == tokenizer.decode(ids[start:], skip_special_tokens=True)
    assert generate(bare, tokenizer, prompts, max_new_tokens=6) != answers


def test_what_a_soft_prompt_cannot_do():
    model = attach(llama(), "prefix")
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    with pytest.raises(ValueError, match="gradient checkpointing.*drops the cache"): model.train()(IDS)
    model = llama()
    cache = model(IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cache was filled before"): attach(model, "prompt")(IDS[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="BertForMaskedLM looks both ways"): attach(bert(), "prompt")
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="an encoder and a decoder"): attach(t5, "prompt")
    with pytest.raises(ValueError, match="n_tokens=0"): attach(llama(), "prefix", n_tokens=0)
    config = transformers.MistralConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, sliding_window=8)
    with pytest.raises(ValueError, match="attention windows"): attach(transformers.MistralForCausalLM(config), "prompt")


def test_starts_from_a_text():
    model = attach(llama(), "prompt", n_tokens=5, init_ids=[7, 8])
    assert_close(model.model.soft.embeds.data, llama().get_input_embeddings().weight.data[[7, 8, 7, 8, 7]])
    row = torch.tensor([[7, 8, 7, 8, 7, *IDS[0].tolist()]])
    for name in ("prompt", "prefix"):                                    # before training it is that text
        assert_close(attach(llama(), name, n_tokens=5, init_ids=[7, 8])(IDS[:1]).logits, llama()(row).logits[:, 5:])
    one, two = (attach(llama(), "prompt", seed=s).model.soft.embeds for s in (0, 1))
    assert not torch.equal(one, two) and torch.equal(one, attach(llama(), "prompt", seed=0).model.soft.embeds)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("name", PARTS)
def test_off_and_detach_give_the_base(make, name):
    if name == "qlora" and make is gpt2: pytest.skip("Conv1D isn't quantised")
    model, base = make(), logits(make())
    shaken(attach(model, name), 0.2)
    if name == "qlora": base = logits(detach(attach(make(), name)))
    tuned = logits(model)
    assert not torch.allclose(tuned, base, atol=1e-3)
    with off(model), off(model): assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), tuned)
    twin = copy.deepcopy(model)                                           # a copy is a copy: taking its parts off leaves ours
    assert torch.equal(logits(detach(twin)), base) and torch.equal(logits(model), tuned)
    assert torch.equal(logits(detach(model)), base) and method_of(model) is None
    if name != "qlora": assert as_it_is(model)[0].keys() == as_it_is(make())[0].keys() and set(model.state_dict()) == set(make().state_dict())
    attach(model, "lora")                                                 # and another may come


def test_full_and_freeze_change_the_weights_themselves():
    for name in ("full", "freeze"):
        model = attach(llama(), name)
        for act, what in ((off, "no part"), (detach, "Open the base again"), (fold, "changed already")):
            with pytest.raises(ValueError, match=what):
                with off(model) if act is off else pytest.raises(ZeroDivisionError): act(model)
    blocks = {n.split(".")[2] for n in trainable(attach(llama(), "freeze", n_blocks=1))}
    assert blocks == {"1"}
    for n in (0, 3):
        with pytest.raises(ValueError, match=f"n_blocks={n}, but this model has 2 blocks"): attach(llama(), "freeze", n_blocks=n)
    assert all(p.dtype == torch.float32 for p in attach(llama().bfloat16(), "freeze").parameters())
    quantised = detach(attach(llama(), "qlora"))
    for name in ("full", "freeze"):
        with pytest.raises(ValueError, match="4-bit codes"): attach(quantised, name)


def test_qlora_is_lora_on_codes():
    model = attach(llama(), "qlora", r=4, backend="ours")
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    assert len(layers) == 14 and all(isinstance(m.base, NF4Linear) for m in layers)
    tuned = logits(shaken(model))
    assert_close(logits(fold(model)), tuned, rtol=0, atol=2e-5)             # into the dequantised base (#88)
    assert not is_quantized(model)
    scaled = attach(detach(attach(llama(), "qlora", backend="ours")), "ia3")
    with pytest.raises(ValueError, match="quantised"): fold(scaled)


def test_bitfit_on_a_llama_says_why_it_cannot_fold():
    model = shaken(attach(llama(), "bitfit"))
    assert len([m for m in model.modules() if isinstance(m, Shift)]) == 14
    before = as_it_is(model)
    with pytest.raises(ValueError, match="no place for one"): fold(model)
    assert_same(before, as_it_is(model))


@pytest.mark.parametrize("name, options, message", [
    ("lora", dict(r=0), "rank must be"), ("lora", dict(targets=["nothing"]), "matches no linear layer"), ("qlora", dict(r=0), "rank must be"), ("adapter", dict(m=0), "m=0"), ("adapter", dict(after="noon"), "'both' and 'feed-forward'"),
    ("lora", dict(rank=4), r"no option \['rank'\]. It has \['r', 'alpha'"), ("full", dict(r=4), "It has none"), ("head", {}, r"needs \['n_labels'\]"), ("head", dict(n_labels=1), "at least 2"), ("dora", {}, "no method 'dora'. There are full, freeze")])
def test_a_failed_attach_leaves_the_model_as_it_was(name, options, message):
    model = llama()
    before, numbers = as_it_is(model), logits(model)
    with pytest.raises(ValueError, match=message): attach(model, name, **options)
    assert_same(before, as_it_is(model))
    assert torch.equal(logits(model), numbers)
    attach(model, "lora")


def test_one_method_at_a_time():
    model = attach(llama(), "ia3")
    with pytest.raises(ValueError, match="attached already"): attach(model, "lora")
    with pytest.raises(ValueError, match="attached already"): attach(add_lora(llama()), "ia3")
    for act in (detach, fold, lambda m: save_method(m, "x")):
        with pytest.raises(ValueError, match="no method is attached"): act(llama())
    with pytest.raises(ValueError, match="no known family"): attach(transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)), "adapter")
    assert get_method("ia3").lr > 0 and all(m.name == k and 0 < m.lr < 1 for k, m in METHODS.items())


@pytest.mark.parametrize("name", PARTS)
def test_trains_in_16_bits_and_stays_in_32(name, tmp_path):
    model = attach(llama().bfloat16(), name).half().bfloat16()
    assert all(p.dtype == torch.float32 for p in trainable(model).values())
    batch, before = pack(TREES, share=False), {n: p.clone() for n, p in trainable(model).items()}
    start = sft_loss(*reply_logps(model, batch)).item()
    TreeTrainer(model, SFT, TREES, run=Run(lr=METHODS[name].lr, max_steps=6, batch_size=3, schedule="constant", warmup=0., progress=False)).fit()
    assert logits(model).dtype == torch.bfloat16
    assert sft_loss(*reply_logps(model, batch)).item() < start
    assert any(not torch.equal(p, before[n]) for n, p in trainable(model).items())


@pytest.mark.parametrize("name", METHODS)
def test_files_come_back(name, tmp_path):
    model = shaken(attach(llama(), name, seed=3, **(dict(n_labels=3) if name == "head" else {})))
    save_method(model, tmp_path)
    again = load_method(tmp_path, llama())
    out = lambda m: m(IDS) if name == "head" else m(IDS).logits
    with torch.no_grad(): assert torch.equal(out(again), out(model))
    assert method_of(again) == name and set(trainable(again)) == set(trainable(model))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["method.json", "method.safetensors"]
    header = struct.unpack("<Q", (tmp_path/"method.safetensors").read_bytes()[:8])[0]
    assert (tmp_path/"method.safetensors").stat().st_size == 8 + header + saved_bytes(model)


def spoil(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


KEY = "model.layers.0.self_attn.k_proj.l"
SPOILED = {
    "missing": (lambda p: spoil(p, lambda t: t.pop(KEY)), f"tensor '{KEY}' is missing"),
    "shape": (lambda p: spoil(p, lambda t: t.update({KEY: torch.ones(7)})), rf"tensor '{KEY}' has shape \(7,\), but this model needs \(32,\)"),
    "nan": (lambda p: spoil(p, lambda t: t[KEY].fill_(float("nan"))), f"tensor '{KEY}' holds values that aren't finite"),
    "extra": (lambda p: spoil(p, lambda t: t.update(more=torch.ones(1))), "tensor 'more' has no place"),
    "short": (lambda p: p.write_bytes(p.read_bytes()[:-5]), "load_method: method.safetensors .* can't be read.*tensor 'model.layers"),
    "noise": (lambda p: p.write_bytes(b"\x00"*40), "can't be read"),
    "json": (lambda p: p.with_name("method.json").write_text("{"), "not JSON"),
    "empty": (lambda p: p.with_name("method.json").write_text("{}"), "doesn't say method"),
    "gone": (lambda p: p.with_name("method.json").unlink(), "no method.json"),
    "options": (lambda p: p.with_name("method.json").write_text(json.dumps(dict(method="ia3", seed=0, options=dict(x=1)))), "no option"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_damaged_file_leaves_the_model_as_it_was(how, tmp_path):
    save_method(shaken(attach(llama(), "ia3")), tmp_path)
    damage, message = SPOILED[how]
    damage(tmp_path/"method.safetensors")
    model = llama()
    before = as_it_is(model)
    with pytest.raises(ValueError, match=message): load_method(tmp_path, model)
    assert_same(before, as_it_is(model))
    assert "save_pretrained" not in model.__dict__


@pytest.mark.parametrize("name", ["prefix", "bitfit", "full"])
def test_a_file_for_another_base(name, tmp_path):
    save_method(attach(llama(), name), tmp_path)
    model = gpt2().bfloat16()
    before = as_it_is(model)
    with pytest.raises(ValueError, match="tensor '.*The file was made on"): load_method(tmp_path, model)
    assert_same(before, as_it_is(model))
    assert not model.transformer._forward_pre_hooks and logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("name", PARTS)
def test_a_model_with_parts_is_not_saved_as_a_plain_one(name, tmp_path):
    model = attach(llama(), name)
    with pytest.raises(ValueError, match=f"parts of {name} in it"): model.save_pretrained(tmp_path/"m")
    assert not (tmp_path/"m").exists()
    if name == "ia3":
        tuned = logits(shaken(model))
        fold(model).save_pretrained(tmp_path/"m")
        assert_close(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path/"m").eval()), tuned)


@pytest.mark.parametrize("body", ["llama", "gpt2", "bert"])
def test_classifier_equals_transformers(body):
    config = dict(llama=llama, gpt2=gpt2, bert=bert)[body]().config
    config.num_labels, config.pad_token_id = 4, 33
    torch.manual_seed(1)
    theirs = {"llama": transformers.LlamaForSequenceClassification, "gpt2": transformers.GPT2ForSequenceClassification, "bert": transformers.BertForSequenceClassification}[body](config).eval()
    ours, head = attach(theirs.base_model, "head", n_labels=4), theirs.classifier if body == "bert" else theirs.score
    ours.head.weight.data = head.weight.data
    if head.bias is not None: ours.head.bias.data = head.bias.data
    ids = IDS.clone()
    ids[1, 5:] = 33                                                        # filling, as transformers finds it: by its id
    with torch.no_grad(): assert_close(ours(ids, MASK), theirs(ids, attention_mask=MASK).logits)
    assert ours.causal == (body != "bert") and set(trainable(ours)) == {"head.weight", "head.bias"}
    assert_close(ours.head(ours.features(ids, MASK)), ours(ids, MASK))


def test_the_last_token_counts_even_if_it_is_the_filling():
    model = attach(llama(), "head", n_labels=2)
    alone = model.features(IDS[1:, :6])                                    # ends with 33
    filled = model.features(torch.tensor([[*IDS[1, :6].tolist(), 33, 33]]), torch.tensor([[1]*6 + [0]*2]))
    assert_close(alone, filled)
    with pytest.raises(ValueError, match="Pad on the right"): model(IDS, MASK.flip(1))
    half = attach(llama().bfloat16(), "head", n_labels=2).bfloat16()
    assert half.head.weight.dtype == torch.float32 and half(IDS).dtype == torch.float32 and half.features(IDS).requires_grad is False


def test_a_head_learns_on_a_frozen_bert():
    model = attach(bert("BertForSequenceClassification"), "head", n_labels=2)
    before, y = {k: v.clone() for k, v in model.model.state_dict().items()}, torch.tensor([0, 1])
    opt = torch.optim.Adam(trainable(model).values(), 0.05)
    for _ in range(60): opt.zero_grad(); F.cross_entropy(model(IDS), y).backward(); opt.step()
    assert model(IDS).argmax(-1).tolist() == [0, 1]
    assert all(torch.equal(v, before[k]) for k, v in model.model.state_dict().items())
    assert detach(model) is model.model


def test_the_study_has_every_method():
    study = load_study("methods")
    assert {r["method"] for r in study["runs"]} == set(METHODS) and study["base"]["method"] == "base"
    for r in study["runs"]:
        assert {"n_trained", "saved_bytes", "peak_bytes", "step_seconds", "format", "acceptable", "old_loss", "lr", "seed"} <= set(r)
        assert r["saved_bytes"] == 4*r["n_trained"] and 0 <= r["acceptable"] <= r["format"] <= 1 and r["peak_bytes"] > r["saved_bytes"]
    by = {r["method"]: r for r in study["runs"]}
    assert by["head"]["old_loss"] == pytest.approx(study["base"]["old_loss"], abs=1e-6)   # its body is untouched
    assert by["head"]["n_trained"] == len(emoji_codes())*(by["prompt"]["n_trained"]//16 + 1)
    assert by["lora"]["n_trained"] == by["qlora"]["n_trained"]


def test_finetune_says_what_is_attached():
    model = attach(load("tiny")[0], "ia3")
    with pytest.raises(ValueError, match="'ia3' is attached.*detach"): make_trainable(model)
    make_trainable(detach(model))
    assert has_lora(model)
