"""The planner: published counts and sizes, what autograd keeps, measured peaks, wrong input, and the command `ftcourse plan`."""
import inspect, json, subprocess, sys, weakref
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig
from typer.testing import CliRunner

from ftcourse.cli import app, plan_memory
from ftcourse.data.batches import Tree, pack
from ftcourse.models import load
from ftcourse.tune.lora import add_lora, lora_param_count
from ftcourse.tune.memory import (GPUS, KNOWN, NF4_BYTES, PARTS, Setting, anatomy, find_gpu, layer_bytes, live_bytes, loss_bytes, peak_bytes, plan, share, state_bytes)
from ftcourse.tune.quantize import quantize_model
from ftcourse.tune.trees import reply_logps

ROOT = Path(__file__).resolve().parent.parent
DROPLESS = dict(attn_pdrop=0, resid_pdrop=0, embd_pdrop=0)


def small(n_layers=2, kind="llama", d=64, f=172, vocab=512, **more):
    sizes = dict(hidden_size=d, num_hidden_layers=n_layers, num_attention_heads=4, vocab_size=vocab, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return AutoConfig.for_model(kind, **sizes, **(DROPLESS if kind == "gpt2" else dict(num_key_value_heads=2, intermediate_size=f, head_dim=d // 4)), **{"tie_word_embeddings": True, **more})


def as_trees(ids): return pack([Tree((row[0],), (tuple(row[1:]),), ((1,) * (len(row) - 1),)) for row in ids.tolist()])


def ready(config, s, device="cpu"):
    "A model that trains as `s` says, its optimiser, and one step."
    with torch.device(device): model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, s.dtype)).train()
    if s.method == "qlora": quantize_model(model, backend="ours")
    if s.method != "full": add_lora(model, s.r, targets=s.targets)
    if s.checkpointing: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    ids = torch.randint(3, config.vocab_size, (s.batch_size, s.length)).to(device)
    batch = as_trees(ids).to(device) if s.loss == "trees" else None

    def nats():
        if s.loss == "whole": return model(input_ids=ids, labels=ids, use_cache=False).loss
        token_logps, mask = reply_logps(model, batch)
        return -token_logps.sum() / mask.sum()

    def step():
        nats().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, nats, step


def bytes_there(model, optimizer):
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers(), *(t for state in optimizer.state.values() for t in state.values())])


# --- the measuring itself -------------------------------------------------------------------------------
def test_peak_by_hand():
    def step():
        a, b = torch.empty(1000), torch.empty(500)
        del a
        c = torch.empty(3000)
        del b, c
        torch.empty(10)
    assert peak_bytes(step) == 2000 + 12000
    assert [alive for _, alive in live_bytes(step)] == [4000, 6000, 2000, 14000, 12000, 0, 40, 0]
    assert peak_bytes(lambda: None) == 0


# --- states ---------------------------------------------------------------------------------------------
def test_zero_counts_16_bytes_a_parameter():
    for dtype in ("float16", "bfloat16", "float32"): assert sum(state_bytes(7.5e9, dtype).values()) == 120e9
    assert state_bytes(10, "float16") == dict(weights=20, gradients=20, optimizer=120)
    assert state_bytes(10, "float32") == dict(weights=40, gradients=40, optimizer=80)
    assert state_bytes(10, "float32", "sgd")["optimizer"] == 0 and state_bytes(256, "float32", "adamw8bit")["optimizer"] == 2 * 256 + 2 * 4


def test_zeros_figure_1():
    "7.5 billion parameters on 64 devices, as printed."
    states = state_bytes(7.5e9, "float16")
    for strategy, gb in dict(ddp=120, zero1=31.4, zero2=16.6, fsdp=1.9).items(): assert sum(share(states, strategy, 64).values()) / 1e9 == pytest.approx(gb, abs=0.05)
    assert sum(share(states, "offload", 1).values()) == 0


def test_states_are_those_of_a_real_model():
    "Weights and Adam's averages, byte for byte (Adam's step counters and buffers aside)."
    for s in (Setting("full", 1, 16), Setting("lora", 1, 16, dtype="bfloat16"), Setting("lora", 1, 16, r=3, targets=["q_proj", "down_proj"]), Setting("qlora", 1, 16)):
        model, optimizer, _, step = ready(small(d=256, f=512), s)
        step()
        p = plan(small(d=256, f=512), **{f.name: getattr(s, f.name) for f in fields(s)})
        assert p.weights + p.optimizer == pytest.approx(bytes_there(model, optimizer), rel=2e-3)
        assert p.n_trained == sum(x.numel() for x in model.parameters() if x.requires_grad)


