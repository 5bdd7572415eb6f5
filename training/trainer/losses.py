"""Ranking and distillation losses: pure functions of flat tensors, no model, no tokenizer, no batch shape.

Every loss takes the scores of n documents that were each encoded once, and `groups`, an int per document that says
which query it belongs to (any numbers, in any order). All of them are normalised alike: **the mean over documents,
where a document of a pairwise or listwise loss carries its group's own mean**. So a group weighs as many documents as
it has, groups without a usable pair contribute zero, and for groups of equal size the pairwise losses are the plain
mean over all pairs.

`reduction="sum"` leaves out the division by n. The number of documents is all that a trainer needs to normalise over
devices and accumulated batches exactly, whatever the loss: add up the sums, divide once by the documents of all.

Targets that are not finite are refused on the CPU; on a GPU the check would make every step wait, and a training has
checked its targets before they go there (RankingGroups).

Everything is computed in float32, whatever the scores' type: squares of bfloat16 margins lose the order of close pairs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Reduction = Literal["mean", "sum"]


def hinge(scores: Tensor, grades: Tensor, groups: Tensor, margin: float = 1.0, reduction: Reduction = "mean") -> Tensor:
    """max(0, margin - (s_i - s_j)) over a group's pairs with grade_i > grade_j (Herbrich et al. 2000; DisRanker eq. 3).

    scores: float [n] logits; grades: [n], only their order within a group matters; groups: int [n].
    Tied grades are no pair. Returns a scalar. ValueError if lengths differ or a grade is not finite.
    """
    scores, grades = _checked(scores, grades, groups)
    better, worse = _graded_pairs(grades, groups)
    return _reduce_pairs(functional.relu(margin - (scores[better] - scores[worse])), better, groups, reduction)


def ranknet(scores: Tensor, grades: Tensor, groups: Tensor, reduction: Reduction = "mean") -> Tensor:
    """log(1 + exp(-(s_i - s_j))) over the pairs of a group with grade_i > grade_j (RankNet, Burges et al. 2005).

    Arguments, normalisation and errors as for hinge. With teacher scores as grades it learns the teacher's order alone.
    """
    scores, grades = _checked(scores, grades, groups)
    better, worse = _graded_pairs(grades, groups)
    return _reduce_pairs(functional.softplus(scores[worse] - scores[better]), better, groups, reduction)


def click_ranknet(scores: Tensor, click_rates: Tensor, groups: Tensor, reduction: Reduction = "mean") -> Tensor:
    """(c_i - c_j) * log(1 + exp(-(s_i - s_j))) over the pairs of a group with c_i > c_j.

    RankNet (Burges et al. 2005) on clicks corrected for position bias: click_rates, float [n], are clicks over expected
    examinations, an unbiased estimate of relevance under the position-based model (Joachims, Swaminathan and Schnabel,
    arXiv 1608.04468). The difference as weight makes a pair count as much as the log tells the two apart.
    Arguments, normalisation (by the number of pairs, not by their weights) and errors as for hinge.
    """
    scores, click_rates = _checked(scores, click_rates, groups)
    better, worse = _graded_pairs(click_rates, groups)
    weights = click_rates[better] - click_rates[worse]
    return _reduce_pairs(weights * functional.softplus(scores[worse] - scores[better]), better, groups, reduction)


def point_mse(student: Tensor, teacher: Tensor, reduction: Reduction = "mean", weights: Tensor | None = None) -> Tensor:
    """w_i * (s_i - t_i)^2 over documents; float [n] each, no weights count as 1.

    ValueError: lengths differ or a target is not finite.
    """
    student, teacher = _checked(student, teacher)
    squares = (student - teacher).square()
    return _reduce((squares if weights is None else weights * squares).sum(), len(student), reduction)


def margin_mse(
    student: Tensor,
    teacher: Tensor,
    groups: Tensor,
    reduction: Reduction = "mean",
    weights: Tensor | None = None,
) -> Tensor:
    """((s_i - s_j) - (t_i - t_j))^2 over all pairs i < j of a group (Hofstätter et al., arXiv 2010.02666).

    student, teacher: float [n] raw scores; groups: int [n], the query each row belongs to.
    Returns a scalar; groups of one contribute nothing. ValueError if lengths differ or a teacher score is not finite.

    With the residual e = s - t, the mean over the pairs of one group of size m is 2 / (m - 1) * sum (e_i - mean e)^2:
    twice the residual's (unbiased) variance, so no pair is ever formed and the cost is O(n). The variance is taken in
    two passes, centred per group: sum of squares minus squared sum cancels when scores carry a large offset.

    weights: float [n], above 0; a pair then counts w_i * w_j, and the sum over pairs is W * sum w_i (e_i - mean e)^2,
    where W is the weights' sum and the mean is weighted likewise.
    """
    student, teacher = _checked(student, teacher, groups)
    group, sizes = _group_index(groups)
    residual = student - teacher
    weights = torch.ones_like(residual) if weights is None else weights
    sums = _sum_by_group(weights, group, len(sizes))
    centred = residual - (_sum_by_group(weights * residual, group, len(sizes)) / sums)[group]
    squares = _sum_by_group(weights * centred.square(), group, len(sizes))
    pairs_mean = 2 * sums * squares / (sizes * (sizes - 1)).clamp(min=1)
    return _reduce((pairs_mean * sizes).sum(), len(student), reduction)


def hybrid(
    student: Tensor,
    teacher: Tensor,
    groups: Tensor,
    alpha: float,
    beta: float,
    reduction: Reduction = "mean",
    weights: Tensor | None = None,
) -> Tensor:
    """alpha * point_mse + beta * margin_mse: DisRanker's student loss (arXiv 2411.04539, section 3.3).

    In terms of the residual e = s - t, point-wise MSE is variance plus squared mean, margin MSE twice the variance:
    alpha pays for the offset of each query (needed for thresholds, free for ranking), beta buys order.
    Arguments, normalisation and errors as for margin_mse.
    """
    point = point_mse(student, teacher, reduction, weights)
    return alpha * point + beta * margin_mse(student, teacher, groups, reduction, weights)


def ranknet_point(
    student: Tensor, teacher: Tensor, groups: Tensor, anchor: float, reduction: Reduction = "mean"
) -> Tensor:
    """ranknet on the teacher's order + anchor * point_mse.

    RankNet alone fixes neither a query's offset nor the scale of scores, so that no threshold holds for two queries; a
    little point-wise MSE ties both to the teacher's scores and leaves the order to RankNet.
    Arguments, normalisation and errors as for margin_mse.
    """
    return ranknet(student, teacher, groups, reduction) + anchor * point_mse(student, teacher, reduction)


def listwise_kl(
    student: Tensor, teacher: Tensor, groups: Tensor, temperature: float = 1.0, reduction: Reduction = "mean"
) -> Tensor:
    """T^2 * KL(softmax(t / T) || softmax(s / T)) over the documents of a group (Hinton et al., arXiv 1503.02531).

    T^2 keeps the gradient's size when the temperature changes. Arguments and normalisation as for margin_mse: a group's
    divergence counts once for each of its documents; a group of one contributes nothing.
    ValueError if the temperature is not positive, lengths differ or a teacher score is not finite.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: a positive number is needed")
    student, teacher = _checked(student, teacher, groups)
    group, sizes = _group_index(groups)
    log_student = _log_softmax_by_group(student / temperature, group, len(sizes))
    log_teacher = _log_softmax_by_group(teacher / temperature, group, len(sizes))
    divergence = _sum_by_group(log_teacher.exp() * (log_teacher - log_student), group, len(sizes))
    return _reduce(temperature**2 * (divergence * sizes).sum(), len(student), reduction)


