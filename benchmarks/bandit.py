"""Moving anchors on a problem that is solved exactly: `python benchmarks/bandit.py --out runs/bandit`.

The problem has one prompt and a few responses. The policy is a softmax with one logit per response, in float64. Each
claim is a law in closed form; the library's own loss functions meet it under a real optimizer:

    iterates        Rounds of a proximal objective converge geometrically to the RLHF optimum π_ref exp(r/β):
                    log π_t/π_ref = c_t r + const, c_t = (1/β)(1 − (λ/(β+λ))^t). Iterative DPO with a fixed
                    reference reaches it in one round, c_t = 1/β. If the reference is replaced after each round
                    (TR hard), the policy does not converge: c_t = t/β.
    syncs           DPO's gradient scale βσ(−βh) and curvature β²σ(βh)σ(−βh) vanish as the margin h grows. A
                    sync of the reference restores them to β/2 and β²/4.
    certain labels  If one response always wins, DPO's log-ratio diverges. Maximum Preference Optimization
                    (MPO) with its SFT term stops at the root of cπ² = (c−β)π + βq.
    theorem 4.1     The gradient of the expected preference, enumerated over all pairs and choices, equals MPO's
                    on labelled pairs from any sampler.

It prints a table of law against measurement and draws a figure for each, in seconds on a CPU.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lit_align.objectives._likelihood import sft_loss
from lit_align.objectives.anchor import effective_anchor
from lit_align.objectives.dpo import dpo_loss
from lit_align.objectives.ipo import ipo_loss
from lit_align.objectives.mpo import mpo_loss

plt.switch_backend("Agg")
plt.rcParams["axes.titlelocation"] = "left"

BLUE, ORANGE, GREEN, PURPLE, RED, INK, PALE = (
    "#2f6db5", "#e08a1e", "#2a9d74", "#8a5cb5", "#c8443c", "#2b2b2b", "#9aa0a6",
)  # fmt: skip


class Row(NamedTuple):
    """One line of the table: a claim, its law, and the measurement."""

    claim: str
    law: float
    measured: float


def solve(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """log π [V] of the softmax policy that minimises a loss of log π, by L-BFGS."""
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(logits.log_softmax(0))
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().log_softmax(0)


# --- iterates ----------------------------------------------------------------------------------------------

BETA, ROUNDS = 1.0, 12
PROXIMAL = {1.0: GREEN, 3.0: BLUE, 9.0: PURPLE}  # λ
REFERENCE = torch.tensor([1.0, 0.3, -0.2, 0.6, -1.2], dtype=torch.float64).log_softmax(0)
REWARDS = torch.tensor([-0.4, 0.9, -1.0, 0.1, 0.6], dtype=torch.float64)


class Iterates(NamedTuple):
    """Per round t = 0, 1, ...: the strength c_t of the reward in log π_t/π_ref, and KL(π_t‖π*)."""

    strength: list[float]
    distance: list[float]


def iterates(proximal: float, moving_reference: bool = False) -> Iterates:
    """Rounds of (PR-)DPO, each to its optimum on all pairs; the sampler is the last round's policy."""
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    labels = torch.sigmoid(REWARDS[pairs[:, 0]] - REWARDS[pairs[:, 1]])
    centred = REWARDS - REWARDS.mean()
    optimum = (REFERENCE + REWARDS / BETA).log_softmax(0)
    policy, result = REFERENCE, Iterates([], [])
    for _ in range(ROUNDS + 1):
        result.strength.append(((policy - REFERENCE) @ centred / (centred @ centred)).item())
        result.distance.append((policy.exp() * (policy - optimum)).sum().item())
        reference = policy if moving_reference else REFERENCE
        anchor, beta = effective_anchor(reference, policy, BETA, proximal)

        def loss(logps: Tensor, anchor: Tensor = anchor, beta: float = beta) -> Tensor:
            return dpo_loss(logps[pairs], anchor[pairs], beta=beta, labels=labels).mean()

        policy = solve(loss, policy)
    return result


def law_of_strength(t: float, proximal: float) -> float:
    return (1 - (proximal / (BETA + proximal)) ** t) / BETA


def law_of_distance(t: float, proximal: float) -> float:
    policy = (REFERENCE + law_of_strength(t, proximal) * REWARDS).log_softmax(0)
    return (policy.exp() * (policy - (REFERENCE + REWARDS / BETA).log_softmax(0))).sum().item()