# --- counts ---------------------------------------------------------------------------------------------
PUBLISHED = {"gpt2": 124_439_808, "gpt2-xl": 1_557_611_200, "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384, "qwen2.5-0.5b": 494_032_768,
             "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-7b": 7_615_616_512, "mistral-7b": 7_241_732_096, "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320,
             "llama-2-70b": 68_976_648_192, "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496, "llama-7b": 6_738_415_616, "llama-33b": 32_528_943_616, "llama-65b": 65_285_660_672}


def test_published_counts():
    assert set(KNOWN) - set(PUBLISHED) == {"gpt-3"}
    for name, n in PUBLISHED.items(): assert anatomy(name).n_params == n, name
    assert anatomy("gpt-3").n_params == pytest.approx(175e9, rel=0.005)


def test_lora_of_gpt3():
    "175 billion, rank 4 on queries and values: 18.9 million; 350 GB of weights in 16 bits."
    assert lora_param_count(2 * 96 * [(12288, 12288)], 4) == 18_874_368
    p = plan("gpt-3", "lora", targets=["c_attn"], r=4)
    assert p.n_trained == 96 * 4 * (12288 + 3 * 12288) and p.weights / 1e9 == pytest.approx(350, rel=0.005)


def test_4_bit_weights():
    assert 8 * NF4_BYTES == 4 + 8 / 64 + 32 / (64 * 256) and round(8 * NF4_BYTES, 3) == 4.127
    p, base = plan("llama-2-7b", "qlora"), 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)  # all linear layers but the last
    assert p.weights == pytest.approx(base * NF4_BYTES + 2 * (6_738_415_616 - base) + 4 * p.n_trained)


def test_65b_on_48_gb():
    p = plan("llama-65b", "qlora")
    assert 24e9 < p.total < 48e9 and p.fits("a6000") and not p.fits("rtx-4090")


# --- what layers keep -----------------------------------------------------------------------------------
def kept(config, s):
    "Bytes of floating-point tensors that autograd keeps between forward and backward, weights left out."
    model, _, nats, _ = ready(config, s)
    weights, seen = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(x):
        if x is not None and x.is_floating_point() and (at := x.untyped_storage().data_ptr()) not in weights: seen[at] = (x, x.untyped_storage().nbytes())
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x): nats()
    return sum(n for _, n in seen.values())


@pytest.mark.parametrize("kind, options", [
    ("llama", dict(method="full", loss="whole")), ("llama", dict(method="full", loss="whole", dtype="bfloat16")), ("llama", dict(method="lora", loss="whole")),
    ("llama", dict(method="lora", loss="whole", targets=["q_proj", "v_proj"])), ("llama", dict(method="lora", loss="whole", targets=["up_proj"])),
    ("llama", dict(method="lora", loss="whole", targets=["down_proj"])), ("llama", dict(method="lora", loss="trees", length=520, batch_size=1)), ("llama", dict(method="qlora", loss="whole")),
    ("qwen2", dict(method="full", loss="whole")), ("qwen3", dict(method="full", loss="whole")), ("qwen3", dict(method="lora", loss="whole")), ("gemma", dict(method="lora", loss="whole")),
    ("smollm3", dict(method="full", loss="whole")), ("granite", dict(method="lora", loss="whole")), ("phi", dict(method="full", loss="whole")), ("mistral", dict(method="lora", loss="whole", dtype="float32")), ("gpt2", dict(method="full", loss="whole"))])
def test_layer_bytes_are_what_autograd_keeps(kind, options):
    s = Setting(**{"batch_size": 2, "length": 96, "checkpointing": False, **options})
    two_layers = kept(small(3, kind), s) - kept(small(1, kind), s)
    assert 2 * s.n_tokens * layer_bytes(anatomy(small(2, kind)), s) == pytest.approx(two_layers, rel=0.06)


