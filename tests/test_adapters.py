"""Adapters in depth: many on one base, mixed, with new tokens and with checkpointing; against PEFT both ways, by hand, and with files that don't fit."""
import json, math, random, time

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ftcourse.data.batches import encode_rows, pack
from ftcourse.models import load
from ftcourse.tune.adapters import (AdapterBank, TokenRows, _adapters_1, _adapters_2, add_tokens, cat_adapters, check_vocabulary, checkpoint_activations,
                                    subspace_overlap, svd_adapter)
from ftcourse.tune.lora import LoRALinear, add_lora, adapters_off, load_adapter, lora_parameters, lora_state, merge, remove_lora, save_adapter, unmerge
from ftcourse.tune.sft import finetune, open_model
from ftcourse.tune.trees import batch_trees, reply_logps
from test_lora import IDS, gpt2, logits, tiny, tuned

V = 259  # the tiny model's tokens
KEY = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
OPTIONS = {"a": dict(r=4, alpha=8), "b": dict(r=2, alpha=3, targets=r".*\.1\..*"), "c": dict(r=3, alpha=5, use_rslora=True)}


def untied():
    "A Llama with an output layer of its own, which has other numbers than the embedding."
    from transformers import LlamaConfig, LlamaForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=False)).eval()


def banked(make=tiny):
    "A bank with three adapters, and the logits of each one alone."
    bank, alone = AdapterBank(make()), {}
    for i, (name, options) in enumerate(OPTIONS.items()):
        bank.add(name, **options)
        fill(bank.model, i)
        alone[name] = logits(tuned(make(), seed=i, **options))
    return bank, alone


def fill(model, seed, std=0.1):
    gen = torch.Generator().manual_seed(seed)
    for p in lora_parameters(model): p.data.normal_(std=std, generator=gen)


# --- sums of adapters -----------------------------------------------------------------------------------------
def test_cat_by_hand():
    A, B = cat_adapters([(2.0, torch.tensor([[1., 2]]), torch.tensor([[1.], [0], [3]])), (-1.0, torch.tensor([[0., 1]]), torch.tensor([[0.], [5], [1]]))])
    assert (B @ A).tolist() == [[2, 4], [0, -5], [6, 11]] and A.shape == (2, 2) and B.shape == (3, 2)


def test_svd_keeps_the_largest():
    gen = torch.Generator().manual_seed(0)
    for d, k, R in ((9, 14, 4), (14, 9, 4), (5, 6, 8)):  # also more rows than the matrix has
        A, B = torch.randn(R, k, generator=gen), torch.randn(d, R, generator=gen)
        U, S, Vh = torch.linalg.svd(B @ A)
        for r in (1, 2, R):
            a, b = svd_adapter(A, B, r)
            n = min(r, d, k)
            assert_close(b @ a, U[:, :n] * S[:n] @ Vh[:n], rtol=1e-4, atol=1e-4)
            assert len(a) == b.shape[1] <= r


def test_overlap():
    eye = torch.eye(6)
    assert subspace_overlap(eye[:, :3], eye[:, 1:4]) == pytest.approx(2 / 3) and subspace_overlap(eye[:, :2], eye[:, 2:]) == 0
    assert subspace_overlap(eye[:, :1], eye) == 1 == subspace_overlap(eye, eye[:, :1])
    with pytest.raises(ValueError, match="5"): subspace_overlap(eye, torch.eye(5))


# --- the bank -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [tiny, gpt2])
def test_each_adapter_is_what_it_is_alone(make):
    bank, alone = banked(make)
    model, base = bank.model, logits(make())
    weights = {n.replace(".base", ""): p.data_ptr() for n, p in model.named_parameters() if not n.endswith((".A", ".B"))}
    state = {n: {k: v.data_ptr() for k, v in (bank.use(n), lora_state(model))[1].items()} for n in bank.names}
    for name in ("a", None, "c", "b", "a", "b", None):
        bank.use(name)
        assert bank.active == name
        assert torch.equal(logits(model), base if name is None else alone[name]), name
        assert {n.replace(".base", ""): p.data_ptr() for n, p in model.named_parameters() if not n.endswith((".A", ".B"))} == weights  # nothing was copied
        if name: assert {k: v.data_ptr() for k, v in lora_state(model).items()} == state[name]
        if name is None: assert not [p for p in model.parameters() if p.requires_grad] and not any(isinstance(m, LoRALinear) for m in model.modules())
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in make().named_parameters()}


