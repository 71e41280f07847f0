"""Plausible wrong answers to the exercises of 3_tune/trees."""
WRONG = {
    "trees.1": [
        lambda i, j, tree, reply: j <= i and tree[i] == tree[j],  # a reply sees its rivals
        lambda i, j, tree, reply: j <= i and tree[i] == tree[j] and reply[i] == reply[j],  # a reply doesn't see its prompt
        lambda i, j, tree, reply: j <= i and reply[j] in (0, reply[i]),  # sees other trees
        lambda i, j, tree, reply: tree[i] == tree[j] and reply[j] in (0, reply[i]),  # sees the future
    ],
    "trees.2": [
        lambda p, replies: p * (len(replies) - 1) / (p + sum(replies)),  # a share of the tree instead of the rows
        lambda p, replies: 1 - 1 / len(replies),  # forgets that replies aren't shared
        lambda p, replies: (p + sum(replies)) / sum(p + n for n in replies),  # what is left, not what is saved
    ],
    "trees.3": [[1., 0., 0.], [0.5, 0.25, 0.25], [0., 0., 0.]],
}