def show_iterates(out: Path | None) -> Iterator[Row]:
    proximal = {weight: iterates(weight) for weight in PROXIMAL}
    fixed, moving = iterates(0.0), iterates(0.0, moving_reference=True)
    for weight, run in proximal.items():
        yield Row(f"PRPO, λ = {weight:g}: c_4", law_of_strength(4, weight), run.strength[4])
        ratio = (1 / BETA - run.strength[ROUNDS]) / (1 / BETA - run.strength[ROUNDS - 1])
        yield Row(f"PRPO, λ = {weight:g}: contraction λ/(β+λ)", weight / (BETA + weight), ratio)
    yield Row(f"iterative DPO, fixed reference: c_{ROUNDS}", 1 / BETA, fixed.strength[-1])
    yield Row(f"TR hard, every round: c_{ROUNDS}", ROUNDS / BETA, moving.strength[-1])
    if out is None:
        return

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4))
    t, curve = range(ROUNDS + 1), torch.linspace(0, ROUNDS, 200).tolist()
    left.axhline(1 / BETA, color=PALE, lw=1, ls=(0, (4, 3)), zorder=0)
    left.text(ROUNDS, 1.04 / BETA, "$1/\\beta$", color=PALE, ha="right")
    left.plot(t, moving.strength, "o-", color=RED, ms=5, lw=1.6, label="TR hard, every round:  $t/\\beta$")
    left.plot(t, fixed.strength, "s-", color=ORANGE, ms=5, lw=1.6, label="iterative DPO, fixed reference")
    for weight, color in PROXIMAL.items():
        left.plot(curve, [law_of_strength(s, weight) for s in curve], color=color, lw=1.6)
        left.plot(t, proximal[weight].strength, "o", color=color, ms=5)
        left.plot([], [], "o-", color=color, ms=5, lw=1.6, label=f"PRPO, $\\lambda = {weight:g}\\,\\beta$")
    left.legend(frameon=False, loc="upper right")
    left.set(ylim=(0, 2.6), xlim=(-0.3, ROUNDS + 0.3), xlabel="round $t$")
    left.set_ylabel("$c_t$,  how far $\\log\\,\\pi_t/\\pi_{ref}$ follows $r$")
    left.set_title("Strength of the reward by round")

    for weight, color in PROXIMAL.items():
        right.semilogy(t, [law_of_distance(s, weight) for s in t], color=color, lw=1.6)
        right.semilogy(t, proximal[weight].distance, "o", color=color, ms=5)
        rate = f"$\\lambda = {weight:g}\\,\\beta$ closes {BETA / (BETA + weight):.0%} of the gap a round"
        right.text(0, {1.0: 1e-6, 3.0: 1.6e-7, 9.0: 2.6e-8}[weight], rate, color=color)
    right.semilogy(t[2:], moving.distance[2:], "o-", color=RED, ms=5, lw=1.6)
    right.text(ROUNDS, 1.5, "TR hard reaches it at $t = 1$ and continues", color=RED, ha="right")
    right.set(ylim=(4e-9, 5), xlim=(-0.3, ROUNDS + 0.3), xlabel="round $t$")
    right.set_title("Distance to the RLHF optimum,  KL$(\\pi_t\\,\\|\\,\\pi^*)$")
    save(figure, out / "iterates.png", "lines: the laws     points: solved with dpo_loss and effective_anchor")


# --- syncs -------------------------------------------------------------------------------------------------

STEPS, TAU, ALPHA = 240, 60, 0.5


class Training(NamedTuple):
    """Per step: DPO's gradient scale −dL/dh and curvature d²L/dh², and the margin to the starting policy."""

    gradient: list[float]
    curvature: list[float]
    margin: list[float]


def train_one_pair(tau: int, alpha: float) -> Training:
    """Gradient descent on one pair; every `tau` steps the reference takes a share `alpha` of the policy."""
    margin, reference = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    result = Training([], [], [])
    for step in range(STEPS):
        if step and step % tau == 0:
            reference = torch.lerp(reference, margin, alpha)
        h = margin.clone().requires_grad_()
        zeros = torch.zeros_like(h)
        loss = dpo_loss(torch.stack([h, zeros], -1), torch.stack([reference, zeros], -1), beta=BETA).sum()
        (slope,) = torch.autograd.grad(loss, h, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), h)
        result.gradient.append(-slope.item())
        result.curvature.append(curvature.item())
        result.margin.append(margin.item())
        margin = margin - 0.5 * slope.detach()
    return result


