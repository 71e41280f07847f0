"""Plausible wrong answers to the exercises of 3_tune/forgetting."""
def _with_the_last(R): return sum(R[-1][j] - R[j][j] for j in range(len(R)))/len(R)
def _other_sign(R): return sum(R[j][j] - R[-1][j] for j in range(len(R) - 1))/(len(R) - 1)
def _columns_and_rows(R): return sum(R[j][-1] - R[j][j] for j in range(len(R) - 1))/(len(R) - 1)
def _from_the_best(R): return sum(R[-1][j] - max(r[j] for r in R) for j in range(len(R) - 1))/(len(R) - 1)
def _from_the_step_before(R): return sum(R[-1][j] - R[-2][j] for j in range(len(R) - 1))/(len(R) - 1)

def _mean_then_square(theta, theta0, gradients, strength):
    fisher = [(sum(g[i] for g in gradients)/len(gradients))**2 for i in range(len(theta))]
    return strength/2*sum(f*(a - b)**2 for f, a, b in zip(fisher, theta, theta0))
def _sum_of_examples(theta, theta0, gradients, strength):
    return strength/2*sum(sum(g[i]**2 for g in gradients)*(theta[i] - theta0[i])**2 for i in range(len(theta)))
def _not_squared(theta, theta0, gradients, strength):
    return strength/2*sum(sum(abs(g[i]) for g in gradients)/len(gradients)*(theta[i] - theta0[i])**2 for i in range(len(theta)))
def _not_halved(theta, theta0, gradients, strength):
    return strength*sum(sum(g[i]**2 for g in gradients)/len(gradients)*(theta[i] - theta0[i])**2 for i in range(len(theta)))
def _plain_l2(theta, theta0, gradients, strength): return strength/2*sum((a - b)**2 for a, b in zip(theta, theta0))

WRONG = {"forgetting.1": [_with_the_last, _other_sign, _columns_and_rows, _from_the_best, _from_the_step_before],
         "forgetting.2": [_mean_then_square, _sum_of_examples, _not_squared, _not_halved, _plain_l2],
         "forgetting.3": [225, 1200, 675, 301]}
