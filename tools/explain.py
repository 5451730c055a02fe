"""Why this token: what tools/generate.py --explain prints at every step.

Probabilities before and after the filters of Fan et al. 2018, Holtzman et al. 2020 and Nguyen et
al. 2024; minillm/sampling.py does the filtering.
"""

from dataclasses import replace

import torch
from torch import Tensor

from minillm.sampling import Sampling, candidates, penalize_repetition


def removed_by(logits: Tensor, sampling: Sampling) -> dict[str, list[int]]:
    """The tokens that each filter removes, of those that the filters before it left; what a low
    temperature leaves no probability that fp32 can tell from 0 falls to it.

    Shapes: logits (V,), after the penalty. Greedy, all but the best fall to that.
    """
    left = set(range(len(logits)))
    if sampling.is_greedy:
        return {"greedy": sorted(left - {int(logits.argmax())})}
    none = replace(sampling, top_k=None, top_p=None, min_p=None)
    stages = {
        f"temperature {sampling.temperature}": none,
        f"top-k {sampling.top_k}": replace(none, top_k=sampling.top_k),
        f"top-p {sampling.top_p}": replace(sampling, min_p=None),
        f"min-p {sampling.min_p}": sampling,
    }
    removed = {}
    for name, stage in stages.items():
        if name.endswith("None"):
            continue
        ids, weights = candidates(logits[None], stage)
        still = left & set(ids[0, weights[0] > 0].tolist())
        if len(still) < len(left) or stage is not none:
            removed[name] = sorted(left - still)
        left = still
    return removed


def explain(
    tokenizer, seen: list[int], logits: Tensor, sampling: Sampling, chosen: int, n: int
) -> str:
    """The n likeliest tokens and the chosen one: the model's own probability of each, its share in
    the draw, and what removed it; then how much each filter removed.

    Shapes: logits (V,), before the penalty; `seen` are the tokens so far.
    """
    own = torch.softmax(logits, -1)  # (V,)
    penalized = penalize_repetition(
        logits[None], torch.tensor([seen], device=logits.device), None,
        sampling.repetition_penalty, tokenizer.eos_id,
    )[0]  # fmt: skip
    removed = removed_by(penalized, sampling)
    why = {token: name for name, tokens in removed.items() for token in tokens}
    share = torch.zeros_like(own)  # (V,)
    if sampling.is_greedy:
        share[chosen] = 1.0
    else:
        ids, weights = candidates(penalized[None], sampling)
        share[ids[0]] = weights[0] / weights.sum()
    best = own.topk(min(n, len(own))).indices.tolist()
    lines = [f"{'model':>9}{'draw':>9}  token"]
    for token in best if chosen in best else [*best, chosen]:
        notes = [word for word in (
            "chosen" if token == chosen else "",
            f"penalty {sampling.repetition_penalty:g}" if penalized[token] != logits[token] else "",
            f"removed by {why[token]}" if token in why else "",
        ) if word]  # fmt: skip
        shown = repr(_text(tokenizer, seen, token))
        line = f"{own[token]:9.2%}{share[token]:9.2%}  {shown:<20} {', '.join(notes)}"
        lines.append(line.rstrip())
    told = [f"{name} removed {len(tokens):,} tokens worth {float(own[tokens].sum()):.2%}"
            for name, tokens in removed.items()]  # fmt: skip
    lines.append("; ".join([*told, f"{len(own) - len(why):,} left"]))
    return "\n".join(lines)


def _text(tokenizer, seen: list[int], token: int) -> str:
    """What the token adds to the text; its id where that is no whole character."""
    before = tokenizer.decode(seen)
    text = tokenizer.decode([*seen, token])[len(before) :]
    return text if text and "\ufffd" not in text else f"<{token}>"