def test_switching_takes_less_than_a_millisecond():
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=30, num_attention_heads=2)
    bank = AdapterBank(LlamaForCausalLM(config))
    for name in "ab": bank.add(name, r=1)
    assert len(bank._on()) == 210
    def seconds(name):
        start = time.perf_counter()
        bank.use(name)
        return time.perf_counter() - start
    assert min(seconds(name) for name in "ab" * 20) < 1e-3


def test_only_the_active_one_learns():
    bank, alone = banked()
    bank.use("b")
    tokenizer = load("tiny")[1]
    rows = [{"prompt": f"{i} ", "completion": "ok"} for i in range(4)]
    finetune((bank.model, tokenizer), rows, n_epochs=2, batch_size=2, progress=False, lr=1e-2)
    trained = logits(bank.model)
    assert not torch.equal(trained, alone["b"])
    for name in "ac":
        bank.use(name)
        assert torch.equal(logits(bank.model), alone[name])
    bank.use("b")
    assert torch.equal(logits(bank.model), trained)


def test_mode_follows():
    bank = AdapterBank(tiny())
    bank.add("a", dropout=0.5)
    bank.add("b")
    fill(bank.model, 0)
    bank.model.train()
    bank.use("a")
    assert all(m.training for m in bank.model.modules())
    bank.use("b")
    bank.model.eval()
    bank.use("a")
    assert not any(m.training for m in bank.model.modules()) and torch.equal(logits(bank.model), logits(bank.model))


def test_device_follows():
    bank = AdapterBank(tiny())
    bank.add("a")
    bank.add("b")
    bank.model.to("meta")
    bank.use("a")
    assert {p.device.type for p in bank.model.parameters()} == {"meta"} and {p.dtype for p in lora_parameters(bank.model)} == {torch.float32}


def test_an_adapter_that_is_there_already():
    model = tuned(tiny())
    before = logits(model)
    bank = AdapterBank(model)
    assert bank.names == ["default"] and bank.active == "default"
    bank.add("other")
    bank.use("default")
    assert torch.equal(logits(model), before)
    bank.use(None)
    tuned(model, seed=5)  # behind the bank's back
    with pytest.raises(ValueError, match="keep"): bank.use("other")
    with pytest.raises(ValueError, match="other"): bank.keep("other")
    bank.keep("mine")
    bank.use("other"), bank.use("mine")
    assert torch.equal(logits(model), logits(tuned(tiny(), seed=5)))
    with pytest.raises(ValueError, match="mine"): bank.keep("again")


def test_what_the_bank_refuses():
    bank, alone = banked()
    bank.use("a")
    for wrong, word in ((lambda: bank.use("d"), "a, b, c"), (lambda: bank.delete("d"), "'d'"), (lambda: bank.add("a"), "already"), (lambda: bank.add("a/b"), "letters"), (lambda: bank.add(""), "letters"),
                        (lambda: bank.add("d", targets=["nothing"]), "nothing"), (lambda: bank.combine("d", {}), "no adapter"), (lambda: bank.combine("d", {"x": 1}), "'x'"),
                        (lambda: bank.combine("d", {"a": 1}, how="linear"), "'cat' and 'svd'"), (lambda: bank.combine("d", {"a": 1}, r=2), "svd"), (lambda: bank.combine("d", {"a": 1}, "svd", r=0), "rank")):
        with pytest.raises(ValueError, match=word): wrong()
        assert bank.active == "a" and bank.names == ["a", "b", "c"] and torch.equal(logits(bank.model), alone["a"])
    merge(bank.model)
    with pytest.raises(ValueError, match="merged"): bank.use("b")
    unmerge(bank.model)
    with adapters_off(bank.model), pytest.raises(ValueError, match="off"): bank.use("b")
    bank.delete("b")
    assert bank.names == ["a", "c"] and bank.active == "a"
    bank.delete("a")
    assert bank.active is None and torch.equal(logits(bank.model), logits(tiny()))


