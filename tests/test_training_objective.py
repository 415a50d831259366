"""The losses that are trained on, against torch's own; and the operators that replace GPT-2's."""

import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import NewGELUActivation

from moe_emergence.config import OptimConfig
from moe_emergence.data.loader import StepBatch
from moe_emergence.models import upcycle
from moe_emergence.moe import RouterNoise
from moe_emergence.training import objective
from moe_emergence.training.objective import NextTokenLoss, next_token_losses
from moe_emergence.training.operators import causal_attention, use_fast_operators
from moe_emergence.training.schedules import build_optimizer
from moe_emergence.training.step import forward_backward

CPU = torch.device("cpu")


def model(length: int = 300) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50,
        n_positions=length,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def plain_losses(hidden_BLH: Tensor, head_VH: Tensor, ids_BL: Tensor) -> Tensor:
    logits = (hidden_BLH @ head_VH.t())[:, :-1].flatten(0, 1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses = functional.cross_entropy(logits.to(wide), ids_BL[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids_BL), -1)


def losses_and_gradients(
    function: object, hidden: Tensor, head: Tensor, ids: Tensor, upstream: Tensor
) -> tuple[Tensor, ...]:
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    losses = function(hidden, head, ids)  # type: ignore[operator]
    return losses.detach(), *torch.autograd.grad(losses, (hidden, head), upstream.to(losses.dtype))


@settings(max_examples=40)
@given(
    batch=st.integers(1, 3),
    length=st.integers(2, 9),
    width=st.integers(1, 6),
    vocabulary=st.integers(1, 40),
    chunk=st.integers(1, 200),
    scale=st.sampled_from([0.0, 1.0, 100.0]),
    seed=st.integers(0, 100),
)
def test_losses_and_gradients_are_those_of_cross_entropy(
    batch: int, length: int, width: int, vocabulary: int, chunk: int, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, width, generator=generator, dtype=torch.float64) * scale
    head = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
    upstream = torch.randn(batch, length - 1, generator=generator, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "_chunk", lambda tensor: chunk)
        found = losses_and_gradients(next_token_losses, hidden, head, ids, upstream)
    expected = losses_and_gradients(plain_losses, hidden, head, ids, upstream)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_less_exact_than_cross_entropy(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 65, 32, generator=generator).to(dtype)
    head = torch.randn(1000, 32, generator=generator).to(dtype)
    ids = torch.randint(0, 1000, (2, 65), generator=generator)
    upstream = torch.rand(2, 64, generator=generator)
    exact = losses_and_gradients(plain_losses, hidden.double(), head.double(), ids, upstream)
    plain = losses_and_gradients(plain_losses, hidden, head, ids, upstream)
    found = losses_and_gradients(next_token_losses, hidden, head, ids, upstream)
    for ours, theirs, truth in zip(found, plain, exact, strict=True):
        assert ours.dtype == theirs.dtype
        error, allowed = (ours - truth).norm(), (theirs - truth).norm()
        assert error <= 1.2 * allowed + torch.finfo(torch.float32).eps * truth.norm()


def test_loss_of_an_impossible_token_stays_finite() -> None:
    hidden, head = torch.tensor([[[1e4], [0.0]]]), torch.tensor([[1.0], [-1.0]])
    assert next_token_losses(hidden, head, torch.tensor([[0, 1]])).tolist() == [[2e4]]


@pytest.mark.parametrize("upcycled", [False, True])
def test_losses_are_those_of_the_model(upcycled: bool) -> None:
    dense = model()
    trained = upcycle(dense, [1], 4, 1).eval() if upcycled else dense.eval()
    ids = torch.randint(0, 50, (3, 40), generator=torch.Generator().manual_seed(0))
    losses, decisions = NextTokenLoss(trained)(ids)
    outputs = trained(input_ids=ids, labels=ids)
    expected = outputs.lm_loss if upcycled else outputs.loss
    assert losses.shape == (3, 39)
    assert losses.mean().item() == pytest.approx(expected.item(), rel=1e-6)
    assert len(decisions) == int(upcycled)


def test_autocast_reaches_the_head() -> None:
    trained = model()
    ids = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(0))
    exact, _ = NextTokenLoss(trained)(ids)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = NextTokenLoss(trained)(ids)
    assert losses.dtype == torch.float32
    assert not torch.equal(losses, exact)
    torch.testing.assert_close(losses, exact, rtol=2e-2, atol=2e-2)
    losses.mean().backward()
    assert trained.lm_head.weight.grad is not None
    assert trained.lm_head.weight.grad.dtype == torch.float32