def _checked(scores: Tensor, targets: Tensor, groups: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Both as float32 [n], the target detached. ValueError names what does not fit."""
    if scores.dim() != 1 or targets.shape != scores.shape or (groups is not None and groups.shape != scores.shape):
        shapes = [tuple(t.shape) for t in (scores, targets, groups) if t is not None]
        raise ValueError(f"scores, targets and groups must be flat and of one length, got shapes {shapes}")
    targets = targets.detach().float()
    # an answer from a GPU would make every step wait for it
    if targets.device.type == "cpu" and not torch.isfinite(targets).all():
        row = int((~torch.isfinite(targets)).nonzero()[0])
        raise ValueError(f"target {row} is {float(targets[row])}: labels must be finite")
    return scores.float(), targets


def _group_index(groups: Tensor) -> tuple[Tensor, Tensor]:
    """(index of each row's group in 0..g-1 as int [n], group sizes as float [g])."""
    _, group, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    return group, sizes.float()


def _sum_by_group(values: Tensor, group: Tensor, count: int) -> Tensor:
    return values.new_zeros(count).index_add(0, group, values)


def _log_softmax_by_group(scores: Tensor, group: Tensor, count: int) -> Tensor:
    peak = scores.detach().new_full((count,), -torch.inf).scatter_reduce(0, group, scores.detach(), "amax")
    shifted = scores - peak[group]  # exp of a raw logit may overflow; a constant per group changes nothing
    return shifted - _sum_by_group(shifted.exp(), group, count).log()[group]


def _graded_pairs(grades: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (better, worse) of all same-group pairs with different grades. Takes n^2 bytes for the mask."""
    usable = (groups[:, None] == groups[None, :]) & (grades[:, None] > grades[None, :])
    better, worse = usable.nonzero(as_tuple=True)
    return better, worse


def _reduce_pairs(losses: Tensor, better: Tensor, groups: Tensor, reduction: Reduction) -> Tensor:
    """Mean over each group's pairs, times the group's documents; losses: [pairs], better: a member of each pair."""
    group, sizes = _group_index(groups)
    pairs = _sum_by_group(torch.ones_like(losses), group[better], len(sizes)).clamp(min=1)
    means = _sum_by_group(losses, group[better], len(sizes)) / pairs
    return _reduce((means * sizes).sum(), len(groups), reduction)


def _reduce(total: Tensor, documents: int, reduction: Reduction) -> Tensor:
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction is {reduction!r}: "mean" or "sum" is needed')
    return total / max(documents, 1) if reduction == "mean" else total
