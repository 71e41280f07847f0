"""TRL's losses, asked from its own trainers, of a model small enough to work out by hand.

TRL has no loss one could call: the maths sits inside the trainers. So a trainer is built with its real config, its model is
replaced by a table, and its loss of one batch is asked for. The model is a bigram: the logits of the next token are the row of
a (V, V) table that belongs to the token before. `token_logps` reads the same log-probabilities from the table, without TRL.
"""
import contextlib, importlib, tempfile, warnings
from types import SimpleNamespace

import torch
from torch import nn

V = 13  # tokens of the bigram


class Bigram(nn.Module):
    "A language model of a table; answers as transformers' models do, and as TRL's fused head does when given `labels`."
    is_gradient_checkpointing = False

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table.clone())

    def forward(self, input_ids, attention_mask=None, labels=None, **ignored):
        logits = self.table[input_ids]  # (R, T, V)
        if labels is None: return SimpleNamespace(logits=logits)
        targets, scores = labels[:, 1:], logits[:, :-1]
        logps = scores.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]*(targets >= 0)
        return SimpleNamespace(logits=logits, log_probs=logps, entropy=0*logps, mean_logits=0*logps, is_top1=scores.argmax(-1) == targets)


def random_table(seed, scale=1.0, dtype=torch.float32):
    "(V, V) logits, drawn."
    return scale*torch.randn(V, V, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def token_logps(table, prompt, reply):
    "(len(reply),) log-probability of each token of `reply` after `prompt`, read from the table."
    before = [*prompt, *reply][len(prompt) - 1:-1]
    return torch.stack([table[a].log_softmax(-1)[b] for a, b in zip(before, reply)])


def reply_sums(table, prompts, replies):
    "(B,) log-probability of each reply, summed over its tokens."
    return torch.stack([token_logps(table, x, y).sum() for x, y in zip(prompts, replies)])


def trainer(name, folder, **config):
    "A trainer of TRL ('DPO', 'KTO', 'CPO' or 'ORPO') with its real config, on the tiny model and two rows that are never used."
    import trl
    from datasets import Dataset
    from ftcourse.models import load
    model, tokenizer = load("tiny")
    row = {"prompt": "a", "completion": " b", "label": True} if name == "KTO" else {"prompt": "a", "chosen": " b", "rejected": " c"}
    rows = Dataset.from_list([row, {**row, "label": False} if name == "KTO" else row])
    ref = {"ref_model": load("tiny")[0]} if name in ("DPO", "KTO") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in ("CPO", "ORPO"): trl = importlib.import_module(f"trl.experimental.{name.lower()}")
        args = getattr(trl, name + "Config")(output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, remove_unused_columns=False,
                                             per_device_train_batch_size=2, max_length=64, disable_tqdm=True, **config)
        return getattr(trl, name + "Trainer")(model=model, args=args, train_dataset=rows, processing_class=tokenizer, **ref)


def _padded(rows, value): return torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=value)

def _joined(prompts, replies, prefix=""):
    "Ids, attention and reply masks of prompts with their replies, right-padded, under TRL's names."
    rows = [[*x, *y] for x, y in zip(prompts, replies)]
    masks = [[0]*len(x) + [1]*len(y) for x, y in zip(prompts, replies)]
    return {prefix + "input_ids": _padded(rows, 0), prefix + "attention_mask": _padded([[1]*len(r) for r in rows], 0), prefix + "completion_mask": _padded(masks, 0)}

def _labelled(prompts, replies, prefix):
    "The same under the names of TRL's older trainers, which take labels instead of masks."
    batch = _joined(prompts, replies)
    return {prefix + "input_ids": batch["input_ids"], prefix + "attention_mask": batch["attention_mask"],
            prefix + "labels": batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)}


def trl_loss(
    name,  # "DPO", "CPO" or "ORPO" for pairs, "KTO" for labelled replies
    policy,  # (V, V) table of logits
    ref,  # (V, V) table of the reference; CPO and ORPO have none
    prompts,  # lists of ids below V, one token at least
    replies,  # pairs: (chosen replies, rejected replies); KTO: replies
    labels=None,  # KTO: bools, True for desirable
    kl_replies=None,  # KTO: the replies of the mismatched pairs; None: rotated by one, as TRL's data set does
    **config,  # of TRL's config: beta, loss_type, label_smoothing, simpo_gamma, cpo_alpha, desirable_weight, ...
):  # () float32, the loss that TRL would train on
    "TRL's loss of one batch, by its own code."
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        t = trainer(name, folder, **config)
        t.model = Bigram(policy)
        if name in ("CPO", "ORPO"):
            return t.get_batch_loss_metrics(t.model, {**_labelled(prompts, replies[0], "chosen_"), **_labelled(prompts, replies[1], "rejected_")})[0].detach()
        t.ref_model = Bigram(ref)
        if name == "DPO": batch = _joined([*prompts, *prompts], [*replies[0], *replies[1]])
        else:
            kl = kl_replies or [replies[-1], *replies[:-1]]
            batch = {**_joined(prompts, replies), **_joined(prompts, kl, "KL_"), "label": torch.tensor(labels)}
        return t._compute_loss(t.model, batch, False).detach()
