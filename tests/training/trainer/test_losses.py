"""The losses against pair enumeration and against sentence-transformers, and their behaviour at the edges."""

from __future__ import annotations

import itertools
import math
import types

import pytest
import torch
from torch import nn

from training.trainer import losses

SIZES = (5, 1, 3, 8, 2)

LOSSES = {
    "hinge": lambda s, t, g, **kw: losses.hinge(s, t, g, **kw),
    "ranknet": lambda s, t, g, **kw: losses.ranknet(s, t, g, **kw),
    "click_ranknet": lambda s, t, g, **kw: losses.click_ranknet(s, t, g, **kw),
    "point_mse": lambda s, t, g, **kw: losses.point_mse(s, t, **kw),
    "margin_mse": lambda s, t, g, **kw: losses.margin_mse(s, t, g, **kw),
    "hybrid": lambda s, t, g, **kw: losses.hybrid(s, t, g, 0.3, 0.7, **kw),
    "listwise_kl": lambda s, t, g, **kw: losses.listwise_kl(s, t, g, 2.0, **kw),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def batch(seed: int = 0, sizes=SIZES):
    """Student scores, teacher scores, grades 0..2, and groups with ids that are neither dense nor sorted."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.cat([torch.full((m,), 97 - 13 * i) for i, m in enumerate(sizes)])
    n = len(groups)
    student, teacher = torch.randn(2, n, generator=generator, dtype=torch.float64) * 3
    grades = torch.randint(0, 3, (n,), generator=generator)
    return student.float(), teacher.float(), grades, groups


def members(groups):
    return [[i for i, g in enumerate(groups.tolist()) if g == group] for group in dict.fromkeys(groups.tolist())]


def enumerated(groups, pair_loss, usable=lambda i, j: True) -> float:
    """The normalisation in so many words: the mean over a group's pairs, carried by each of its documents."""
    total = 0.0
    for rows in members(groups):
        values = [pair_loss(i, j) for i, j in itertools.permutations(rows, 2) if usable(i, j)]
        total += len(rows) * sum(values) / len(values) if values else 0.0
    return total / len(groups)


def test_hinge_equals_enumerated_pairs():
    s, _, grades, groups = batch()
    expected = enumerated(groups, lambda i, j: max(0.0, 1.5 - float(s[i] - s[j])), lambda i, j: grades[i] > grades[j])
    assert losses.hinge(s, grades, groups, margin=1.5).item() == pytest.approx(expected, rel=1e-5)


def test_click_ranknet_weighs_a_pair_by_the_difference_of_its_click_rates():
    s, rates, _, groups = batch()
    expected = enumerated(
        groups,
        lambda i, j: float(rates[i] - rates[j]) * math.log1p(math.exp(float(s[j] - s[i]))),
        lambda i, j: rates[i] > rates[j],
    )
    assert losses.click_ranknet(s, rates, groups).item() == pytest.approx(expected, rel=1e-5)


def test_ranknet_equals_enumerated_pairs():
    s, _, grades, groups = batch()
    expected = enumerated(
        groups, lambda i, j: math.log1p(math.exp(float(s[j] - s[i]))), lambda i, j: grades[i] > grades[j]
    )
    assert losses.ranknet(s, grades, groups).item() == pytest.approx(expected, rel=1e-5)


def test_margin_mse_equals_enumerated_pairs():
    s, t, _, groups = batch()
    expected = enumerated(groups, lambda i, j: float((s[i] - s[j]) - (t[i] - t[j])) ** 2)
    assert losses.margin_mse(s, t, groups).item() == pytest.approx(expected, rel=1e-5)


def test_a_weighted_pair_counts_the_product_of_its_documents_weights():
    s, t, _, groups = batch()
    weights = torch.linspace(0.2, 3.0, len(s))
    expected = enumerated(groups, lambda i, j: float(weights[i] * weights[j] * ((s[i] - s[j]) - (t[i] - t[j])) ** 2))
    assert losses.margin_mse(s, t, groups, weights=weights).item() == pytest.approx(expected, rel=1e-4)
    point = (weights * (s - t) ** 2).mean()
    assert losses.point_mse(s, t, weights=weights).item() == pytest.approx(point.item(), rel=1e-5)
    both = losses.hybrid(s, t, groups, 0.5, 2.0, weights=weights)
    assert both.item() == pytest.approx(0.5 * point.item() + 2.0 * expected, rel=1e-4)
    alike = torch.ones(len(s))
    assert torch.allclose(losses.margin_mse(s, t, groups, weights=alike), losses.margin_mse(s, t, groups), rtol=1e-6)


def test_listwise_kl_equals_the_divergence_of_each_group():
    s, t, _, groups = batch()
    total = 0.0
    for rows in members(groups):
        p, q = (torch.softmax(x[rows].double() / 2.0, 0) for x in (t, s))
        total += len(rows) * float((p * (p / q).log()).sum())
    assert losses.listwise_kl(s, t, groups, 2.0).item() == pytest.approx(4.0 * total / len(groups), rel=1e-5)


def test_hybrid_is_the_weighted_sum_of_its_parts():
    s, t, _, groups = batch()
    expected = 0.25 * losses.point_mse(s, t) + 4.0 * losses.margin_mse(s, t, groups)
    assert torch.allclose(losses.hybrid(s, t, groups, 0.25, 4.0), expected)


def test_ranknet_point_is_ranknet_anchored_to_the_teachers_scores():
    scores, labels, groups = torch.tensor([1.0, -1.0, 0.5]), torch.tensor([0.5, 0.0, 2.0]), torch.tensor([0, 0, 1])
    expected = losses.ranknet(scores, labels, groups) + 0.3 * losses.point_mse(scores, labels)
    assert losses.ranknet_point(scores, labels, groups, 0.3) == pytest.approx(float(expected))
    # the order of a group is RankNet's, so only the anchor sees a shift of the whole group
    moved = losses.ranknet_point(scores + 1, labels, groups, 0.3) - losses.ranknet_point(scores, labels, groups, 0.3)
    apart = losses.point_mse(scores + 1, labels) - losses.point_mse(scores, labels)
    assert float(moved) == pytest.approx(0.3 * float(apart))


def test_a_shift_of_a_whole_group_costs_point_mse_only():
    s, _, _, groups = batch()
    shifted = s + 3.0 * (groups == groups[0])
    assert losses.margin_mse(shifted, s, groups).item() == pytest.approx(0.0, abs=1e-10)
    assert losses.point_mse(shifted, s).item() == pytest.approx(9.0 * SIZES[0] / len(s), rel=1e-5)


def test_margin_mse_keeps_small_residuals_beside_a_large_common_offset():
    s, t, _, groups = batch()
    near = t + 1e-3 * s
    offset = 4096.0  # e^2 is 1.7e7: sum of squares minus squared sum would leave nothing but rounding
    expected = losses.margin_mse((near - t).double(), torch.zeros_like(t), groups)
    assert torch.allclose(losses.margin_mse(near - t + offset, torch.zeros_like(t), groups), expected, rtol=0.2)


def sentence_transformers_loss(name: str, scores: torch.Tensor):
    """One of its loss modules on fixed scores: "texts" are row numbers, and the model looks the score up."""
    cross_encoder = pytest.importorskip("sentence_transformers.cross_encoder")

    class ScoreTable(cross_encoder.CrossEncoder):
        def __init__(self):
            nn.Module.__init__(self)

        num_labels = 1
        device = "cpu"

        def preprocess(self, pairs, **_):
            return {"rows": torch.tensor([int(document) for _, document in pairs])}

        def forward(self, inputs):
            return {"scores": scores[inputs["rows"]]}

    module: types.ModuleType = __import__("sentence_transformers.cross_encoder.losses", fromlist=[name])
    return getattr(module, name)(ScoreTable())


@pytest.mark.parametrize("sizes", [(6, 6, 6, 6), (9,), (2, 2)])
def test_margin_mse_and_its_gradient_equal_sentence_transformers_on_all_pairs(sizes):
    s, t, _, groups = batch(sizes=sizes)
    ours, theirs = s.clone().requires_grad_(), s.clone().requires_grad_()
    pairs = [pair for rows in members(groups) for pair in itertools.combinations(rows, 2)]
    columns = [["q"] * len(pairs), [str(i) for i, _ in pairs], [str(j) for _, j in pairs]]
    expected = sentence_transformers_loss("MarginMSELoss", theirs)(
        columns, torch.stack([t[i] - t[j] for i, j in pairs])
    )
    expected.backward()
    got = losses.margin_mse(ours, t, groups)
    got.backward()
    assert torch.allclose(got, expected, rtol=1e-5)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


def test_point_mse_and_its_gradient_equal_sentence_transformers():
    s, t, _, _ = batch()
    ours, theirs = s.clone().requires_grad_(), s.clone().requires_grad_()
    expected = sentence_transformers_loss("MSELoss", theirs)([["q"] * len(s), [str(i) for i in range(len(s))]], t)
    expected.backward()
    got = losses.point_mse(ours, t)
    got.backward()
    assert torch.allclose(got, expected) and torch.allclose(ours.grad, theirs.grad)


@every_loss
@pytest.mark.parametrize(
    "scores, targets, groups",
    [
        ([1.5], [0.0], [3]),  # a group of one
        ([1.0, -2.0, 3.0], [2.0, 2.0, 2.0], [0, 0, 0]),  # equal teacher scores
        ([1e6, -1e6, 0.0, 1e6], [-1e6, 1e6, 0.0, 1.0], [0, 0, 0, 1]),  # extreme scores, all wrong
        ([0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [7, 7, 7]),  # equal student scores
        ([], [], []),  # an empty batch on one device
    ],
    ids=["one", "equal-teacher", "extreme", "equal-student", "empty"],
)
def test_loss_and_gradient_are_finite(loss, scores, targets, groups):
    s = torch.tensor(scores, requires_grad=True)
    value = loss(s, torch.tensor(targets), torch.tensor(groups, dtype=torch.long))
    value.backward()
    assert torch.isfinite(value) and s.grad is not None and torch.isfinite(s.grad).all()


@pytest.mark.parametrize("name", ["hinge", "ranknet", "margin_mse", "listwise_kl"])
def test_groups_without_a_usable_pair_contribute_zero_and_move_nothing(name):
    s = torch.tensor([2.0, -1.0, 5.0, 0.5], requires_grad=True)
    groups = torch.tensor([0, 1, 2, 3])
    value = LOSSES[name](s, torch.tensor([1.0, 0.0, 2.0, 1.0]), groups)
    value.backward()
    assert value.item() == 0.0 and s.grad.abs().sum() == 0.0


def test_tied_grades_are_no_pair():
    s = torch.tensor([0.0, 5.0, 1.0], requires_grad=True)
    losses.hinge(s, torch.tensor([1, 1, 1]), torch.zeros(3, dtype=torch.long)).backward()
    assert s.grad.tolist() == [0.0, 0.0, 0.0]
    assert losses.ranknet(s, torch.tensor([1, 1, 0]), torch.zeros(3, dtype=torch.long)).item() == pytest.approx(
        (math.log1p(math.exp(1.0)) + math.log1p(math.exp(-4.0))) / 2
    )


@every_loss
def test_the_order_of_documents_and_the_names_of_groups_do_not_matter(loss):
    s, t, _, groups = batch()
    order = torch.randperm(len(s), generator=torch.Generator().manual_seed(3))
    assert torch.allclose(loss(s, t, groups), loss(s[order], t[order], 1000 - groups[order]), rtol=1e-5)


@every_loss
def test_groups_in_one_batch_do_not_meet_and_sums_add_up(loss):
    """Padding invariance of a flat loss: what else is in the batch changes neither a group's loss nor its gradient."""
    s, t, _, groups = batch()
    whole = loss(s, t, groups, reduction="sum")
    apart = sum(loss(s[rows], t[rows], groups[rows], reduction="sum") for rows in members(groups))
    assert torch.allclose(whole, apart, rtol=1e-5)
    assert torch.allclose(whole / len(s), loss(s, t, groups), rtol=1e-6)


@every_loss
def test_bfloat16_scores_are_compared_in_float32(loss):
    s, t, _, groups = batch()
    half = s.bfloat16()
    assert loss(half, t, groups).dtype == torch.float32
    assert torch.equal(loss(half, t, groups), loss(half.float(), t, groups))


def test_a_perfect_student_costs_nothing():
    _, t, _, groups = batch()
    assert losses.hybrid(t, t, groups, 1.0, 1.0).item() == 0.0
    assert losses.listwise_kl(t, t, groups).item() == pytest.approx(0.0, abs=1e-6)


@every_loss
def test_targets_receive_no_gradient(loss):
    s, t, _, groups = batch()
    t.requires_grad_()
    loss(s.requires_grad_(), t, groups).backward()
    assert t.grad is None


@every_loss
def test_wrong_lengths_and_labels_that_are_not_finite_are_named(loss):
    s, t, _, groups = batch()
    with pytest.raises(ValueError, match="one length"):
        loss(s[:-1], t, groups)
    t[4] = float("nan")
    with pytest.raises(ValueError, match="target 4 is nan"):
        loss(s, t, groups)


def test_no_answer_is_waited_for_from_a_device_to_check_targets():
    """The meta device has no values: whatever asks for one fails, as it would wait on a GPU."""
    scores, targets = torch.zeros(4, device="meta"), torch.zeros(4, device="meta")
    assert losses.point_mse(scores, targets).device.type == "meta"


def test_wrong_knobs_are_named():
    s, t, _, groups = batch()
    with pytest.raises(ValueError, match="temperature"):
        losses.listwise_kl(s, t, groups, 0.0)
    with pytest.raises(ValueError, match="reduction"):
        losses.point_mse(s, t, reduction="none")  # type: ignore[arg-type]
