"""What a model of N parameters reaches on D tokens, what that costs, and what is best for a budget.

    python tools/scaling_laws.py --params 67e9 --tokens 4.1e12 --lower 1% --grow 1.41
    python tools/scaling_laws.py --flops 5.76e23 --out-dir runs/scaling

L(N, D) = E + A / N^alpha + B / D^beta, with the constants as published and as fitted again later.
Training costs C = 6 N D floating-point operations (Kaplan et al. 2020). Repeating the data is worth
less each time, here half as much as the time before, so x more passes over D tokens are worth
D' = D (2 - 2^-x) fresh ones, never more than 2 D. They cost C = 6 N D (1 + x) all the same: a
repeated token is worth less, not cheaper. Both ways to count are shown, by their names.
Sources: Hoffmann et al. 2022, approach 3; Besiroglu et al. 2024; Muennighoff et al. 2023.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from minillm.cli import Parser, above_zero
from minillm.errors import UserError, friendly_errors
from minillm.plots import plot_iso_loss


@dataclass(frozen=True)
class Fit:
    """The five constants of L(N, D)."""

    source: str
    irreducible: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, params: float, tokens: float) -> float:
        """Nats per token after training `params` parameters on `tokens` fresh tokens."""
        return self.irreducible + self.a / params**self.alpha + self.b / tokens**self.beta

    def tokens_for(self, loss: float, params: float) -> float:
        """The fresh tokens it takes. Errors: UserError for a loss that no data reaches."""
        left = loss - self.irreducible - self.a / params**self.alpha
        if left <= 0:
            raise UserError(f"loss {loss:.4f}: {params:.3g} parameters do not reach it on any "
                            "data; ask for less, or give more --params")  # fmt: skip
        return (self.b / left) ** (1 / self.beta)

    def optimum(self, flops: float) -> tuple[float, float]:
        """(N, D) of the lowest loss with 6 N D = `flops`: Hoffmann et al. 2022, equation 4."""
        ratio = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        params = ratio * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        return params, flops / 6 / params

    def searched_optimum(self, flops: float) -> tuple[float, float]:
        """The same by a search over N, which knows nothing of the formula."""
        low, high = 0.0, math.log(flops)
        for _ in range(200):
            a, b = low + (high - low) / 3, high - (high - low) / 3
            at_a, at_b = (self.loss(math.exp(x), flops / 6 / math.exp(x)) for x in (a, b))
            low, high = (low, b) if at_a < at_b else (a, high)
        return math.exp(low), flops / 6 / math.exp(low)


PUBLISHED = Fit("Hoffmann et al. 2022", 1.69, 406.4, 410.7, 0.34, 0.28)
REFITTED = Fit("Besiroglu et al. 2024", 1.8172, 482.01, 2085.43, 0.3478, 0.3658)


def flops(params: float, tokens: float) -> float:
    """C = 6 N D."""
    return 6 * params * tokens


def effective_tokens(tokens: float, more_epochs: float) -> float:
    """What 1 + x passes over `tokens` are worth: D (2 - 2^-x)."""
    return tokens * (2 - 2**-more_epochs)


def more_epochs(tokens: float, effective: float) -> float:
    """The x with effective_tokens(tokens, x) = effective. Errors: UserError beyond 2 D."""
    if effective >= 2 * tokens:
        raise UserError(
            f"{effective:.3g} tokens' worth of {tokens:.3g} is unreachable: repeating for ever is "
            "worth twice the data; ask for less, or give more --tokens"
        )
    return -math.log2(2 - effective / tokens)


def percent(text: str) -> float:
    """1% or 0.01 as 0.01."""
    return above_zero(text.removesuffix("%")) / (100 if text.endswith("%") else 1)


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--params", type=above_zero, metavar="N", help="parameters")
    add("--tokens", type=above_zero, metavar="D", help="fresh tokens")
    add("--lower", type=percent, metavar="SHARE",
        help="lower the loss by so much, by repeating the data")  # fmt: skip
    add("--grow", type=above_zero, metavar="TIMES",
        help="with --lower: so many times the parameters for the same compute")  # fmt: skip
    add("--flops", type=above_zero, metavar="C", help="the best N and D for a budget")
    add("--out-dir", help="draws the iso-loss picture here")
    return parser.parse_args(argv)


def about_a_model(params: float, tokens: float, lower: float | None, grow: float | None) -> dict:
    """Every answer by name, printed on the way; unrounded until then."""
    cost, loss = flops(params, tokens), PUBLISHED.loss(params, tokens)
    found = {"flops": cost, "loss": loss}
    print(f"{params:.4g} parameters, {tokens:.4g} tokens: C = 6ND = {cost:.3g} FLOPs")
    for fit in (PUBLISHED, REFITTED):
        parts = fit.a / params**fit.alpha, fit.b / tokens**fit.beta
        print(f"  L = {fit.irreducible} + {parts[0]:.4f} + {parts[1]:.4f} = "
              f"{fit.loss(params, tokens):.4f}  ({fit.source})")  # fmt: skip
    if lower is None:
        return found
    wanted = (1 - lower) * loss
    worth = PUBLISHED.tokens_for(wanted, params)
    x = more_epochs(tokens, worth)
    seen, counted = flops(params, tokens * (1 + x)), flops(params, worth)
    found |= {"wanted": wanted, "effective_tokens": worth, "more_epochs": x,
              "flops_of_tokens_seen": seen, "flops_of_effective_tokens": counted}  # fmt: skip
    print(f"{lower:.2%} lower, L' = {wanted:.4f}, takes what {worth:.3g} fresh tokens would "
          f"({worth / tokens:.2f} D): {x:.2f} additional epochs")  # fmt: skip
    print(f"  C' by tokens seen, 6ND(1+x):     {seen:.3g} FLOPs: what the machine computes")
    print(f"  C' by effective tokens, 6ND':    {counted:.3g} FLOPs: as if repeating were cheaper")
    if grow is not None:
        for name, budget in (("tokens seen", seen), ("effective tokens", counted)):
            epochs = budget / flops(grow * params, tokens)
            found[f"epochs by {name}"] = epochs
            share = [math.log(v) / math.log(budget / cost) for v in (grow, epochs)]
            faster = "faster" if share[1] > share[0] else "slower"
            print(f"  {grow:g} N for the same C' by {name}: {epochs:.2f} epochs; N grows as "
                  f"C^{share[0]:.2f}, epochs as C^{share[1]:.2f}: epochs {faster}")  # fmt: skip
    return found


def about_a_budget(budget: float) -> dict:
    """The compute-optimal (N, D) of both fits, and the search's for the first."""
    found = {}
    for fit in (PUBLISHED, REFITTED):
        params, tokens = found[fit.source] = fit.optimum(budget)
        searched = fit.searched_optimum(budget)[0]
        print(f"{budget:.3g} FLOPs: {params:.3g} parameters, {tokens:.3g} tokens "
              f"({tokens / params:.0f} each), L = {fit.loss(params, tokens):.4f}; searched "
              f"{searched:.3g}  ({fit.source})")  # fmt: skip
    return found


def main(argv=None) -> dict:
    args = parse_args(argv)
    if (args.params is None) != (args.tokens is None):
        raise UserError("--params and --tokens: one says nothing without the other; give both")
    if args.flops is None and args.params is None:
        raise UserError("--params and --tokens, or --flops: give one of the two")
    if args.lower and args.params is None:
        raise UserError("--lower: the loss of which model? add --params and --tokens")
    if args.grow and args.lower is None:
        raise UserError("--grow: for which compute? add --lower, or leave it out")
    found = {}
    if args.params and args.tokens:
        found |= about_a_model(args.params, args.tokens, args.lower, args.grow)
    if args.flops:
        found |= about_a_budget(args.flops)
    if args.out_dir:
        path = Path(args.out_dir) / "iso_loss.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        budget = args.flops or found["flops"]
        plot_iso_loss(PUBLISHED.loss, PUBLISHED.optimum, budget, path)
        print(f"drawn: {path}")
    return found


if __name__ == "__main__":
    with friendly_errors():
        main()
