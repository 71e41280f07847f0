"Trees against plain rows, model by model; the expected numbers come from each model's own logits on one unpadded row."
import logging
import pytest, torch
from torch import nn
from ftcourse.data.batches import Tree, pack
from ftcourse.tune import trees as T
from ftcourse.tune.trees import batch_trees, can_use_trees, head_logps, reply_logps

V = 97


def build(kind, **more):
    "A random-weight model of a family, float32, from its config alone."
    import transformers as tf
    small = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128)
    gqa = dict(small, num_key_value_heads=2)
    make = {
        "llama": lambda: tf.LlamaConfig(**gqa | more), "qwen2": lambda: tf.Qwen2Config(**gqa | more),
        "qwen3": lambda: tf.Qwen3Config(**gqa | dict(head_dim=8) | more), "gemma": lambda: tf.GemmaConfig(**gqa | dict(head_dim=8) | more),
        "mistral": lambda: tf.MistralConfig(**gqa | dict(sliding_window=None) | more), "phi": lambda: tf.PhiConfig(**small | more),
        "phi3": lambda: tf.Phi3Config(**gqa | dict(pad_token_id=0, sliding_window=None) | more),
        "gpt2": lambda: tf.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=128, **more),
        "neox": lambda: tf.GPTNeoXConfig(**small | more),
        "opt": lambda: tf.OPTConfig(vocab_size=V, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128,
                                    word_embed_proj_dim=32, **more),
        "falcon": lambda: tf.FalconConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **more),
        "cohere": lambda: tf.CohereConfig(**gqa | dict(logit_scale=0.25) | more),
        "granite": lambda: tf.GraniteConfig(**gqa | dict(logits_scaling=4.0) | more),
        "gemma2": lambda: tf.Gemma2Config(**gqa | dict(head_dim=8, sliding_window=8) | more),
        "bloom": lambda: tf.BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4, **more),
    }
    torch.manual_seed(1)
    model = tf.AutoModelForCausalLM.from_config(make[kind]())
    with torch.no_grad():                              # random biases too: many start at zero and would hide a fault
        for p in model.parameters():
            if p.dim() == 1: p.add_(0.1*torch.randn_like(p))
            else: p.mul_(3)
    return model.float().eval()


def forest(seed=0, n=5):
    "Trees of 1 to 3 replies with random ids and some tokens that don't count."
    g = torch.Generator().manual_seed(seed)
    draw = lambda lo, hi: int(torch.randint(lo, hi, (1,), generator=g))
    ids = lambda k: tuple(torch.randint(3, V, (k,), generator=g).tolist())
    out = []
    for i in range(n):
        replies = tuple(ids(draw(1, 10)) for _ in range(draw(1, 4)))
        masks = tuple(tuple(int(j == len(r) - 1 or draw(0, 4) > 0) for j in range(len(r))) for r in replies)
        out.append(Tree(ids(draw(1, 12)), replies, masks, i))
    return out


def by_hand(model, trees, grad=False):
    "Log-probabilities of every reply from one unpadded row each, through the model's own logits and torch's log_softmax."
    out = []
    with torch.set_grad_enabled(grad):
        for t in trees:
            for reply, mask in zip(t.replies, t.masks):
                logps = model(input_ids=torch.tensor([t.prompt_ids + reply]), use_cache=False).logits[0].float().log_softmax(-1)
                p = len(t.prompt_ids)
                out.append(torch.stack([logps[p + j - 1, y]*mask[j] for j, y in enumerate(reply)]))
    return out


def gap(got, want):
    "Largest difference, padding included: beyond a reply there must be exact zeros."
    worst = 0.
    for row, w in zip(got, want, strict=True):
        worst = max(worst, (row[:len(w)] - w).abs().max().item(), row[len(w):].abs().max().item() if len(row) > len(w) else 0.)
    return worst


YES = ["llama", "qwen2", "qwen3", "gemma", "mistral", "phi", "phi3", "gpt2", "neox", "opt", "falcon", "cohere", "granite"]


