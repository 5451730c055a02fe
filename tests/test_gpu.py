"""What only a GPU can show. Run with `pytest -m gpu`; skipped without one."""

import gc
import math

import pytest
import torch
from torch import nn

import llama.model
import minillm.cross_entropy
from llama import Llama
from llama.model import RMSNorm
from minillm import LoRALinear, add_lora, generate, mark_only_lora_as_trainable
from minillm.attention import causal_attention
from minillm.data.batches import Batches, Row
from minillm.errors import NumericError
from minillm.footprint import predict_footprint
from minillm.losses import token_loss
from minillm.norm import LayerNorm
from minillm.precision import DTYPES, choose_precision
from minillm.rope import rope_table
from minillm.sampling import Sampling, sample_next_token
from minillm.training import TrainSettings, train
from tests.conftest import sharp, small_config
from tools import prove

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PROMPTS = [[5, 6, 7], [3], [4] * 20]


@pytest.fixture
def model() -> Llama:
    model = sharp(Llama(small_config()))
    add_lora(model, ("wq", "wv"), rank=4, alpha=8, dropout=0.0)
    torch.nn.init.normal_(model.layers[0].attention.wq.lora_B, 0, 0.1)
    return mark_only_lora_as_trainable(model).cuda()


@pytest.fixture
def same_angles(monkeypatch) -> None:
    """Both devices turn by the CPU's angles: those are in fp32, and in the last bits of a cosine
    devices differ."""

    def table(positions, *sizes):
        return tuple(x.to(positions.device) for x in rope_table(positions.cpu(), *sizes))

    monkeypatch.setattr(llama.model, "rope_table", table)


def test_angles_equal_the_cpus_but_for_fp32s_rounding():
    positions = torch.arange(4096)[None]
    for ours, cpus in zip(rope_table(positions.cuda(), 128, 1e4), rope_table(positions, 128, 1e4),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(ours.cpu(), cpus, atol=4096 * 2**-22, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
def test_cache_on_equals_cache_off_in_fp64(model, attention):
    model.double().attention = attention
    assert generate(model, PROMPTS, 20) == generate(model, PROMPTS, 20, use_cache=False)


@pytest.mark.usefixtures("same_angles")
def test_logits_equal_the_cpus(model):
    tokens = torch.randint(0, 2048, (2, 40))
    on_gpu = model.double()(tokens.cuda()).cpu()
    torch.testing.assert_close(on_gpu, model.cpu()(tokens), atol=1e-9, rtol=0)


@pytest.mark.usefixtures("same_angles")
def test_losses_without_logits_equal_the_cpus(model, monkeypatch):
    """A frozen head's, in slices of the vocabulary, and their gradient."""
    monkeypatch.setattr(minillm.cross_entropy, "_slice_width", lambda x, n: 300)
    tokens, found = torch.randint(0, 2048, (2, 40)), []
    for device in ("cuda", "cpu"):
        model.double().to(device).zero_grad()
        loss, _ = token_loss(model, (tokens.to(device), tokens.to(device)))
        loss.backward()
        found.append([x.detach().cpu() for x in (loss, model.layers[0].attention.wq.lora_A.grad)])
    torch.testing.assert_close(*found, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_base_waits_in_host_memory_and_comes_back_bit_identical(model, dtype):
    layer = model.to(dtype).layers[0].attention.wq
    base = layer.weight.detach().clone()
    for _ in range(50):
        model.eval()
        assert layer._set_aside[0].device.type == "cpu" and layer.weight.is_cuda
        model.train()
    assert torch.equal(layer.weight, base)


def test_a_shared_weight_stays_on_the_gpu_while_a_layer_is_merged():
    linear = nn.Linear(12, 20).cuda()
    one, two = (LoRALinear.from_linear(linear, 4, 8) for _ in range(2))
    nn.init.normal_(one.lora_B), nn.init.normal_(two.lora_B)
    x = torch.randn(2, 12, device="cuda")
    want = linear(x), one(x), two(x)
    one.eval(), two.eval()
    torch.testing.assert_close((linear(x), one(x), two(x)), want, atol=1e-5, rtol=1e-5)
    assert one.train().weight is two.train().weight is linear.weight


def test_logits_that_are_no_numbers_leave_the_gpu_usable():
    with pytest.raises(NumericError):
        sample_next_token(torch.full((2, 50), math.nan, device="cuda"), Sampling(temperature=1.0))
    assert float(torch.ones(3, device="cuda").sum()) == 3


def test_every_promise_holds_on_a_gpu():
    assert all(finding.holds for finding in prove.main(["--device", "cuda", "--toggles", "20"]))


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_training_lowers_the_loss_in_every_precision(model, name):
    rows = [Row(t, t) for t in torch.randint(0, 2048, (8, 20))]
    precision = choose_precision(name, "cuda")
    batches, held_out = Batches(rows, 2, 0), Batches(rows, 4, 0, seed=None)
    settings = TrainSettings(lr=0.02, epochs=20, accumulation_steps=2)
    progress, _ = train(model, token_loss, batches, held_out, settings, precision)
    assert progress.best < progress.before


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_predicted_memory_is_the_gpus_own_peak(name, checkpointing):
    device = torch.device("cuda")
    warm = torch.ones(64, 64, device=device, dtype=DTYPES[name], requires_grad=True)
    (warm @ warm).sum().backward()  # cuBLAS's own memory, of forward and backward
    gc.collect()  # an earlier test's model, freed meanwhile, would count against this one
    before = torch.cuda.memory_allocated()
    config = small_config(dim=1024, n_layers=8, n_heads=8, hidden_dim=2752, max_seq_len=512)
    model = Llama(config).to(device)
    add_lora(model, ("wq", "wv"), rank=16, alpha=32)
    mark_only_lora_as_trainable(model).gradient_checkpointing = checkpointing
    rows = [Row(t, t) for t in torch.randint(0, 2048, (8, 513))]
    batches, precision = Batches(rows, 4, 0), choose_precision(name, device)
    predicted = predict_footprint(model, batches.largest(), precision, 2).total
    torch.cuda.reset_peak_memory_stats()
    train(model, token_loss, batches, None, TrainSettings(accumulation_steps=2), precision)
    peak = torch.cuda.max_memory_allocated() - before
    assert predicted == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_a_norm_under_autocast_keeps_no_wider_copy_of_its_input(kind):
    norm, kept = kind(64, 1e-5).to("cuda", torch.bfloat16), []
    norm.requires_grad_(False)
    x = torch.randn(8, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    watch = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with watch, torch.autocast("cuda", torch.bfloat16):
        out = norm(x)
    wide = [t for t in kept if t.numel() == x.numel() and t.dtype == torch.float32]
    assert out.dtype == torch.bfloat16 and not wide


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_heads_under_a_mask_never_hold_all_scores(dtype):
    n_heads, n = 16, 2048
    q = torch.randn(1, n_heads, n, 64, device="cuda", dtype=dtype)
    k, v = torch.randn(2, 1, 2, n, 64, device="cuda", dtype=dtype)
    mask = torch.ones(1, 1, n, n, dtype=torch.bool, device="cuda").tril()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    causal_attention(q, k, v, mask, "sdpa")
    scores = n_heads * n * n * dtype.itemsize
    assert torch.cuda.max_memory_allocated() - before < scores / 2