def show_syncs(out: Path | None) -> Iterator[Row]:
    runs = {
        "DPO": (train_one_pair(STEPS, 1.0), INK),
        f"TR hard, $\\tau = {TAU}$": (train_one_pair(TAU, 1.0), RED),
        f"TR soft, $\\alpha = {ALPHA:g}$": (train_one_pair(1, ALPHA), BLUE),
    }
    plain, hard, soft = (run for run, _ in runs.values())
    yield Row(
        "DPO: gradient scale βσ(−βh), last step",
        BETA / (1 + math.exp(BETA * plain.margin[-1])),
        plain.gradient[-1],
    )
    yield Row("TR hard: gradient scale at a sync, β/2", BETA / 2, min(hard.gradient[TAU::TAU]))
    yield Row("TR hard: curvature at a sync, β²/4", BETA**2 / 4, min(hard.curvature[TAU::TAU]))
    # a steady drift of d per step leaves a lag of d(1−α)/α right after a mix, where this step's gradient is taken
    drift = soft.margin[-1] - soft.margin[-2]
    lag = math.log(BETA / soft.gradient[-1] - 1) / BETA
    yield Row("TR soft: lag d(1−α)/α just after a mix", drift * (1 - ALPHA) / ALPHA, lag)
    if out is None:
        return

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2))
    for name, (run, color) in runs.items():
        for axis, values in zip(axes, run, strict=True):
            axis.plot(values, color=color, lw=1.7, label=name)
    for axis, level, text in ((axes[0], BETA / 2, "$\\beta/2$"), (axes[1], BETA**2 / 4, "$\\beta^2/4$")):
        axis.axhline(level, color=PALE, lw=1, ls=(0, (4, 3)), zorder=0)
        axis.text(STEPS + 4, level, text, color=PALE, va="center", clip_on=False)
        axis.set_ylim(0, 1.12 * level)
    axes[0].set_title("Gradient scale  $\\beta\\,\\sigma(-\\beta h)$")
    axes[1].set_title("Curvature  $\\beta^2\\sigma(\\beta h)\\,\\sigma(-\\beta h)$")
    axes[2].set_title("Margin to the starting policy")
    axes[2].set_ylim(0)
    axes[2].legend(frameon=False, loc="upper left")
    for axis in axes:
        axis.set(xlabel="step", xlim=(0, STEPS))
    save(figure, out / "syncs.png", "one pair, gradient descent; h is the margin to the current reference")


# --- certain labels ----------------------------------------------------------------------------------------

MASS, WEIGHT, LONG = 0.3, 0.5, 3_000  # q, the reference's mass on the winner; β of all three; steps


def two_arms(loss: Callable[[Tensor], Tensor], steps: int = LONG) -> list[float]:
    """Gradient descent on the log-odds of two responses: their margin to the reference at each step."""
    start = math.log(MASS / (1 - MASS))
    logits = torch.tensor([start, 0.0], dtype=torch.float64)
    margins = []
    for _ in range(steps):
        logits.requires_grad_()
        (slope,) = torch.autograd.grad(loss(logits.log_softmax(0)), logits)
        logits = (logits - slope).detach()
        margins.append((logits[0] - logits[1]).item() - start)
    return margins


def mpo_optimum(certainty: float, weight: float, mass: float) -> float:
    """π* of the winner: c = 2p − 1, the SFT term's weight, the reference's mass on the winner."""
    b = certainty - weight
    return (b + math.sqrt(b * b + 4 * certainty * weight * mass)) / (2 * certainty)


def mpo_with_sft(logps: Tensor, certainty: float, weight: float, mass: float) -> Tensor:
    label = torch.tensor([(1 + certainty) / 2], dtype=torch.float64)
    likelihood = torch.tensor([mass, 1 - mass], dtype=torch.float64) * sft_loss(logps, torch.ones(2))
    return mpo_loss(logps[None], labels=label).sum() + weight * likelihood.sum()


