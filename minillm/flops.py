"""Floating-point operations of training, counted from the model and what of it trains."""

from torch import nn

from minillm.adapt.prompts import SoftPrompt


def training_flops(model: nn.Module, tokens: int, supervised: int, rows: int) -> float:
    """About how many a training took: two for each multiply-add with a weight, in three passes.

    Forward: every token meets every matrix of the blocks, every supervised one the head. Backward
    to the inputs: the blocks above the lowest trained tensor, and the head. Backward to the
    weights: the trained matrices. Attention's products of activations and all vector work are
    left out (so full fine-tuning of a large model comes to 6 N per token: Kaplan et al. 2020).

    Units: `tokens` and `supervised` in all steps together; `rows` of them, each of which begins
    with the soft prompt's columns, if there is one.
    """
    base = getattr(model, "model", model)
    if isinstance(model, SoftPrompt):
        tokens += rows * model.n_virtual
    blocks = [_matrices(block) for block in base.blocks]
    head = base.config.vocab_size * base.config.dim
    lowest = next((i for i, b in enumerate(base.blocks) if _trains(b)), len(blocks))
    if base is not model or _trains(base.embedding):
        lowest = 0  # what is trained comes before the first block
    above = sum(blocks[lowest:])
    forward = tokens * sum(blocks) + supervised * head
    again = tokens * above if base.gradient_checkpointing else 0
    to_inputs = tokens * above + supervised * head * (above > 0)
    trained = sum(_matrices(block, only_trained=True) for block in base.blocks)
    to_weights = tokens * trained + supervised * head * _trains(base.vocabulary_head)
    return 2.0 * (forward + again + to_inputs + to_weights)


def _matrices(module: nn.Module, only_trained: bool = False) -> int:
    """Numbers in its matrices."""
    return sum(p.numel() for p in module.parameters()
               if p.dim() == 2 and (p.requires_grad or not only_trained))  # fmt: skip


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