def test_korthikantis_34_bytes():
    "Per token and width, in 16 bits, without the scores; 16 of them without dropout."
    for dropout, expected in ((0.1, 34), (0, 32)):
        gpt = anatomy(GPT2Config(n_embd=96, n_layer=2, n_head=4, activation_function="gelu", resid_pdrop=dropout))
        assert layer_bytes(gpt, Setting("full", dtype="float16", loss="whole")) == expected * 96


def test_whole_logits_are_12_bytes_a_word():
    m = anatomy(small())
    assert loss_bytes(m, Setting("lora", 3, 50, loss="whole")) == 12 * 150 * 512
    assert loss_bytes(m, Setting("lora", 3, 500, dtype="float32")) == 8 * 128 * 512 + 2 * 1500 * 64 * 4  # a chunk, not the batch


# --- measured peaks -------------------------------------------------------------------------------------
CASES = [Setting(method, b, n, ck, dtype=dtype, loss=loss) for method, b, n, ck, dtype, loss in (
    ("full", 1, 520, False, "float32", "trees"), ("full", 2, 128, True, "float32", "trees"), ("full", 2, 128, False, "float32", "whole"), ("full", 1, 400, True, "float32", "whole"),
    ("lora", 1, 520, False, "float32", "trees"), ("lora", 2, 256, True, "float32", "trees"), ("lora", 2, 128, False, "bfloat16", "whole"), ("lora", 1, 400, True, "bfloat16", "whole"),
    ("lora", 1, 520, False, "bfloat16", "trees"), ("lora", 2, 256, True, "bfloat16", "trees"), ("qlora", 1, 256, False, "bfloat16", "whole"), ("qlora", 2, 520, True, "bfloat16", "trees"))]


def name_of(s): return f"{s.method}-{s.dtype}-{s.batch_size}x{s.length}-{s.loss}{'-checkpointing' if s.checkpointing else ''}"


def check_peak(config, s, device="cpu", rel=0.1):
    "The part that comes and goes alone must be within `rel`; weights and averages are exact anyway."
    model, optimizer, _, step = ready(config, s, device)
    step()
    there, peak = bytes_there(model, optimizer), peak_bytes(step, device)
    p = plan(config, **{f.name: getattr(s, f.name) for f in fields(s)})
    assert p.peak == pytest.approx(there + peak, rel=rel)
    assert p.peak - p.weights - p.optimizer == pytest.approx(peak, rel=rel)


@pytest.mark.parametrize("s", CASES, ids=name_of)
def test_measured_peaks(s): check_peak(small(2, d=128, f=344, vocab=1024), s)


@pytest.mark.slow
@pytest.mark.parametrize("s", [replace(s, batch_size=2 * s.batch_size) for s in CASES], ids=name_of)
def test_measured_peaks_of_larger_models(s): check_peak(small(6, d=384, f=1024, vocab=8192), s)


@pytest.mark.parametrize("config, method, loss", [
    (small(2, "gpt2", d=128, vocab=1024), "full", "whole"), (small(2, "qwen2", d=128, f=344, vocab=1024), "lora", "trees"),
    (small(2, d=128, f=344, vocab=1024, tie_word_embeddings=False), "full", "whole"), (small(2, d=128, f=344, vocab=8192), "full", "trees")], ids=["gpt2", "qwen2", "untied", "vocabulary"])
def test_measured_peaks_of_other_models(config, method, loss):
    for checkpointing in (False, True): check_peak(config, Setting(method, 1, 520, checkpointing, loss=loss))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("s", CASES, ids=name_of)
def test_measured_peaks_on_a_gpu(s): check_peak(small(4, d=512, f=1376, vocab=16384), replace(s, batch_size=4 * s.batch_size), "cuda")


class Alive(TorchDispatchMode):
    "Counts the bytes of the storages that operations make, until they are freed: works on tensors without numbers too."
    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            if (at := storage._cdata) in self.sizes or at in given: continue
            self.sizes[at] = storage.nbytes()
            self.now += self.sizes[at]
            weakref.finalize(storage, self.free, at)
        self.peak = max(self.peak, self.now)
        return out

    def free(self, at): self.now -= self.sizes.pop(at, 0)


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(loss="whole", checkpointing=True), dict(loss="whole", checkpointing=False)], ids=lambda o: f"checkpointing {o['checkpointing']}")
def test_real_widths_without_their_memory(options):
    "Llama 3 8B's own widths, four layers, 16 bits, 4,096 tokens: tensors without numbers, counted as they come and go."
    from torch._subclasses.fake_tensor import FakeTensorMode
    config = LlamaConfig(**{**KNOWN["llama-3-8b"][1], "num_hidden_layers": 4})
    s = Setting("lora", 2, 2048, **options)
    with FakeTensorMode():
        model, _, nats, _ = ready(config, s)
        with Alive() as alive: nats().backward()
    p = plan(config, "lora", batch_size=2, length=2048, **options)
    assert p.peak - p.weights - p.optimizer == pytest.approx(alive.peak, rel=0.05)