@pytest.mark.parametrize("kind", YES)
def test_trees_equal_plain_rows(kind):
    # item 51 and item 61: packed trees leak nothing; one forward of all equals one forward each, in every packing
    model, trees = build(kind), forest()
    assert can_use_trees(model)
    want = by_hand(model, trees)
    for kw in (dict(), dict(max_tokens=sum(map(len, trees))), dict(max_tokens=60), dict(share=False), dict(pad_id=5)):
        batch = pack(trees, **kw)
        with torch.no_grad(): got, mask = reply_logps(model, batch)
        assert got.dtype == torch.float32 and got.shape == mask.shape
        assert gap(got, want) < 1e-4, (kind, kw)
    order = [3, 1, 4, 0, 2]                              # batch order does not matter
    got = reply_logps(model, pack([trees[i] for i in order]))[0]
    assert gap(got.detach(), by_hand(model, [trees[i] for i in order])) < 1e-4


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma", "qwen3"])
@pytest.mark.parametrize("tuned", ["body", "all"])
def test_gradients_equal_the_plain_computation(kind, tuned):
    # item 61, for gradients; with the output layer frozen and with it learning (tied to the embedding)
    model, trees = build(kind), forest(seed=3)
    model.get_output_embeddings().weight.requires_grad_(tuned == "all")
    weights = [p for p in model.parameters() if p.requires_grad]
    coef = torch.randn(sum(len(t.replies) for t in trees), generator=torch.Generator().manual_seed(0))
    def grads(total):
        for p in weights: p.grad = None
        total.backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in weights]
    want = grads(sum(c*w.sum() for c, w in zip(coef, by_hand(model, trees, grad=True))))
    got = grads((reply_logps(model, batch_trees(trees, model), chunk=7)[0].sum(1)*coef).sum())
    for a, b in zip(got, want): torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-3)


def test_every_way_is_one_computation(caplog):
    model, trees = build("llama"), forest(seed=5)
    batch, want = pack(trees), by_hand(model, trees)
    assert T._way(model) == "blocks"                     # on a CPU the engine attends by itself
    for way in ("blocks", "mask"): assert gap(T._logps(model, batch, way).detach(), want) < 1e-5
    for own in ("sdpa", "eager"):
        model.set_attn_implementation(own)
        reply_logps(model, batch)
        assert model.config._attn_implementation == own  # the user's setting comes back
    def broken(*a, **k): raise KeyboardInterrupt
    model.model.layers[0].mlp.forward = broken
    with pytest.raises(KeyboardInterrupt): reply_logps(model, batch)
    assert model.config._attn_implementation == "eager" and T._plan is None


@pytest.mark.parametrize("kind,more", [("mistral", dict(sliding_window=8)), ("phi3", dict(sliding_window=8)), ("gemma2", {}), ("bloom", {})])
def test_windows_and_alibi_fall_back(kind, more, caplog):
    model = build(kind, **more)
    tree = Tree(tuple(range(3, 15)), (tuple(range(20, 32)), tuple(range(40, 44))), ((1,)*12, (1,)*4))  # a row of 24: longer than the window
    with caplog.at_level(logging.WARNING, "ftcourse"):
        assert not can_use_trees(model, 24) and not can_use_trees(model, 24)
    assert len(caplog.records) == 1                      # says why, once
    batch = batch_trees([tree], model)
    assert not batch.share
    assert gap(reply_logps(model, batch)[0].detach(), by_hand(model, [tree])) < 1e-4
    with pytest.raises(ValueError, match="batch_trees"): reply_logps(model, pack([tree]))


def test_a_window_longer_than_the_row_is_no_window():
    model, trees = build("mistral", sliding_window=40), forest()
    assert not can_use_trees(model) and can_use_trees(model, 30)
    batch = batch_trees(trees, model)
    assert batch.share and gap(reply_logps(model, batch)[0].detach(), by_hand(model, trees)) < 1e-4


def test_the_probe_notices_a_model_that_ignores_masks():
    "A model whose attention looks over the borders, whatever it is given, gets no trees."
    model = build("llama")
    forward = model.model.forward
    def deaf(input_ids=None, position_ids=None, attention_mask=None, **kw):
        if attention_mask is not None and attention_mask.dim() == 4: attention_mask = None
        return forward(input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, **kw)
    model.model.forward = deaf
    assert T._differs(model, "mask") > 0.05


