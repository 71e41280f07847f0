"""What every bench shares, so that the figures compare: rows, model, LoRA, the clock, and how a figure is printed."""
import itertools, json, resource, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import torch

from ftcourse.data.sets import load_set
from ftcourse.models import load

BATCH, LENGTH, RANK, ALPHA, LR = 8, 512, 8, 16, 1e-4


def checkpoint(folder=None):
    "SmolLM2-135M-Instruct in bf16 as an ordinary Hugging Face folder, for peers to open."
    folder = Path(folder or tempfile.mkdtemp())
    model, tokenizer = load("smollm2-135m", device="cpu", dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trl112(folder=None):
    "Put TRL 1.12, the last with a PPOTrainer, before the TRL that is installed. It comes into `folder`, or into a new one, so that it replaces nothing."
    folder = folder or tempfile.mkdtemp()
    if not (Path(folder) / "trl").exists(): subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), "trl==1.12.0"], check=True)
    sys.path.insert(0, str(folder))
    return folder


def instructions(n):
    "`n` rows of the instruction set as a prompt and a completion, each a list of chat messages."
    rows = load_set("instructions")[:n]
    return [dict(prompt=[{"role": "user", "content": (r["instruction"] + "\n" + r["input"]).strip()}],
                 completion=[{"role": "assistant", "content": r["output"]}]) for r in rows]


def preferences(n):
    "`n` rows of the preference set as prompt, chosen and rejected, each a list of chat messages."
    rows = load_set("preferences")[:n]
    say = lambda role, text: [{"role": role, "content": text}]
    return [dict(prompt=say("user", (r["instruction"] + "\n" + r["input"]).strip()), chosen=say("assistant", r["chosen"]), rejected=say("assistant", r["rejected"])) for r in rows]


def long_preferences(n, prompt_words, k):
    "`n` rows like `preferences`, their prompts filled up with other instructions to about `prompt_words` words, and with `k` replies: the pair's and those of the next rows."
    rows, texts = preferences(n + k), " ".join(r["output"] for r in load_set("instructions")).split()
    filled = []
    for i, row in enumerate(rows[:n]):
        more = " ".join(texts[37*i:37*i + prompt_words])
        replies = [row["chosen"], row["rejected"], *(r["chosen"] for r in rows[i + 1:i + k - 1])]
        filled.append(dict(prompt=[{"role": "user", "content": (more + "\n\n" + row["prompt"][0]["content"]).strip()}], completions=replies, scores=list(range(k, 0, -1))))
    return filled


def pairs(rows):
    "Every pair of a ranking, as TRL takes them."
    return [dict(prompt=r["prompt"], chosen=better, rejected=worse) for r in rows for better, worse in itertools.combinations(r["completions"], 2)]


def clock():
    "A Trainer callback that times each optimiser step; the first two are left out as warm-up."
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self): self.times = []
        def on_step_begin(self, *args, **kwargs): self.started = time.perf_counter()
        def on_step_end(self, *args, **kwargs):
            if torch.cuda.is_available(): torch.cuda.synchronize()
            self.times.append(time.perf_counter() - self.started)
    return Clock()


def peak_gb():
    "Peak of the GPU's allocations, or of the process's resident size, in GB."
    if torch.cuda.is_available(): return torch.cuda.max_memory_allocated() / 1e9
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def say(name, times, **more):
    "Print one JSON line: median, fastest and slowest step in seconds, peak memory in GB."
    times = times[2:]
    print(json.dumps(dict(name=name, steps=len(times), step_s=round(statistics.median(times), 3), min_s=round(min(times), 3),
                          max_s=round(max(times), 3), peak_gb=round(peak_gb(), 2), **more)), flush=True)


def matmul_peak(dtype=torch.bfloat16, n=2048, repeats=12):
    "FLOP/s of the best of some square matrix products: the machine's peak, as far as torch reaches it."
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b, best = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype), float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        a @ b
        if device == "cuda": torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


KINDS = {"matrix products": ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "matmul"),
         "copies and gathers": ("copy_", "cat", "index", "index_select", "index_put_", "gather", "scatter_", "scatter_add_", "embedding", "fill_", "zero_"),
         "optimiser": ("_fused_adamw_", "_foreach_norm", "_foreach_mul_")}


def shares(prof):
    "Share of the processor time of the operators, by kind; what no list names works element by element."
    spent = dict.fromkeys([*KINDS, "element by element and the rest"], 0.0)
    for event in prof.key_averages():
        name = event.key.removeprefix("aten::")
        spent[next((kind for kind, names in KINDS.items() if name in names), "element by element and the rest")] += event.self_cpu_time_total
    return {kind: round(t / sum(spent.values()), 2) for kind, t in spent.items()}
