"""Where the rank matters: one matrix that must tell 32 things apart, at eight ranks; and the whole model on EmojiBot, at three ranks and in full.

    python tests/studies/rank.py [--workers 2] [--tiny]

About six minutes on two cores. `one`: the model gives each of 256 invented words one of 32 labels, drawn at random; only the last block's `down_proj` learns, so everything before it is
computed once. Each rank, and the full matrix (r = 0), runs at four learning rates; the best one of seed 0 goes on with two more seeds. `whole`: a few steps of EmojiBot; what the full
change of some matrices looks like, and how much of it LoRA found. All of it goes to data/results/rank.json, which the chapter 3_tune/adapters reads.
"""
import json, random, re, time

from study import do, options, save

RANKS, SEEDS, N_WORDS, N_LABELS, N_STEPS = (1, 2, 4, 8, 16, 32, 64, 0), (0, 1, 2), 256, 32, 300
RATES = {"lora": (1e-3, 3e-3, 1e-2, 3e-2), "full": (1e-4, 3e-4, 1e-3, 3e-3)}
WHOLE_RANKS, WHOLE_STEPS, N_HELD, N_VALUES = (1, 8, 64), 16, 32, 64
WHOLE_RATES = {"lora": (1e-3,), "full": (3e-5, 1e-4)}


def rates(table, r): return table["lora" if r else "full"]


# --- one matrix -----------------------------------------------------------------------------------------------
def words(n, seed=0):
    "Words that no model has read."
    draw, found = random.Random(seed), {}
    while len(found) < n: found["".join(draw.choice("bdfgklmnprtvz") + draw.choice("aeiou") for _ in range(3))] = None
    return list(found)


def label_ids(tokenizer, n):
    "Ids of n tokens that are whole words, or letters where the vocabulary has only those."
    vocab = sorted(tokenizer.get_vocab().items())
    found = next(ids for ids in ([i for t, i in vocab if re.fullmatch(p, t)] for p in ("Ġ[a-z]{4,8}", "[A-Za-z]")) if len(ids) >= n)
    return random.Random(0).sample(found, n)


def features(job, folder):
    "What the last `down_proj` reads at the end of each prompt, (n, k), what its block gives, (n, d), the final norm's weight and the labels' rows of the output layer."
    import torch
    from safetensors.torch import save_file
    from ftcourse.models import left_pad, load
    model, tokenizer = load(job["model"], dtype=torch.float32)
    block, seen = model.model.layers[-1], {"x": [], "h": []}
    block.mlp.down_proj.register_forward_hook(lambda m, args, out: seen["x"].append(args[0][:, -1]))
    block.register_forward_hook(lambda m, args, out: seen["h"].append((out[0] if isinstance(out, tuple) else out)[:, -1]))
    prompts = [tokenizer(f"The word {w} means")["input_ids"] for w in words(job["n_words"])]
    with torch.no_grad():
        for i in range(0, len(prompts), 32):
            ids, mask, positions = left_pad(prompts[i:i+32])
            model.model(input_ids=ids, attention_mask=mask, position_ids=positions)
    labels = label_ids(tokenizer, job["n_labels"])
    save_file({**{k: torch.cat(v) for k, v in seen.items()}, "norm": model.model.norm.weight.data.clone(), "head": model.lm_head.weight.data[labels].clone()}, folder/"features.safetensors")
    return {}


def one(job, folder):
    "Train the change of one matrix; its loss, its singular values, and for LoRA its share of the full change's directions."
    import torch
    from safetensors.torch import load_file
    from torch import nn
    from torch.nn import functional as F
    from ftcourse.tune.lora import LoRALinear
    f, started, r = load_file(folder/"features.safetensors"), time.time(), job["r"]
    (n, k), d, n_labels = f["x"].shape, f["h"].shape[1], len(f["head"])
    gen = torch.Generator().manual_seed(job["seed"])
    y = torch.randint(n_labels, (n,), generator=gen)
    change = nn.Linear(k, d, bias=False)
    nn.init.zeros_(change.weight)
    if r: change = LoRALinear(change, r, alpha=2*r, generator=gen)
    trained = [p for p in change.parameters() if p.requires_grad]
    opt = torch.optim.Adam(trained, job["lr"])
    for t in range(job["n_steps"]):
        opt.param_groups[0]["lr"] = job["lr"]*(1 - t/job["n_steps"])
        logits = F.rms_norm(f["h"] + change(f["x"]), (d,), f["norm"], 1e-5) @ f["head"].T  # (n, n_labels)
        loss = F.cross_entropy(logits, y)
        opt.zero_grad(), loss.backward(), opt.step()
    with torch.no_grad(): values = torch.linalg.svdvals(change.delta() if r else change.weight)
    return dict(loss=loss.item(), accuracy=(logits.argmax(-1) == y).float().mean().item(), n_trained=sum(p.numel() for p in trained),
                singular_values=values[:N_VALUES].tolist(), seconds=round(time.time() - started, 1))