def test_head_logps_against_log_softmax():
    # item 56, and item 53: one log-probability for each target, float32 after the matmul
    torch.manual_seed(0)
    for bias in (False, True):
        for scale, cap in ((1., None), (0.3, None), (1., 2.), (1.7, 1.2)):
            head = nn.Linear(8, 13, bias=bias).double()
            h, y = torch.randn(11, 8, dtype=torch.float64, requires_grad=True), torch.randint(13, (11,))
            def plain(h):
                z = head(h)*scale
                return torch.log_softmax(torch.tanh(z/cap)*cap if cap else z, -1)[torch.arange(11), y]
            for frozen in (True, False):
                head.requires_grad_(not frozen)
                torch.testing.assert_close(head_logps(h, head, y, scale, cap, chunk=4), plain(h), rtol=0, atol=1e-12)
                assert torch.autograd.gradcheck(lambda h: head_logps(h, head, y, scale, cap, 4), (h,))
            w = torch.randn(11, dtype=torch.float64)
            a = torch.autograd.grad((head_logps(h, head, y, scale, cap, 4)*w).sum(), [h, *head.parameters()])
            b = torch.autograd.grad((plain(h)*w).sum(), [h, *head.parameters()])
            for x, z in zip(a, b): torch.testing.assert_close(x, z, rtol=0, atol=1e-12)


def test_log_softmax_runs_in_float32():
    # item 56: bf16 logits of 20 and 20.0625 are one number in bf16 after exp and sum; the float32 answer is known by hand
    head = nn.Linear(1, 512, bias=False).bfloat16().requires_grad_(False)
    with torch.no_grad(): head.weight.fill_(1.)
    for h in (torch.ones(3, 1, dtype=torch.bfloat16), torch.ones(3, 1, dtype=torch.bfloat16, requires_grad=True)):
        got = head_logps(h, head, torch.tensor([0, 5, 511]))
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.detach(), torch.full((3,), -6.2383246), rtol=0, atol=1e-5)  # -ln 512; bf16 would say -6.25


def test_no_tensor_of_all_tokens_times_vocabulary():
    "The largest tensor that the output layer makes is one chunk of logits."
    from torch.utils._python_dispatch import TorchDispatchMode
    class Largest(TorchDispatchMode):
        n = 0
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            for o in (out if isinstance(out, (tuple, list)) else [out]):
                if isinstance(o, torch.Tensor): Largest.n = max(Largest.n, o.numel())
            return out
    for frozen in (True, False):
        head = nn.Linear(4, 1000, bias=False).requires_grad_(not frozen)
        h, y = torch.randn(64, 4, requires_grad=True), torch.randint(1000, (64,))
        Largest.n = 0
        with Largest(): head_logps(h, head, y, chunk=8).sum().backward()
        assert Largest.n == 8*1000


def test_without_gradients_no_jacobian(monkeypatch):
    seen = []
    real = T._logp_and_jacobian
    monkeypatch.setattr(T, "_logp_and_jacobian", lambda *a: (seen.append(a[-1]), real(*a))[1])
    head, h, y = nn.Linear(4, 9).requires_grad_(False), torch.randn(3, 4, requires_grad=True), torch.tensor([1, 2, 3])
    with torch.no_grad(): head_logps(h, head, y)
    head_logps(h.detach(), head, y)
    head_logps(h, head, y)
    assert seen == [False, False, True]


def test_reply_logps_counts_only_what_the_mask_counts():
    # item 54: prompt and padding are never in the output, for every reply of a pair
    model = build("llama")
    tree = Tree((5, 6, 7), ((8, 9, 10), (11,)), ((1, 0, 1), (1,)))
    got, mask = reply_logps(model, pack([tree]))
    assert mask.tolist() == [[1, 0, 1], [1, 0, 0]]
    assert (got != 0).int().tolist() == [[1, 0, 1], [1, 0, 0]]


def test_batch_mates_do_not_matter():
    # item 96, for log-probabilities: alone or among others
    model, trees = build("llama"), forest(seed=9)
    together = reply_logps(model, pack(trees))[0].detach()
    alone = [r for t in trees for r in reply_logps(model, pack([t]))[0].detach()]
    assert max((a - b[:len(a)]).abs().max().item() for a, b in zip(alone, together)) < 1e-5


def test_opt_reads_positions_not_the_mask():
    "OPT counts positions from its attention mask unless position ids are given: a reply's must go on from its prompt."
    model = build("opt")
    tree = Tree((5, 6, 7), ((8, 9, 10), (11, 12)), ((1, 1, 1), (1, 1)))
    assert gap(reply_logps(model, pack([tree], max_tokens=20))[0].detach(), by_hand(model, [tree])) < 1e-5