@pytest.mark.parametrize("make", [tiny, gpt2])
def test_peft_opens_the_bank_and_mixes_alike(tmp_path, make):
    import peft
    bank, alone = banked(make)
    bank.use("c")
    bank.save(tmp_path)
    assert bank.active == "c"
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "a", adapter_name="a").eval()
    for name in "bc": theirs.load_adapter(tmp_path / name, name)
    for name in "abc":
        theirs.set_adapter(name)
        assert_close(logits(theirs), alone[name], rtol=0, atol=1e-6)
    for i, (how, weights) in enumerate([("cat", {"a": 1.0, "c": 1.0}), ("cat", {"a": 0.7, "b": -0.4, "c": 2.0}), ("svd", {"a": 0.5, "b": 1.5})]):
        theirs.add_weighted_adapter(list(weights), list(weights.values()), f"m{i}", combination_type=how)
        theirs.set_adapter(f"m{i}")
        bank.combine(f"m{i}", weights, how)
        assert_close(logits(bank.model), logits(theirs), rtol=0, atol=2e-5)
    before = logits(bank.model)
    assert_close(logits(merge(bank.model)), before, rtol=0, atol=1e-5)
    unmerge(bank.model)
    theirs.save_pretrained(tmp_path / "theirs")
    back = AdapterBank(make())
    for name in ("a", "m1"):
        back.load(name, tmp_path / "theirs" / name), theirs.set_adapter(name)
        assert_close(logits(back.model), logits(theirs), rtol=0, atol=1e-6)


def test_sum_of_updates():
    "The exact sum has the sum of the weights' changes; rank r of it the nearest; and averaging A and B has neither."
    bank, _ = banked()
    place = "model.layers.1.mlp.down_proj"
    delta = {n: bank._get(n)[place].delta().detach() for n in "abc"}
    bank.combine("sum", {"a": 0.5, "b": 3, "c": -1})
    wanted = 0.5 * delta["a"] + 3 * delta["b"] - delta["c"]
    assert_close(bank._get("sum")[place].delta(), wanted, rtol=1e-4, atol=1e-6)
    bank.combine("small", {"a": 0.5, "b": 3, "c": -1}, how="svd", r=2)
    small, lost = bank._get("small")[place], torch.linalg.svdvals(wanted)[2:]
    assert small.r == 2 and (small.delta() - wanted).norm().item() == pytest.approx(lost.norm().item(), rel=1e-4)
    a, c = (bank._get(n)[place] for n in "ac")
    first = "model.layers.0.mlp.down_proj"  # where b has nothing
    assert_close(bank._get("sum")[first].delta(), 0.5 * bank._get("a")[first].delta() - bank._get("c")[first].delta(), rtol=1e-4, atol=1e-6)
    bank.combine("b_only", {"b": 1})
    assert first not in bank._get("b_only") and a.r == 4 and c.r == 3


def test_bank_on_4_bits():
    "Adapters sit on a quantised base as on any other; but a base that is quantised under a bank is refused."
    from ftcourse.tune.quantize import quantize_model
    make = lambda: quantize_model(tiny(), backend="ours")
    bank, alone = banked(make)
    bank.combine("m", {"a": 1, "c": -1})
    mixed = logits(bank.model)
    for name in "abc":
        bank.use(name)
        assert torch.equal(logits(bank.model), alone[name])
    bank.use("m")
    assert torch.equal(logits(bank.model), mixed)
    for active in ("a", None):
        late, _ = banked()
        late.use(active)
        quantize_model(late.model, backend="ours")
        with pytest.raises(ValueError, match="Quantise a model before"): late.use("b")


def test_a_top_adapter_is_saved_at_the_top(tmp_path):
    bank = AdapterBank(tuned(tiny()))
    bank.add("b")
    bank.save(tmp_path)
    assert (tmp_path / "adapter_config.json").exists() and (tmp_path / "b" / "adapter_config.json").exists()