@settings(max_examples=20)
@given(length=st.sampled_from([1, 2, 127, 128, 129, 256, 300]), seed=st.integers(0, 10))
def test_attention_in_blocks_is_causal_attention(length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 2, length, 4)
    q, k, v, upstream = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    found = causal_attention(q, k, v, 0.3)
    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, (q, k, v), upstream),
        torch.autograd.grad(expected, (q, k, v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("upcycled", [False, True])
def test_fast_operators_change_rounding_only(upcycled: bool, tmp_path: Path) -> None:
    plain, fast = (upcycle(m, [1], 4, 1) if upcycled else m for m in (model(), model()))
    plain.eval(), fast.eval()
    names = set(fast.state_dict())
    use_fast_operators(fast, CPU, "bf16")
    assert not any(isinstance(m, NewGELUActivation) for m in fast.modules())
    assert set(fast.state_dict()) == names
    ids = torch.randint(0, 50, (2, 300), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fast(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)
    masked = torch.ones_like(ids)
    masked[0, :100] = 0
    ours, theirs = (m(ids, attention_mask=masked).logits for m in (fast, plain))
    torch.testing.assert_close(ours[masked.bool()], theirs[masked.bool()], rtol=1e-5, atol=1e-5)
    fast.save_pretrained(tmp_path / "fast")
    plain.save_pretrained(tmp_path / "plain")
    ours, theirs = ((tmp_path / n / "config.json").read_text() for n in ("fast", "plain"))
    assert ours == theirs


def test_generation_with_fast_operators() -> None:
    plain, fast = model(), model()
    use_fast_operators(fast, CPU, "bf16")
    prompt = torch.tensor([[3, 1, 4]])
    ours, theirs = (
        m.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0) for m in (fast, plain)
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("scope", ["global", "micro"])
def test_loss_curve_is_that_of_a_plain_loop(scope: Literal["global", "micro"]) -> None:
    """Ten steps in fp32, against the model's own losses and AdamW without fused operators."""
    optim = OptimConfig(learning_rate=1e-2, balance_scope=scope)
    ids = torch.randint(0, 50, (2, 2, 40), generator=torch.Generator().manual_seed(0))
    plain, fast = (upcycle(model(), [1], 4, 1).train() for _ in range(2))
    plain.config.lb_coef, plain.config.z_coef = optim.lb_coef, optim.z_coef
    accelerator = Accelerator(cpu=True)
    use_fast_operators(fast, CPU, "no")
    loss, optimizer = accelerator.prepare(NextTokenLoss(fast), build_optimizer(fast, optim))
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0, foreach=False)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    ours, theirs = [], []
    for step in range(10):
        noise = RouterNoise(0.1, 0, step)
        sums = forward_backward(
            accelerator, loss, StepBatch(ids, torch.ones(2, 2, 1).double()), optim, noise
        )
        ours.append(float(sums.lm_loss))
        batches = ids.flatten(0, 1).split(4 if scope == "global" else 2)
        outputs = []
        for i, batch in enumerate(batches):
            at = RouterNoise(0.1, 0, step, first_token=i * batch.numel())
            outputs.append(plain(input_ids=batch, labels=batch, router_noise=at))
            (outputs[-1].loss / len(batches)).backward()
        theirs.append(sum(o.lm_loss.item() for o in outputs) / len(outputs))
        for one in (optimizer, reference):
            one.step()
            one.zero_grad(set_to_none=True)
    assert ours[-1] < ours[0] - 0.5
    assert ours == pytest.approx(theirs, rel=1e-4)


FAULTS = """
import resource, sys, torch
from moe_emergence.training.memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else True
for _ in range(20):  # the heap has found its size after at most ten
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    # each above 32 MB, up to which glibc learns to keep what is freed
    step = [torch.ones(size) for size in (10_000_000, 18_000_000, 9_000_000, 14_000_000)]
    del step
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of glibc is what is set")
def test_freed_memory_is_used_again() -> None:
    def faults(how: str) -> tuple[int, int]:
        command = [sys.executable, "-c", FAULTS, how]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        kept, count = done.stdout.split()
        return int(kept), int(count)

    kept, count = faults("keep")
    if not kept:
        pytest.skip("this C library has no mallopt")
    _, fresh = faults("return")
    assert fresh > 5_000
    assert count < fresh / 10