def test_checkpointing_gives_the_same_gradients():
    trees = forest(seed=2)
    out = []
    for checkpointing in (False, True):
        model = build("llama").train()
        if checkpointing: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
        reply_logps(model, pack(trees))[0].sum().backward()
        out.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*out): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_encoder_decoder_is_refused():
    import transformers as tf
    model = tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=V, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, decoder_start_token_id=0))
    with pytest.raises(ValueError, match="causal"): reply_logps(model, pack(forest()))


def test_dropout_stays_the_models_own():
    "With dropout on attention weights the engine leaves attention to the model, and still packs."
    model, trees = build("gpt2", attn_pdrop=0.5, resid_pdrop=0., embd_pdrop=0.), forest()
    model.train()
    a, b = reply_logps(model, pack(trees))[0], reply_logps(model, pack(trees))[0]
    assert not torch.equal(a, b)
    model.eval()
    assert gap(reply_logps(model, pack(trees))[0].detach(), by_hand(model, trees)) < 1e-4


def test_under_autocast():
    "Mixed precision, the Trainer's way on float32 weights: numbers near float32's, gradients of every weight finite and near."
    trees = forest(seed=4)
    grads = []
    for on in (False, True):
        model = build("llama").train()
        with torch.autocast("cpu", torch.bfloat16, enabled=on): out = reply_logps(model, batch_trees(trees, model))[0]
        out.sum().backward()
        grads.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        assert out.dtype == torch.float32
    for a, b in zip(*grads): assert (a - b).norm() < 0.06*a.norm() + 1e-6
    model = build("llama").train()
    model.config.attention_dropout = 0.1                 # the engine leaves attention to the model, through the mask
    with torch.autocast("cpu", torch.bfloat16): assert reply_logps(model, pack(trees))[0].isfinite().all()


@pytest.mark.slow
@pytest.mark.real
def test_trees_equal_plain_rows_on_smollm2():
    # item 51 and item 61 on the real model in float32, prompts with two replies; gradients of a first and a last layer's weight
    from ftcourse.data.batches import encode_rows
    from ftcourse.data.sets import load_set
    from ftcourse.models import load
    model, tok = load("smollm2-135m", dtype=torch.float32)
    say = lambda role, text: [{"role": role, "content": text}]
    trees = encode_rows([{"prompt": say("user", (r["instruction"] + "\n" + r["input"]).strip()), "chosen": say("assistant", r["chosen"]),
                          "rejected": say("assistant", r["rejected"])} for r in load_set("preferences")[:4]], tok)
    want = by_hand(model, trees)
    for kw in (dict(), dict(max_tokens=sum(map(len, trees))), dict(share=False)):
        with torch.no_grad(): assert gap(reply_logps(model, pack(trees, **kw))[0], want) < 1e-4
    weights = [model.model.layers[0].self_attn.k_proj.weight, model.model.layers[-1].mlp.up_proj.weight]
    for p in model.parameters(): p.requires_grad_(any(p is w for w in weights))
    a = torch.autograd.grad(sum(w.sum() for w in by_hand(model, trees[:2], grad=True)), weights)
    b = torch.autograd.grad(reply_logps(model, pack(trees[:2]))[0].sum(), weights)
    for x, y in zip(a, b): assert (x - y).abs().max() < 1e-3*x.abs().max()  # plain float32 itself is 1e-4 from float64 here, ours 6e-6


def test_collator_in_a_data_loader():
    "Each batch holds its own trees' log-probabilities, whatever the loader put together."
    from torch.utils.data import DataLoader

    from ftcourse.data.batches import Tree
    from ftcourse.models import load
    from ftcourse.tune.trees import tree_collator
    model, _ = load("tiny")
    trees = [Tree((5, 6, 7, i), ((8, i, 9),), ((1, 1, 1),), i) for i in range(10, 15)]
    alone = [model(torch.tensor([t.prompt_ids + t.replies[0]])).logits[0, 3:-1].log_softmax(-1) for t in trees]
    for batch in DataLoader(trees, batch_size=2, collate_fn=tree_collator(model)):
        logps, _ = reply_logps(model, batch)
        for got, row in zip(logps, batch.rows):
            expected = alone[row - 10][range(3), list(trees[row - 10].replies[0])]
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