@pytest.mark.parametrize("fault", ["cut", "config", "shape", "missing", "base"])
def test_files_that_do_not_fit_leave_bank_and_model(tmp_path, fault):
    from safetensors.torch import load_file, save_file
    bank, alone = banked()
    bank.use("b")
    folder = save_adapter(tuned(gpt2() if fault == "base" else tiny()), tmp_path / "x")
    file, key = folder / "adapter_model.safetensors", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    if fault == "cut": file.write_bytes(file.read_bytes()[:-100])
    if fault == "config": (folder / "adapter_config.json").write_text("{")
    if fault in ("shape", "missing"):
        tensors = load_file(file)
        if fault == "shape": tensors[key] = tensors[key][:, :-1].contiguous()
        else: del tensors[key]
        save_file(tensors, file)
    words = {"cut": "tensor 'base_model", "config": "adapter_config.json", "shape": key, "missing": key, "base": "transformer.h.0"}
    with pytest.raises(ValueError, match=words[fault]): bank.load("x", folder)
    assert bank.active == "b" and bank.names == ["a", "b", "c"]
    for name in ("b", "a", "c"):
        bank.use(name)
        assert torch.equal(logits(bank.model), alone[name])


# --- new tokens -----------------------------------------------------------------------------------------------
MAKERS = {"tied": tiny, "untied": untied}


def with_tokens(make=tiny, tokens=("<x>", "<y>"), seed=0, std=0.1):
    "A model with LoRA and new tokens, all with random numbers in them; its tokenizer and the new ids."
    model, tokenizer = make(), load("tiny")[1]
    add_lora(model, r=2, alpha=4)
    ids = add_tokens(model, tokenizer, list(tokens))
    fill(model, seed, std)
    return model, tokenizer, ids


def token_logits(model):
    with torch.no_grad(): return model(torch.tensor([[72, V, 105, V + 1, 33]])).logits


@pytest.mark.parametrize("name", MAKERS)
def test_only_the_new_rows_learn(name):
    # item 89
    model, tokenizer, ids = with_tokens(MAKERS[name])
    assert ids == [V, V + 1] and tokenizer("<y>")["input_ids"] == [V + 1]
    names = {n.rsplit(".", 2)[-2] + "." + n.rsplit(".", 1)[-1] if ".own." in n else n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if p.requires_grad}
    assert names == {"A", "B", "own.weight"}
    d = model.config.hidden_size
    assert sum(m.numel() for m in lora_parameters(model)) - sum(m.A.numel() + m.B.numel() for m in model.modules() if isinstance(m, LoRALinear)) == (2 * d if name == "tied" else 4 * d)
    before = {n: p.clone() for n, p in model.named_parameters()}
    rows = [{"prompt": f"{i}<x>", "completion": "ok<y>"} for i in range(4)]
    finetune((model, tokenizer), rows, n_epochs=2, batch_size=2, progress=False, lr=1e-2)
    for n, p in model.named_parameters(): assert torch.equal(p, before[n]) != (n.endswith((".A", ".B")) or ".own." in n), n
    own = [m.rows.detach().clone() for m in model.modules() if isinstance(m, TokenRows)]
    assert len(own) == 2 and torch.equal(own[0], own[1]) == (name == "tied")
    untouched, tuned_logits = [m.base.weight.clone() for m in model.modules() if isinstance(m, TokenRows)], token_logits(model)
    merge(model)
    assert_close(token_logits(model), tuned_logits, rtol=0, atol=1e-5)
    for rows, old, m in zip(own, untouched, [m for m in model.modules() if isinstance(m, TokenRows)]):
        assert torch.equal(m.base.weight[:V], old[:V]) and torch.equal(m.base.weight[V:], rows)
    unmerge(model)
    assert all(torch.equal(m.base.weight, old) for old, m in zip(untouched, [m for m in model.modules() if isinstance(m, TokenRows)]))
    assert torch.equal(token_logits(model), tuned_logits)


