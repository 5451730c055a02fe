"""Phi-1.5: the model in its official names, its tokenizer, and its weight files."""

from minillm.family import Family
from phi.checkpoint import OFFICIAL, load_phi, read_config, save_phi
from phi.model import Phi, PhiConfig
from phi.tokenizer import PhiTokenizer

FAMILY = Family(
    name="phi", bundled="tiny-phi", config=PhiConfig, model=Phi, tokenizer=PhiTokenizer,
    load=load_phi, save=save_phi, targets=("q_proj", "v_proj"),
    official=OFFICIAL, read_config=read_config,
)  # fmt: skip

__all__ = ["Phi", "PhiConfig", "PhiTokenizer", "load_phi", "save_phi"]