def show_certain_labels(out: Path | None) -> Iterator[Row]:
    reference = torch.tensor([[MASS, 1 - MASS]], dtype=torch.float64).log()
    runs = {
        "DPO": two_arms(lambda x: dpo_loss(x[None], reference, beta=WEIGHT).sum()),
        "IPO": two_arms(lambda x: ipo_loss(x[None], reference, beta=WEIGHT).sum() / 16),
        "MPO": two_arms(lambda x: mpo_with_sft(x, 1.0, WEIGHT, MASS)),
    }
    root = mpo_optimum(1.0, WEIGHT, MASS)
    stop = math.log(root / (1 - root)) - math.log(MASS / (1 - MASS))
    # DPO's flow dh/dt = 2βσ(−βh) has e^βh + βh = 1 + 2β²t: no limit, h ~ (log t)/β
    runaway = math.log(2 * WEIGHT**2 * LONG) / WEIGHT
    for _ in range(5):
        runaway = math.log(1 + 2 * WEIGHT**2 * LONG - WEIGHT * runaway) / WEIGHT
    yield Row("DPO, label certain: margin ~ (log t)/β", runaway, runs["DPO"][-1])
    yield Row("IPO, label certain: margin 1/(2β)", 1 / (2 * WEIGHT), runs["IPO"][-1])
    yield Row("MPO + SFT, label certain: margin of the root", stop, runs["MPO"][-1])
    weights = torch.logspace(-1.7, 1.3, 13).tolist()
    solved = {
        c: [solve(lambda x, c=c, w=w: mpo_with_sft(x, c, w, MASS), reference[0]).exp()[0].item() for w in weights]
        for c in (1.0, 0.6, 0.2)
    }
    for c, points in solved.items():
        yield Row(f"MPO + SFT, c = {c:g}, β = {weights[6]:.2f}: π*", mpo_optimum(c, weights[6], MASS), points[6])
    if out is None:
        return

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4))
    steps = range(1, LONG + 1)
    for name, color in (("DPO", INK), ("IPO", ORANGE), ("MPO", GREEN)):
        left.semilogx(steps, runs[name], color=color, lw=1.8)
    left.text(500, runs["DPO"][500] + 0.6, "DPO diverges, as $(\\log t)/\\beta$", color=INK, ha="right")
    left.text(LONG, runs["MPO"][-1] + 0.25, "MPO + SFT stops at its root", color=GREEN, ha="right")
    left.text(LONG, 1 / (2 * WEIGHT) - 0.25, "IPO stops at $1/(2\\beta)$", color=ORANGE, ha="right", va="top")
    left.set(xlim=(1, LONG), ylim=(0, None), xlabel="step of gradient descent")
    left.set_title("One response always wins:  margin to the reference")

    fine = torch.logspace(-1.8, 1.4, 200).tolist()
    for (c, points), color in zip(solved.items(), (GREEN, BLUE, PURPLE), strict=True):
        right.semilogx(fine, [mpo_optimum(c, w, MASS) for w in fine], color=color, lw=1.6)
        right.semilogx(weights, points, "o", color=color, ms=5, label=f"$p = {(1 + c) / 2:g}$")
    right.axhline(MASS, color=PALE, lw=1, ls=(0, (4, 3)), zorder=0)
    right.text(0.017, MASS - 0.015, "the reference", color=PALE, va="top")
    right.legend(frameon=False, title="label probability", alignment="left")
    right.set(xlabel="weight $\\beta$ of the SFT term", ylim=(0.2, 1.02), xlim=(10**-1.8, 10**1.4))
    right.set_title("Maximum Preference Optimization:  $\\pi^*$ of the winner")
    save(
        figure,
        out / "certain_labels.png",
        "left: gradient descent, $\\beta = 0.5$     right: lines, the law; points, mpo_loss and sft_loss",
    )


# --- theorem 4.1 -------------------------------------------------------------------------------------------

# P(y_i≻y_j): five responses, each beats the next two, so no reward explains them
CIRCLE = torch.sigmoid(torch.tensor([[(0, 2, 1, -1, -2)[(j - i) % 5] for j in range(5)] for i in range(5)]).double())


def preference_gradients() -> tuple[Tensor, Tensor]:
    """Gradients of the expected preference of the policy's choices, and of MPO's loss on labelled pairs."""
    policy, sampler = torch.zeros(5, dtype=torch.float64, requires_grad=True), REFERENCE.exp()
    drawn = sampler[:, None] * sampler
    logps = (policy + REWARDS).log_softmax(0)
    choice = torch.sigmoid(logps[:, None] - logps)  # i rather than j
    value = (drawn * (choice * CIRCLE + choice.T * CIRCLE.T)).sum()
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    loss = (2 * (drawn * CIRCLE).flatten() * mpo_loss(logps[pairs])).sum()
    return torch.autograd.grad(value, policy, retain_graph=True)[0], -torch.autograd.grad(loss, policy)[0]


def show_theorem() -> Iterator[Row]:
    enumerated, estimated = preference_gradients()
    for i in range(5):
        yield Row(f"MPO, Theorem 4.1: ∂ preference / ∂ logit_{i}", enumerated[i].item(), estimated[i].item())


# --- the program -------------------------------------------------------------------------------------------


def save(figure: Figure, path: Path, note: str) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(12)
        axis.tick_params(colors=INK, labelsize=9)
    figure.text(0.012, 0.012, note, color=PALE, fontsize=9)
    figure.tight_layout(rect=(0, 0.045, 1, 1), w_pad=3)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def rows(out: Path | None = None) -> list[Row]:
    """Compute the table; draw the figures if a folder is given."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    return [*show_iterates(out), *show_syncs(out), *show_certain_labels(out), *show_theorem()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bandit"), help="folder of the figures")
    out = parser.parse_args().out
    table = rows(out)
    print(f"{'':<46}{'law':>12}{'measured':>14}{'difference':>13}")
    for row in table:
        print(f"{row.claim:<46}{row.law:>12.6g}{row.measured:>14.6g}{row.measured - row.law:>13.1e}")
    print(f"\nfigures: {', '.join(str(path) for path in sorted(out.glob('*.png')))}")


if __name__ == "__main__":
    main()