@pytest.mark.parametrize("name", MAKERS)
def test_peft_opens_new_tokens_and_trains_alike(tmp_path, name):
    # item 89
    import peft
    make = MAKERS[name]
    model, tokenizer, ids = with_tokens(make)
    def bigger():
        base = make()
        base.resize_token_embeddings(V + 2, mean_resizing=False)
        return base
    folder = save_adapter(model, tmp_path / "ours", "tiny")
    assert json.loads((folder / "adapter_config.json").read_text())["trainable_token_indices"] == ({"embed_tokens": ids} if name == "tied" else {"embed_tokens": ids, "lm_head": ids})
    theirs = peft.PeftModel.from_pretrained(bigger(), folder, is_trainable=True)
    assert_close(token_logits(theirs.eval()), token_logits(model), rtol=0, atol=1e-5)
    x = torch.tensor([[72, V, 105, V + 1, 33, V, V]])
    for m, params in ((model, lora_parameters(model)), (theirs, [p for p in theirs.parameters() if p.requires_grad])):
        opt = torch.optim.SGD(params, 0.3)
        for _ in range(3): m(input_ids=x, labels=x).loss.backward(), opt.step(), opt.zero_grad()
    assert_close(token_logits(theirs), token_logits(model), rtol=0, atol=1e-4)
    saved, mine = peft.get_peft_model_state_dict(theirs), lora_state(model)
    assert set(saved) == set(mine)
    for k, v in saved.items(): assert_close(mine[k], v, rtol=1e-3, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    back, _ = load_adapter(tmp_path / "theirs", make())
    assert_close(token_logits(back), token_logits(theirs), rtol=0, atol=1e-5)


def test_peft_may_train_one_end_only(tmp_path):
    import peft
    base = untied()
    base.resize_token_embeddings(V + 2, mean_resizing=False)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[V, V + 1], task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if p.requires_grad: p.normal_(std=0.1)
    theirs.save_pretrained(tmp_path)
    back, _ = load_adapter(tmp_path, untied())
    assert_close(token_logits(back)[..., :V], token_logits(theirs)[..., :V], rtol=0, atol=1e-5)  # the head's new columns are each base's own


@pytest.mark.parametrize("name", MAKERS)
def test_new_tokens_come_back(tmp_path, name):
    # item 89
    model, tokenizer, ids = with_tokens(MAKERS[name])
    folder, wanted = save_adapter(model, tmp_path / "a"), token_logits(model)
    for other in (MAKERS[name](), with_tokens(MAKERS[name], ("<x>", "<y>"), seed=3)[0], tuned(MAKERS[name]())):
        back, _ = load_adapter(folder, other)
        assert torch.equal(token_logits(back), wanted)
        assert [p.requires_grad for p in lora_parameters(back)] == [True] * len(lora_parameters(back))
    load_adapter(save_adapter(tuned(MAKERS[name]()), tmp_path / "plain"), back)  # without new tokens: they go
    assert not any(isinstance(m, TokenRows) for m in back.modules())


def test_the_folder_alone_is_enough(tmp_path):
    # item 89
    model, tokenizer, ids = with_tokens()
    folder = save_adapter(model, tmp_path / "a")
    with pytest.raises(ValueError, match="tokenizer ends at 258"): load(str(folder))  # the base's doesn't know them
    tokenizer.save_pretrained(folder)
    again, theirs = load(str(folder))
    assert torch.equal(token_logits(again), token_logits(model)) and theirs("<x>")["input_ids"] == [V] and theirs.decode([V + 1]) == "<y>"
    bot = finetune((again, theirs), [{"prompt": "a<x>", "completion": "b<y>"}] * 2, out=tmp_path / "run", n_epochs=1, progress=False)
    third, _ = load(str(tmp_path / "run"))
    assert torch.equal(token_logits(third), token_logits(bot.model))


@pytest.mark.parametrize("name", MAKERS)
def test_merged_model_is_a_plain_one(tmp_path, name):
    # item 89
    from transformers import AutoModelForCausalLM
    model, tokenizer, ids = with_tokens(MAKERS[name])
    wanted = token_logits(model)
    remove_lora(merge(model))
    assert not any(isinstance(m, (TokenRows, LoRALinear)) for m in model.modules())
    assert_close(token_logits(model), wanted, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.vocab_size == V + 2 and torch.equal(token_logits(again.eval()), token_logits(model))


@pytest.mark.parametrize("name", MAKERS)
def test_off_is_the_base(name):
    base = logits(MAKERS[name]())
    model, _, _ = with_tokens(MAKERS[name])
    for _ in range(2):
        with adapters_off(model):
            assert torch.equal(logits(model)[..., :V], base) and not model(IDS).logits.requires_grad
            off = token_logits(model)
        merge(model)
        with adapters_off(model): assert_close(token_logits(model), off, rtol=0, atol=1e-6)
        unmerge(model)


def test_start_is_the_mean():
    # item 89
    for make in MAKERS.values():
        model, tokenizer = make(), load("tiny")[1]
        base, ends = logits(model), [model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()]
        torch.manual_seed(3); expected = torch.rand(1)
        torch.manual_seed(3); add_tokens(add_lora(model), tokenizer, ["<x>"]); assert torch.equal(torch.rand(1), expected)
        for m, W in zip((model.get_input_embeddings(), model.get_output_embeddings()), ends): assert_close(m.rows[0], W.mean(0)), assert_close(m.base.weight[V], W.mean(0))
        now = logits(model)
        assert_close(now[..., :V], base, rtol=0, atol=1e-6)
        assert_close(now[..., V], base.mean(-1), rtol=0, atol=1e-5)
        assert (now.softmax(-1)[..., V] <= 1 / (V + 1) + 1e-7).all() and now.shape[-1] == model.config.vocab_size == V + 1


def test_known_tokens_keep_their_rows_and_spare_rows_start_at_the_mean():
    model, tokenizer = add_lora(tiny()), load("tiny")[1]
    W = model.get_input_embeddings().weight.clone()
    assert add_tokens(model, tokenizer, ["a", "<x>"]) == [tokenizer("a")["input_ids"][0], V]
    assert torch.equal(model.get_input_embeddings().rows[0], W[tokenizer("a")["input_ids"][0]])
    spare, tokenizer = add_lora(tiny()), load("tiny")[1]  # a vocabulary with rows that no token has
    spare.get_input_embeddings().weight.data = torch.cat([W, torch.full((5, W.shape[1]), 9.)])
    spare.config.vocab_size = spare.lm_head.out_features = V + 5
    assert add_tokens(spare, tokenizer, ["<x>"]) == [V] and spare.config.vocab_size == V + 5
    assert_close(spare.get_input_embeddings().rows[0], W.mean(0))
    assert spare.get_input_embeddings().base.weight[V].eq(9).all()


def test_16_bits():
    model, tokenizer = tiny().bfloat16(), load("tiny")[1]
    add_lora(model)
    add_tokens(model, tokenizer, ["<x>", "<y>"])
    fill(model, 0, 0.02)
    assert {p.dtype for p in lora_parameters(model)} == {torch.float32} and model.dtype == torch.bfloat16 == next(model.model.parameters()).dtype
    rows = model.get_input_embeddings().rows.detach().clone()
    assert torch.equal(model.bfloat16().get_input_embeddings().rows, rows)  # not even rounded on the way
    before = token_logits(model)
    trees = encode_rows([{"prompt": "a<x>", "completion": "b<y>"}], tokenizer)
    token_logps, _ = reply_logps(model, batch_trees(trees, model))
    (-token_logps.sum()).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in lora_parameters(model))
    assert_close(token_logits(merge(model)), before, rtol=0, atol=0.02)
    assert torch.equal(token_logits(unmerge(model)), before)


@pytest.mark.parametrize("name", MAKERS)
def test_trees_see_new_tokens(name):
    "Log-probabilities of packed replies equal those of the model's own logits, row by row."
    model, tokenizer, ids = with_tokens(MAKERS[name])
    trees = encode_rows([{"prompt": "a<x>", "completion": "b<y>c"}, {"prompt": "<y>", "completion": "<x><x>"}], tokenizer)
    with torch.no_grad():
        token_logps, _ = reply_logps(model, batch_trees(trees, model))
        for row, t in zip(token_logps, trees):
            p, reply = len(t.prompt_ids), torch.tensor(t.replies[0])
            own = model(torch.tensor([t.prompt_ids + t.replies[0]])).logits[0, p-1:-1].log_softmax(-1).gather(-1, reply[:, None])[:, 0]
            assert_close(row[:len(reply)], own, rtol=0, atol=1e-4)


def test_bias_of_the_output_layer():
    head = nn.Linear(2, 3)
    head.weight.data, head.bias.data = torch.tensor([[1., 0], [0, 1], [1, 1]]), torch.tensor([0., 10, 100])
    own = nn.Embedding.from_pretrained(torch.tensor([[2., 3]]), freeze=False)
    assert TokenRows(head, [1], own)(torch.tensor([1., 1])).tolist() == [1, 15, 102]


def test_new_tokens_in_a_bank(tmp_path):
    bank, alone = banked()
    bank.use("a")
    tokenizer = load("tiny")[1]
    add_tokens(bank.model, tokenizer, ["<x>", "<y>"])
    fill(bank.model, 4)
    with_x = token_logits(bank.model)
    bank.use("c")
    assert_close(logits(bank.model)[..., :V], alone["c"], rtol=0, atol=1e-6) and not any(isinstance(m, TokenRows) for m in bank.model.modules())
    bank.use("a")
    assert torch.equal(token_logits(bank.model), with_x)
    with pytest.raises(ValueError, match="new tokens"): bank.combine("m", {"a": 1, "c": 1})
    bank.save(tmp_path)
    other = AdapterBank(tiny())
    other.add("plain")
    other.load("a", tmp_path / "a")
    assert torch.equal(token_logits(other.model), with_x)
    other.use("plain"), other.use("a")
    assert torch.equal(token_logits(other.model), with_x)


def test_what_add_tokens_refuses():
    tokenizer = load("tiny")[1]
    for tokens, word in (("<x>", "list"), ([], "list"), ([3], "list"), ([""], "list"), (["<x>", "<x>"], "twice")):
        with pytest.raises(ValueError, match=word): add_tokens(add_lora(tiny()), tokenizer, tokens)
    with pytest.raises(ValueError, match="LoRA"): add_tokens(tiny(), tokenizer, ["<x>"])
    with pytest.raises(ValueError, match="lm_head"): add_tokens(add_lora(untied(), targets=["lm_head"]), tokenizer, ["<x>"])
    model = add_lora(tiny())
    add_tokens(model, tokenizer, ["<x>"])
    with pytest.raises(ValueError, match="already"): add_tokens(model, tokenizer, ["<y>"])
    assert len(tokenizer) == V + 1


def test_a_tokenizer_that_knows_more():
    # item 89
    model, tokenizer = load("tiny")
    check_vocabulary(model, tokenizer)
    tokenizer.add_tokens(["<x>", "<y>"])
    with pytest.raises(ValueError, match=r"2 tokens that the model lacks: \['<x>', '<y>'\]. Its embedding has 259 rows"): check_vocabulary(model, tokenizer)
    with pytest.raises(ValueError, match="2 tokens that the model lacks"): open_model((model, tokenizer))   # whatever is trained
    add_tokens(add_lora(model), tokenizer, ["<y>"])  # room for both, rows for one
    check_vocabulary(model, tokenizer)
    assert model.get_input_embeddings().ids.tolist() == [V + 1] and len(model.get_input_embeddings().weight) == V + 2


FAULTS = {
    "missing": (lambda t, c: t.pop(KEY), KEY), "short": (lambda t, c: t.update({KEY: t[KEY][:, :-1].contiguous()}), KEY), "one row": (lambda t, c: t.update({KEY: t[KEY][:1].contiguous()}), KEY),
    "nan": (lambda t, c: t[KEY].fill_(math.nan), KEY), "stray": (lambda t, c: c.pop("trainable_token_indices"), KEY), "layer": (lambda t, c: c.update(trainable_token_indices={"wte": [V, V + 1]}), "wte"),
    "ids": (lambda t, c: c.update(trainable_token_indices={"embed_tokens": [V, V]}), "different"), "text": (lambda t, c: c.update(trainable_token_indices="all"), "'all'"),
    "none": (lambda t, c: c.update(trainable_token_indices={"embed_tokens": []}), "different"), "negative": (lambda t, c: c.update(trainable_token_indices=[-1, 3]), "different"),
    "far": (lambda t, c: c.update(trainable_token_indices=[49152, 49153]), "another base"), "two": (lambda t, c: c.update(trainable_token_indices={"embed_tokens": [V, V + 1], "lm_head": [V, V + 2]}), "different ids"),
    "head": (lambda t, c: c.update(trainable_token_indices={"lm_head": [V, V + 1]}), "lm_head"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_rows_that_do_not_fit(tmp_path, name):
    from safetensors.torch import load_file, save_file
    folder = save_adapter(with_tokens()[0], tmp_path / "a")
    tensors, config = load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())
    FAULTS[name][0](tensors, config)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for model in (tiny(), tuned(tiny(), seed=9, r=3), with_tokens(seed=5)[0]):
        before, keys, size = logits(model), list(model.state_dict()), model.config.vocab_size
        with pytest.raises(ValueError) as e: load_adapter(folder, model)
        assert FAULTS[name][1] in str(e.value) and "load_adapter" in str(e.value), str(e.value)
        assert torch.equal(logits(model), before) and list(model.state_dict()) == keys and model.config.vocab_size == size


def test_cut_anywhere(tmp_path):
    folder = save_adapter(with_tokens()[0], tmp_path / "a")
    path, model, draw = folder / "adapter_model.safetensors", tiny(), random.Random(0)
    whole, before = path.read_bytes(), logits(model)
    for cut in [draw.randrange(len(whole)) for _ in range(20)]:
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="adapter_model.safetensors"): load_adapter(folder, model)
    assert torch.equal(logits(model), before) and model.config.vocab_size == V


# --- checkpointing --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_gradient(use_reentrant, tokens):
    # item 90
    make = lambda: (with_tokens()[0] if tokens else tuned(tiny())).train()
    grads, batch = [], pack(encode_rows([{"prompt": "ab", "completion": "cd"}, {"prompt": "e", "completion": "fgh"}], load("tiny")[1]))
    for again in (False, True):
        model = make()
        if again: checkpoint_activations(model, use_reentrant)
        (-reply_logps(model, batch)[0].sum()).backward()
        grads.append([p.grad for p in lora_parameters(model)])
        assert not again or model.config.use_cache is False
    assert all(g is not None for g in grads[1]) and any(g.abs().max() > 1e-3 for g in grads[1][:2])
    for a, b in zip(*grads): assert_close(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_blocks_are_computed_again(use_reentrant):
    # item 90: each block runs twice, by the kind that was asked for, and what goes into the first one requires a gradient
    model, calls, inputs = tuned(tiny()).train(), [], []
    checkpoint_activations(model, use_reentrant)
    model.model.embed_tokens.register_forward_hook(lambda m, args, out: inputs.append(out.requires_grad))
    for block in model.model.layers: block.self_attn.register_forward_hook(lambda m, args, out: calls.append(m))
    model(IDS, labels=IDS).loss.backward()
    assert len(calls) == 2 * len(model.model.layers) and inputs == [True]
    assert all(block._gradient_checkpointing_func.keywords == {"use_reentrant": use_reentrant} for block in model.model.layers)


# --- the exercises, against PEFT ------------------------------------------------------------------------------
def test_pissa_is_pefts():
    import peft
    base = nn.Sequential(nn.Linear(12, 9, bias=False))
    W = base[0].weight.data.clone()
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=3, target_modules=["0"], init_lora_weights="pissa")).base_model.model[0]
    A, B, rest = _adapters_1(W, 3)
    assert_close(theirs.base_layer.weight, rest, rtol=1e-4, atol=1e-6)
    assert_close(theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight, B @ A, rtol=1e-4, atol=1e-6)
    assert_close(theirs.lora_A["default"].weight.norm(dim=1), A.norm(dim=1))


