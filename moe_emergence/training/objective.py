"""What is trained: the next-token losses of a language model, without keeping its logits.

Letters: B sequences, L tokens in a sequence, N predictions, H model width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig

from moe_emergence.models.loading import LanguageModel
from moe_emergence.models.lower_layers import lower_states_given
from moe_emergence.moe import RouterDecision, RouterNoise
from moe_emergence.training.operators import FULL_BLOCKS


class NextTokenLoss(nn.Module):
    """A language model as a function from tokens to losses; it has no parameters of its own.

    Args:
        model: dense or mixture.
        first: index of a layer.
        lower: from token ids (B, L) to the hidden states (B, L, H) that layer `first` reads; the
            layers below are not run then.
    """

    def __init__(
        self,
        model: LanguageModel,
        first: int = 0,
        lower: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.first, self.lower = model, first, lower

    def forward(
        self, input_ids_BL: Tensor, router_noise: RouterNoise | None = None
    ) -> tuple[Tensor, tuple[RouterDecision, ...]]:
        """Losses (B, L-1) in nats, at least fp32, and the decisions of the mixture layers.

        Under autocast the head's product is in its dtype, the loss in fp32.
        """
        noise = {} if router_noise is None else {"router_noise": router_noise}
        with _without_masks(self.model.config, input_ids_BL.shape[1]):
            given: AbstractContextManager[None] = nullcontext()
            if self.lower is not None:
                given = lower_states_given(self.model, self.first, self.lower(input_ids_BL))
            with given:
                outputs = self.model.base_model(input_ids=input_ids_BL, use_cache=False, **noise)
        hidden_BLH, head_VH = outputs.last_hidden_state, self.model.get_output_embeddings().weight
        device = hidden_BLH.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden_BLH, head_VH = hidden_BLH.to(dtype), head_VH.to(dtype)
        losses = next_token_losses(hidden_BLH, head_VH, input_ids_BL)
        return losses, outputs.get("router_decisions") or ()


@contextmanager
def _without_masks(config: PreTrainedConfig, length: int) -> Iterator[None]:
    """No attention mask is made: blocks are full, and torch's attention is causal without one.

    Layers that see a window shorter than the block keep theirs.
    Transformers would look for packed sequences in the positions of a dense model: on a GPU the
    host waits for the device to answer, and a CUDA graph gets a mask where none is needed.
    """
    kept = config._attn_implementation
    window = getattr(config, "sliding_window", None)
    if kept == "sdpa" and (window is None or window >= length):
        config._attn_implementation = FULL_BLOCKS
    try:
        yield
    finally:
        config._attn_implementation = kept


def next_token_losses(hidden_BLH: Tensor, head_VH: Tensor, input_ids_BL: Tensor) -> Tensor:
    """(B, L-1) cross-entropy in nats of every token but the first, given those before it."""
    hidden_NH = hidden_BLH[:, :-1].flatten(0, 1)
    losses_N: Tensor = _HeadLoss.apply(hidden_NH, head_VH, input_ids_BL[:, 1:].flatten())
    return losses_N.view(input_ids_BL.shape[0], -1)


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy of `hidden @ head.T`.

    The logits' memory becomes their gradient during the forward pass, some rows at a time while
    they are in the cache. PyTorch's own way keeps the logits, their log-softmax and two gradients
    of that size, of which the vocabulary makes the largest arrays of the step.
    """

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, head_VH: Tensor, targets_N: Tensor) -> Tensor:
        logits_NV = hidden_NH @ head_VH.t()
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        losses_N = logits_NV.new_empty(len(targets_N), dtype=wide)
        rows = max(_chunk(logits_NV) // logits_NV.shape[1], 1)
        for logits, targets, losses in zip(
            logits_NV.split(rows), targets_N.split(rows), losses_N.split(rows), strict=True
        ):
            log_probs = torch.log_softmax(logits, dim=1, dtype=wide)
            picked = targets.unsqueeze(1)
            losses.copy_(log_probs.gather(1, picked).squeeze(1)).neg_()
            if any(ctx.needs_input_grad):
                gradient = log_probs.exp_()
                gradient.scatter_add_(1, picked, gradient.new_full(picked.shape, -1.0))
                logits.copy_(gradient)
        ctx.save_for_backward(hidden_NH, head_VH, targets_N, logits_NV)
        return losses_N

    @staticmethod
    def backward(ctx: Any, dlosses_N: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden_NH, head_VH, targets_N, gradient_NV = ctx.saved_tensors
        want_hidden, want_head, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            # views: with a tied head the hidden states depend on it, and these are partial
            hidden_NH, head_VH = hidden_NH.view_as(hidden_NH), head_VH.view_as(head_VH)
            logits_NV = (hidden_NH @ head_VH.t()).to(dlosses_N.dtype)
            losses_N = functional.cross_entropy(logits_NV, targets_N, reduction="none")
            leaves = [t for t, want in ((hidden_NH, want_hidden), (head_VH, want_head)) if want]
            found = iter(torch.autograd.grad(losses_N, leaves, dlosses_N, create_graph=True))
            return next(found) if want_hidden else None, next(found) if want_head else None, None
        scale_N1 = dlosses_N.to(hidden_NH.dtype).unsqueeze(1)
        dhidden = (gradient_NV @ head_VH) * scale_N1 if want_hidden else None
        dhead = gradient_NV.t() @ (hidden_NH * scale_N1) if want_head else None
        return dhidden, dhead, None


def _chunk(tensor: Tensor) -> int:
    """Elements to treat at a time: what a CPU's cache holds, and few launches on a GPU."""
    return 2**20 if tensor.device.type == "cpu" else 2**26
