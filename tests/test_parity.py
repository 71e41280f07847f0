"""The same numbers as TRL 1.16 on the same rows: each reply token's log-probability, and the loss."""
import sys, tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "bench"))
N = 8


def trl_logps(model, tokenizer, rows):
    "What TRL's own data preparation and one padded forward pass give: per row, ids and log-probabilities of the completion; and TRL's loss."
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    args = SFTConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=N, use_cpu=True, bf16=False, report_to=[], max_length=512,
                     gradient_checkpointing=False, save_strategy="no", disable_tqdm=True)
    trainer = SFTTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=Dataset.from_list(rows))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = trainer.compute_loss(model, dict(batch))
    targets, logps = batch["labels"][:, 1:], logits[:, :-1].float().log_softmax(-1)
    found = []
    for row, target in zip(logps, targets):
        at = (target != -100).nonzero()[:, 0]
        found.append((target[at].tolist(), row[at, target[at]]))
    return found, loss.item()


def ours(model, tokenizer, rows):
    from ftcourse.data.batches import encode_rows, pack
    from ftcourse.tune.trees import can_use_trees, reply_logps
    assert can_use_trees(model)
    trees = encode_rows(rows, tokenizer)
    with torch.no_grad(): logps, mask = reply_logps(model, pack(trees, tokenizer.pad_token_id))
    return [(list(t.replies[0]), l[m.bool()]) for t, l, m in zip(trees, logps, mask)]


@pytest.mark.slow
@pytest.mark.real
def test_reply_logps_equal_trls():
    "In float32 to 1e-3; in bf16 no farther from float32, on average, than TRL's."
    from common import instructions
    from ftcourse.models import load
    rows, far = instructions(N), {}
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = load("smollm2-135m", device="cpu", dtype=dtype)
        theirs, loss = trl_logps(model, tokenizer, rows)
        mine = ours(model, tokenizer, rows)
        for (their_ids, _), (my_ids, _) in zip(theirs, mine): assert their_ids[:len(my_ids)] == my_ids  # TRL's row ends with one line break more
        pairs = [(t[:len(m)], m) for (_, t), (_, m) in zip(theirs, mine)]
        if dtype == torch.float32:
            exact = [m for _, m in pairs]
            assert max((t - m).abs().max() for t, m in pairs) < 1e-3
            all_theirs = torch.cat([t for _, t in theirs])
            assert abs(loss + all_theirs.mean()) < 1e-4  # TRL's loss is minus the mean of what we read from it
        else:
            for name, side in (("trl", 0), ("ours", 1)): far[name] = torch.cat([(p[side] - e).abs() for p, e in zip(pairs, exact)]).mean().item()
    print(far)
    assert far["ours"] <= far["trl"], far