def test_dora_is_pefts():
    import peft
    base = nn.Sequential(nn.Linear(12, 9, bias=False))
    W = base[0].weight.data.clone()
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], use_dora=True)).base_model.model[0]
    A, B, m = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight, theirs.lora_magnitude_vector["default"].weight
    assert_close(_adapters_2(W, A, B, 2.0, m), W)  # B = 0 and m the rows' lengths: the base
    with torch.no_grad(): B.normal_(), m.mul_(torch.linspace(0.5, 2, 9))
    x = torch.randn(5, 12)
    assert_close(theirs(x), x @ _adapters_2(W, A, B, 2.0, m).T, rtol=1e-4, atol=1e-5)


# --- the study ------------------------------------------------------------------------------------------------
def test_the_study_has_what_the_chapter_reads():
    from ftcourse.data.sets import data_dir
    study = json.loads((data_dir() / "results" / "rank.json").read_text(encoding="utf-8"))
    ranks = {x["r"] for x in study["one"]}
    assert {0, 1, 64} <= ranks and {x["seed"] for x in study["one"]} == set(study["seeds"])
    loss = {r: sum(x["loss"] for x in study["one"] if x["r"] == r) / len(study["seeds"]) for r in ranks}
    assert loss[1] > loss[64] and all(0 < x["accuracy"] <= 1 for x in study["one"])
    for x in study["one"]: assert len(x["singular_values"]) <= 64 and x["n_trained"] > 0
    assert {x["r"] for x in study["whole"]} == {0, 1, 8, 64}
    for x in study["whole"]: assert all(("overlap_out" in m) == (x["r"] > 0) for m in x["matrices"].values()) and len(x["matrices"]) >= 4