def test_ddp_keeps_a_second_copy_of_the_gradients(tmp_path):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    model, made = AutoModelForCausalLM.from_config(small()), []
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try: buckets = live_bytes(lambda: made.append(DistributedDataParallel(model)))[-1][1]
    finally: dist.destroy_process_group()
    alone, both = plan(small(), "full"), plan(small(), "full", n_devices=2)
    assert both.copies == alone.gradients == pytest.approx(buckets, rel=0.02) and alone.copies == 0


# --- several devices, by hand ---------------------------------------------------------------------------
def test_shares_by_hand():
    config = small(4, tie_word_embeddings=False)
    n, embedding = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()), 2 * 512 * 64
    layer, args = (n - embedding) / 4, dict(batch_size=1, length=8)
    p = plan(config, "full", n_devices=8, strategy="fsdp", **args)
    assert (p.weights, p.optimizer, p.gradients) == (4 * n / 8, 8 * n / 8, 4 * n / 8)
    assert p.moments["loss"]["copies"] == pytest.approx(4 * (embedding + 2 * layer))  # the layer at work, the next one, the embedding
    assert p.copies == pytest.approx(4 * (embedding + 2 * layer) + n / 4 * 4 + 4 * embedding)  # and a layer's gradients
    assert p.moments["step"]["copies"] == 0
    zero1, zero2 = (plan(config, "full", n_devices=8, strategy=s, **args) for s in ("zero1", "zero2"))
    assert (zero1.weights, zero1.gradients, zero1.optimizer) == (4 * n, 4 * n, n) and (zero2.gradients, zero2.optimizer) == (n / 2, n)
    off = plan(config, "full", strategy="offload", **args)
    assert off.weights == off.optimizer == off.gradients == 0 and off.host == 16 * n and off.copies == p.copies
    assert plan(config, "full", strategy="fsdp", **args).moments == plan(config, "full", **args).moments  # one device shares with nobody


def test_the_plan_is_its_highest_moment():
    p = plan("llama-3-8b", "full", batch_size=4, length=1024, margin=0.25)
    sums = [sum(parts.values()) for parts in p.moments.values()]
    assert p.peak == max(sums) and p.total == 1.25 * max(sums) and p.total < 1.25 * sum(getattr(p, part) for part in PARTS)
    assert set(p.moments) == {"loss", "first layer back", "last layer back", "step"}
    assert p.moments["step"] == dict(weights=p.weights, gradients=4 * p.model.n_params, optimizer=8 * p.model.n_params, activations=0, loss=0, work=0, copies=0)


def test_more_of_anything_needs_more():
    base = dict(model="llama-3-8b", method="lora", batch_size=2, length=1024)
    at = lambda **more: plan(**{**base, **more}).peak
    assert at() < at(batch_size=4) < at(batch_size=4, checkpointing=False) < at(batch_size=4, checkpointing=False, loss="whole") < at(batch_size=4, checkpointing=False, loss="whole", dtype="float32")
    assert at(method="qlora") < at() < at(r=64) < at(method="full", optimizer="sgd") < at(method="full", optimizer="adamw8bit") < at(method="full")


# --- where a model comes from ---------------------------------------------------------------------------
def test_folder_dict_config_model_and_names_agree(tmp_path):
    config = small(3)
    config.save_pretrained(tmp_path)
    for source in (tmp_path, str(tmp_path), config, config.to_dict(), AutoModelForCausalLM.from_config(config)): assert anatomy(source) == anatomy(config)
    assert anatomy("tiny").n_params == load("tiny")[0].num_parameters()
    assert anatomy("meta-llama/Llama-2-7b-hf").n_params == anatomy("Llama-2-7B").n_params == 6_738_415_616