# --- the whole model ------------------------------------------------------------------------------------------
def matrices(model):
    "Names of some matrices: attention's values and the feed-forward's last, in the first, the middle and the last block."
    n = len(model.model.layers)
    return [f"model.layers.{i}.{part}" for i in dict.fromkeys((0, n//2, n - 1)) for part in ("self_attn.v_proj", "mlp.down_proj")]


def held_out_loss(model, tokenizer, n):
    "Nats per reply token on validation rows."
    import torch
    from ftcourse.data.batches import encode_rows
    from ftcourse.data.sets import load_set
    from ftcourse.tune.sft import sft_loss
    from ftcourse.tune.trees import batch_trees, reply_logps
    trees = encode_rows(load_set("emojibot", "validation")[:n], tokenizer)
    with torch.no_grad(): return sft_loss(*reply_logps(model, batch_trees(trees, model))).item()


def whole(job, folder):
    "A few steps on EmojiBot; the change of some matrices."
    import torch
    from safetensors.torch import load_file, save_file
    from ftcourse.data.sets import load_set
    from ftcourse.models import load
    from ftcourse.tune.adapters import subspace_overlap
    from ftcourse.tune.sft import finetune
    model, tokenizer = load(job["model"])
    started, r, names = time.time(), job["r"], matrices(model)
    W0 = {n: model.get_submodule(n).weight.detach().float().clone() for n in names}
    before = held_out_loss(model, tokenizer, job["n_held"])
    bot = finetune((model, tokenizer), load_set("emojibot"), method="lora" if r else "full", r=r or 8, alpha=2*r or 16, lr=job["lr"], max_steps=job["n_steps"],
                   seed=job["seed"], progress=False)
    change = {n: (model.get_submodule(n).delta() if r else model.get_submodule(n).weight.detach() - W0[n]) for n in names}
    parts = {n: torch.linalg.svd(c.detach(), full_matrices=False) for n, c in change.items()}  # U (d, n), S (n,), Vh (n, k)
    if not r: save_file({f"{n}.{x}": t[:, :N_VALUES].contiguous() for n, (U, S, Vh) in parts.items() for x, t in (("U", U), ("V", Vh.T))}, folder/f"full_{job['lr']}.safetensors")
    theirs, found = load_file(folder/f"full_{job['full_lr']}.safetensors") if r else {}, {}
    for n, (U, S, Vh) in parts.items():
        k = min(r, 8)
        found[n] = dict(shape=list(W0[n].shape), singular_values=S[:N_VALUES].tolist(), energy=S.square().sum().item())
        if r: found[n] |= dict(of=k, overlap_out=subspace_overlap(U[:, :k], theirs[f"{n}.U"][:, :k]), overlap_in=subspace_overlap(Vh[:k].T, theirs[f"{n}.V"][:, :k]))
    return dict(loss_before=before, loss=held_out_loss(bot.model, tokenizer, job["n_held"]), n_trained=sum(p.numel() for p in bot.model.parameters() if p.requires_grad),
                matrices=found, seconds=round(time.time() - started, 1))


def best(records, r):
    "The learning rate with the lowest loss."
    return min((x for x in records if x["r"] == r), key=lambda x: x["loss"])["lr"]


def main():
    a = options(__doc__, "rank").parse_args()
    name, n_words, n_labels, n_steps = ("tiny", 128, 16, 150) if a.tiny else ("smollm2-135m", N_WORDS, N_LABELS, N_STEPS)
    whole_steps, n_held, seeds = (4, 8, SEEDS[:2]) if a.tiny else (WHOLE_STEPS, N_HELD, SEEDS)
    go = lambda jobs, run: do(jobs, run, a.folder, a.workers)
    go([dict(part="features", model=name, n_words=n_words, n_labels=n_labels)], features)
    job = lambda r, lr, seed: dict(part="one", r=r, lr=lr, seed=seed, n_steps=n_steps)
    grid = go([job(r, lr, seeds[0]) for r in RANKS for lr in rates(RATES, r)], one)
    rate = {r: best(grid, r) for r in RANKS}
    runs = go([job(r, rate[r], s) for r in RANKS for s in seeds], one)
    job = lambda r, lr, **more: dict(part="whole", model=name, r=r, lr=lr, seed=0, n_steps=whole_steps, n_held=n_held, **more)
    full = go([job(0, lr) for lr in rates(WHOLE_RATES, 0)], whole)
    lora = go([job(r, lr, full_lr=best(full, 0)) for r in WHOLE_RANKS for lr in rates(WHOLE_RATES, r)], whole)
    slim = lambda x: {k: v for k, v in x.items() if k != "singular_values"}
    records = list({json.dumps(x, sort_keys=True): x for x in grid + runs + full + lora}.values())  # seed 0 of the best rate is in both
    save("rank", a.workers, records, model=name, seeds=seeds, n_words=n_words, n_labels=n_labels, grid=[slim(x) for x in grid], one=runs, whole=full + lora)


if __name__ == "__main__": main()
