"""Rollouts beside `model.generate`: the same prompts, adapter, batch and way of drawing. python rollout.py [--prompts 4] [--samples 4] [--tokens 48] [--rounds 2]

Then the same with one saving left out at a time, in seconds of the processor, all threads together, and how far the probabilities they were drawn with are from float32.
"""
import argparse, contextlib, json, statistics, time
from unittest import mock

import torch
from transformers.cache_utils import DynamicLayer

import ftcourse.models as M
from common import ALPHA, RANK, preferences
from ftcourse.align.ppo import drawing
from ftcourse.data.batches import Tree
from ftcourse.tune.lora import add_lora, lora_parameters
from ftcourse.tune.trees import batch_trees, reply_logps

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--prompts", type=int, default=4)
parser.add_argument("--samples", type=int, default=4, help="replies to each prompt")
parser.add_argument("--tokens", type=int, default=48)
parser.add_argument("--rounds", type=int, default=2)
a = parser.parse_args()

model, tokenizer = M.load("smollm2-135m", dtype=torch.bfloat16)
add_lora(model, r=RANK, alpha=ALPHA)
generator = torch.Generator().manual_seed(0)
for p in lora_parameters(model): p.data += .01 * torch.randn(p.shape, generator=generator)
prompts = [r["prompt"] for r in preferences(a.prompts) for _ in range(a.samples)]
rows = [M._encode_prompt(tokenizer, p) for p in prompts]
nothing = contextlib.nullcontext


def ours(low_rank=drawing):
    with low_rank(model): return M.sample_ids(model, tokenizer, prompts, a.tokens)


def theirs():
    "(prompt, reply) as `sample_ids` has them, and the log-probability of each drawn token."
    ids, mask, _ = M.left_pad(rows)
    with torch.no_grad():
        out = model.generate(ids, attention_mask=mask, max_new_tokens=a.tokens, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=tokenizer.pad_token_id,
                             return_dict_in_generate=True, output_logits=True)
    stops, drawn, logps = M._stop_ids(model, tokenizer), [], []
    for i, reply in enumerate(out.sequences[:, ids.shape[1]:].tolist()):
        n = next((t + 1 for t, x in enumerate(reply) if x in stops), len(reply))
        drawn.append((tuple(rows[i]), tuple(reply[:n])))
        logps.append([out.logits[t][i].float().log_softmax(-1)[x].item() for t, x in enumerate(reply[:n])])
    return drawn, logps


def measured():
    "Our replies with the log-probability of each token at the moment it was drawn."
    logps, draw = {}, M._draw

    def noted(logits, temperature, generators):
        chosen = draw(logits, temperature, generators)
        for g, row, x in zip(generators, logits.float().log_softmax(-1), chosen): logps.setdefault(id(g), []).append(row[x].item())
        return chosen
    kept, begin = [], M._Answer.__init__  # the generators in the order of the answers
    with mock.patch.object(M, "_draw", noted), mock.patch.object(M._Answer, "__init__", lambda answer, *args: (begin(answer, *args), kept.append(answer.generator))[0]): drawn = ours()
    return drawn, [logps[id(g)] for g in kept]


def error(drawn, logps, exact):
    "Mean distance of the log-probabilities, nats a token, from those of the same replies in float32, without cache, padding or batch."
    found = []
    for (prompt, reply), now in zip(drawn, logps):
        with torch.no_grad(): right = reply_logps(exact, batch_trees([Tree(prompt, (reply,), ((1,) * len(reply),), 0)], exact))[0][0]
        found += (torch.tensor(now) - right[:len(now)]).abs().tolist()
    return round(statistics.mean(found), 4)


sides = {"model.generate": (theirs, nothing()), "rollout": (ours, nothing()), "without the quick adapter": (lambda: ours(nothing), nothing()),
         "without room in the cache": (ours, mock.patch.object(M, "_roomy_layer", lambda: DynamicLayer)),
         "each prompt read for itself": (ours, mock.patch.object(M, "_distinct", lambda rows: (rows, list(range(len(rows))))))}
seconds = {name: [] for name in sides}
for _ in range(a.rounds + 1):  # the first is a warm-up
    for name, (run, changed) in sides.items():
        started = time.process_time()
        with changed: run()
        seconds[name].append(time.process_time() - started)
drawn, logps = measured()
said, said_logps = theirs()
count = lambda replies: sum(len(r) for _, r in replies)
exact = M.load("smollm2-135m", dtype=torch.float32)[0]
add_lora(exact, r=RANK, alpha=ALPHA)
for p, q in zip(lora_parameters(exact), lora_parameters(model)): p.data.copy_(q.data)
median = {name: round(statistics.median(s[1:]), 2) for name, s in seconds.items()}
print(json.dumps(dict(prompts=a.prompts, samples=a.samples, prompt_tokens=sum(map(len, rows)), seconds=median, best={name: round(min(s[1:]), 2) for name, s in seconds.items()},
                      times=round(median["model.generate"] / median["rollout"], 2), tokens=dict(rollout=count(drawn), generate=count(said)),
                      error=dict(rollout=error(drawn, logps, exact), generate=error(said, said_logps, exact)))))
