"""Fingerprints: any other base, and any other tokenizer, has another one."""


import torch

from llama import Llama
from minillm.fingerprint import fingerprint
from tests.conftest import small_config


def test_one_changed_number_anywhere_changes_the_fingerprint():
    model = Llama(small_config())
    before, weight = fingerprint(model), model.layers[1].feed_forward.w2.weight
    for at in ((0, 0), (0, 1), (17, 30)):
        with torch.no_grad():
            weight[at] += 1.0
        now = fingerprint(model)
        assert not set(now.values()) & set(before.values())
        before = now