def test_unknown_architectures_are_counted_as_a_llama_and_say_so():
    invented = dict(model_type="braided", dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=512, d_ff=172, tie_word_embeddings=True)
    m = anatomy(invented)
    assert m.n_params == anatomy(small(3)).n_params and "braided" in m.notes[0] and "Llama" in m.notes[0]
    assert "Note: Architecture 'braided'" in plan(invented).table()
    assert anatomy(small()).notes == ()
    p = plan(AutoConfig.for_model("olmo2", num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=512))
    assert "general formula" in p.notes[0] and p.peak > 0  # parameters exact, activations not measured


def test_code_of_others_is_never_run(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    (tmp_path / "config.json").write_text(json.dumps({**small().to_dict(), "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}))
    assert anatomy(tmp_path).n_params == anatomy(small()).n_params


@pytest.mark.parametrize("model, words", [
    ("no-such-model", "can't be reached"), ("lama-3-8b", "Did you mean 'llama-3-8b'"), (dict(model_type="braided", dim=64), "num_hidden_layers, num_attention_heads, vocab_size"), ({}, "doesn't say"),
    (dict(model_type="t5", is_encoder_decoder=True), "encoder and a decoder")])
def test_models_that_cannot_be_planned(model, words):
    with pytest.raises(ValueError, match="^plan: ") as e: plan(model)
    assert words in str(e.value)


def test_folders_that_cannot_be_planned(tmp_path):
    with pytest.raises(ValueError, match="no config.json"): plan(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"): plan(tmp_path)


@pytest.mark.parametrize("setting", [dict(method="dora"), dict(dtype="int8"), dict(loss="half"), dict(optimizer="lion"), dict(strategy="pipeline"), dict(batch_size=0), dict(length=0), dict(r=0),
                                     dict(n_devices=0), dict(batch_size=1.5), dict(margin=1), dict(margin=-0.1)])
def test_settings_that_there_are_not(setting):
    with pytest.raises(ValueError, match=f"^plan: {next(iter(setting))}="): plan("smollm2-135m", **setting)


def test_a_misspelt_setting_is_an_error():
    with pytest.raises(TypeError): plan("smollm2-135m", batchsize=2)
    with pytest.raises(ValueError, match="matches no linear layer"): plan("smollm2-135m", targets=["query"])


def test_fits_means_with_margin_and_context():
    p = plan("smollm2-135m", "full", margin=0.5)
    assert p.total == 1.5 * p.peak and p.fits(p.total / 1e9 + 0.61) and not p.fits(p.total / 1e9 + 0.59)


# --- cards and suggestions ------------------------------------------------------------------------------
def test_cards():
    assert {n: GPUS[n].gb for n in ("t4", "l4", "a100-40", "a100-80", "h100", "h200", "rtx-3090", "rtx-4060", "rtx-4090", "rtx-5090")} == {
        "t4": 16, "l4": 24, "a100-40": 40, "a100-80": 80, "h100": 80, "h200": 141, "rtx-3090": 24, "rtx-4060": 8, "rtx-4090": 24, "rtx-5090": 32}
    assert not GPUS["t4"].bf16 and not GPUS["v100-16"].bf16 and GPUS["l4"].bf16 and all(g.usable < g.gb * 1e9 and g.source for g in GPUS.values())
    for name, found in (("T4", "t4"), ("Tesla T4", "t4"), ("RTX 4090", "rtx-4090"), ("4090", "rtx-4090"), ("NVIDIA A100-80GB", "a100-80"), ("a100_40gb", "a100-40")): assert find_gpu(name) is GPUS[found]
    assert find_gpu(24).gb == find_gpu("24 GB").gb == 24
    for wrong, words in (("a100", "one of a100-40 and a100-80"), ("h10", "Did you mean 'h100'"), ("abacus", "There are t4")):
        with pytest.raises(ValueError) as e: find_gpu(wrong)
        assert words in str(e.value)


@pytest.mark.parametrize("model, setting, gpu, changes", [
    ("smollm2-135m", dict(method="full", batch_size=32, length=1024, checkpointing=False), "rtx-4060", ("checkpointing=True",)),
    ("qwen2.5-0.5b", dict(batch_size=4, length=4096, loss="whole"), "l4", ("loss='trees'",)),
    ("llama-3-8b", dict(), "t4", ("method='qlora'",)), ("smollm2-135m", dict(), "t4", ())])
def test_one_change_where_one_is_enough(model, setting, gpu, changes):
    better = plan(model, **setting).suggest(gpu)
    assert better.changes == changes and better.fits(gpu)


def test_suggestions_fit_and_none_of_their_changes_is_idle():
    for model, setting, gpu in (("llama-3-8b", dict(method="full", batch_size=8, length=2048, checkpointing=False, loss="whole"), "t4"), ("llama-2-70b", dict(method="full", batch_size=4), "a100-40"),
                                ("llama-2-13b", dict(method="lora", batch_size=16, length=4096, loss="whole"), "rtx-3090")):
        asked = plan(model, **setting)
        better = asked.suggest(gpu)
        assert not asked.fits(gpu) and better.fits(gpu) and better.changes
        for name in {f.name for f in fields(Setting) if getattr(asked.setting, f.name) != getattr(better.setting, f.name)} - {"dtype", "n_devices", "optimizer"}:
            assert not plan(model, **{**{f.name: getattr(better.setting, f.name) for f in fields(Setting)}, name: getattr(asked.setting, name)}).fits(gpu), name


def test_a_smaller_batch_says_how_much_to_accumulate():
    better = plan("smollm2-135m", "full", batch_size=64, length=2048).suggest("rtx-4060")
    assert f"batch_size={better.setting.batch_size} with accumulate={64 // better.setting.batch_size}" in better.changes and better.setting.method == "full"


def test_nothing_makes_it_fit(): assert plan("gpt-3", "full").suggest(1) is None


# --- the command ----------------------------------------------------------------------------------------
def call(*args):
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(a) for a in args])
    assert done.exception is None or isinstance(done.exception, SystemExit), f"{args}: {done.exception!r}"
    return done.exit_code, done.stdout, done.stderr


def test_command_has_the_settings_and_their_defaults():
    ours = inspect.signature(plan_memory).parameters
    assert set(ours) - {"model", "gpu", "as_json"} == {f.name for f in fields(Setting)}
    for f in fields(Setting): assert ours[f.name].default == f.default, f.name


def test_command():
    code, out, _ = call("plan", "llama-65b", "--method", "qlora", "--gpu", "a6000", "--json")
    found = json.loads(out)
    assert code == 0 and found["fits"] is True and 24e9 < found["total"] < 48e9 and found["n_params"] == 65_285_660_672 and found["suggestion"] is None
    assert found["total"] == plan("llama-65b", "qlora").total and "a6000" in found["cards"] and "rtx-4090" not in found["cards"]
    code, out, _ = call("plan", "llama-3-8b", "--batch", 4, "--length", 1024, "--no-checkpointing", "--gpu", "t4")
    assert code == 1 and "Does not fit" in out and "It would with method='qlora'" in out
    code, out, _ = call("plan", "smollm2-135m", "--gpu", "t4")
    assert code == 0 and "no bfloat16" in out
    code, out, _ = call("plan", "smollm2-135m", "--targets", "q_proj,v_proj", "--devices", 2, "--strategy", "fsdp")
    assert code == 0 and "on each device" in out and "rtx-4060" in out
    assert "computer's memory" in call("plan", "llama-2-7b", "--method", "full", "--strategy", "offload")[1]
    assert "no change that we know" in call("plan", "gpt-3", "--method", "full", "--gpu", 1)[1]


@pytest.mark.parametrize("args, code, words", [(["no-such-model"], 1, "no config"), (["tiny", "--gpu", "abacus"], 1, "no card we know"), (["tiny", "--method", "dora"], 1, "method='dora'"),
                                               (["tiny", "--batch", 0], 2, ""), ([], 2, "")])
def test_command_says_what_is_wrong(args, code, words):
    got, _, err = call("plan", *args)
    assert got == code and words in err and "Traceback" not in err and (code == 2 or err.count("\n") == 1)


def test_the_module_and_the_commands_help_are_light():
    code = ("import sys, ftcourse.tune.memory\nfrom ftcourse.cli import app\ntry: app(['plan', '--help'], prog_name='ftcourse')\nexcept SystemExit as e: assert not e.code\n"
            "print([m for m in ('torch', 'transformers') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr
