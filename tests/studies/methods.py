"""Every method of fine-tuning on EmojiBot: the same rows in the same order, each method at its usual learning rate and at higher ones.

    python tests/studies/methods.py [--methods lora ia3 ...] [--factors 1 3 10] [--seeds 0] [--steps 24] [--tiny --folder /tmp/methods]

About ten minutes on two cores. Each method runs at so many times its usual rate; the rate with the lowest validation loss (for the head, the most acceptable answers) at the first seed goes on to the other seeds.
All of it goes to data/results/methods.json, which the chapter 3_tune/methods reads.
"""
import time

from study import do, options, save

BATCH, N_VALIDATION, N_TEST, N_OLD = 8, 48, 48, 24


def data(tokenizer, tiny):
    "Rows and their trees to train on; trees to validate on, of the old task, and of the test messages; the test rows."
    from ftcourse.data.batches import encode_rows
    from ftcourse.data.formats import to_messages
    from ftcourse.data.sets import EMOJI_SYSTEM, load_set
    n = (lambda full: 6) if tiny else (lambda full: full)
    rows, tests = load_set("emojibot", "train"), load_set("emojibot", "test")[:n(N_TEST)]
    short = sorted(encode_rows([to_messages(r) for r in load_set("instructions")[:200]], tokenizer), key=len)[:100]
    asked = [[{"role": "system", "content": EMOJI_SYSTEM}, {"role": "user", "content": t["message"]}, {"role": "assistant", "content": t["acceptable"][0]}] for t in tests]
    encode = lambda rows: encode_rows(rows, tokenizer)
    return dict(rows=rows, train=encode(rows), validation=encode(load_set("emojibot", "validation")[:n(N_VALIDATION)]), old=short[::len(short)//n(N_OLD)][:n(N_OLD)],
                tests=tests, asked=encode([{"messages": m} for m in asked]))


def cost(model, step):
    "The model's weights and the most that tensors hold beside them in one step, in bytes."
    from ftcourse.tune.memory import peak_bytes
    from ftcourse.tune.quantize import weight_bytes
    return weight_bytes(model) + peak_bytes(step)


def losses_and_scores(model, tokenizer, d):
    "Of a model that writes: validation loss, the old task's, and shares of good answers."
    from ftcourse.tune.forgetting import emoji_scores, held_out_loss
    return dict(loss=held_out_loss(model, d["validation"]), old_loss=held_out_loss(model, d["old"]), **emoji_scores(model, tokenizer, d["tests"]))


def text_run(model, tokenizer, job, d):
    "Train a language model; its losses, answers and costs."
    import torch
    from ftcourse.tune.methods import trainable
    from ftcourse.tune.sft import SFT, sft_loss
    from ftcourse.tune.trainer import Run, TreeTrainer
    from ftcourse.tune.trees import batch_trees, reply_logps
    trainer = TreeTrainer(model, SFT, d["train"], run=Run(lr=job["lr"], max_steps=job["n_steps"], batch_size=BATCH, seed=job["seed"], progress=False), pad_id=tokenizer.pad_token_id)
    started = time.time()
    trainer.fit()
    found = dict(step_seconds=(time.time() - started)/job["n_steps"], **losses_and_scores(model, tokenizer, d))

    def step():
        opt = torch.optim.AdamW(trainable(model).values(), 0.0)
        sft_loss(*reply_logps(model, batch_trees(d["train"][:BATCH], model))).backward()
        opt.step()
    return found | dict(peak_bytes=cost(model.train(), step))


def head_run(classifier, job, d):
    "Train a head on frozen hidden states; its answers are codes."
    import torch
    from torch.nn import functional as F
    from torch.nn.utils.rnn import pad_sequence
    from ftcourse.data.sets import emoji_codes, score_emojibot
    from ftcourse.tune.forgetting import held_out_loss
    from ftcourse.tune.trainer import EpochBatches
    codes, opt = list(emoji_codes()), torch.optim.AdamW(classifier.head.parameters(), job["lr"])
    labels = torch.tensor([codes.index(r["messages"][-1]["content"]) for r in d["rows"]])
    order = [list(batch) for batch in EpochBatches(len(labels), BATCH, job["seed"])][:job["n_steps"]]

    def logits(trees):
        ids = [torch.tensor(t.prompt_ids) for t in trees]
        return classifier(pad_sequence(ids, batch_first=True), pad_sequence([torch.ones_like(i) for i in ids], batch_first=True))

    def step(rows=order[0]):
        opt.zero_grad()
        F.cross_entropy(logits([d["train"][i] for i in rows]), labels[rows]).backward()
        opt.step()
    started = time.time()
    for rows in order: step(rows)
    seconds = (time.time() - started)/job["n_steps"]
    with torch.no_grad(): chosen = torch.cat([logits(d["asked"][i:i + BATCH]) for i in range(0, len(d["asked"]), BATCH)]).argmax(-1)
    scores = [score_emojibot(codes[i], t["acceptable"]) for i, t in zip(chosen, d["tests"])]
    return dict(step_seconds=seconds, old_loss=held_out_loss(classifier.model, d["old"]), peak_bytes=cost(classifier, step), **{k: sum(s[k] for s in scores)/len(scores) for k in ("format", "acceptable")})


def run(job, folder):
    "What one run found."
    from ftcourse.data.sets import emoji_codes
    from ftcourse.models import load
    from ftcourse.tune.methods import attach, saved_bytes, trainable
    started = time.time()
    model, tokenizer = load("tiny" if job["tiny"] else "smollm2-135m")
    d = data(tokenizer, job["tiny"])
    if job["method"] == "base": return losses_and_scores(model, tokenizer, d)
    model = attach(model, job["method"], job["seed"], **({"n_labels": len(emoji_codes())} if job["method"] == "head" else {}))
    sizes = dict(n_trained=sum(p.numel() for p in trainable(model).values()), saved_bytes=saved_bytes(model))
    found = head_run(model, job, d) if job["method"] == "head" else text_run(model, tokenizer, job, d)
    return sizes | found | dict(seconds=round(time.time() - started, 1))


def main():
    parser = options(__doc__, "methods")
    parser.add_argument("--methods", nargs="+", help="of the table; all of them by default")
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, 3.0, 10.0], help="times a method's usual learning rate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="of training; 24, with --tiny 2")
    a = parser.parse_args()
    from ftcourse.tune.methods import METHODS
    n_steps = a.steps or (2 if a.tiny else 24)
    job = lambda method, lr, seed: dict(method=method, lr=lr, seed=seed, n_steps=n_steps, tiny=a.tiny)
    names = a.methods or list(METHODS)
    grid = do([job(n, METHODS[n].lr*f, a.seeds[0]) for n in names for f in a.factors], run, a.folder, a.workers)
    rate = {n: min((r for r in grid if r["method"] == n), key=lambda r: r.get("loss", -r["acceptable"]))["lr"] for n in names}
    runs = do([job(n, rate[n], seed) for n in names for seed in a.seeds], run, a.folder, a.workers)
    base, = do([job("base", 0.0, 0)], run, a.folder, a.workers)
    save("methods", a.workers, [*{(r["method"], r["lr"], r["seed"]): r for r in grid + runs}.values()], model="tiny" if a.tiny else "smollm2-135m", n_steps=n_steps, batch_size=BATCH, seeds=a.seeds,
         n_test=6 if a.tiny else N_TEST, n_old=6 if a.tiny else N_OLD, base=base, grid=grid, runs=runs)


if __name__ == "__main__": main()
