"""The mixture-of-experts layer: router, then dispatcher over experts."""

from typing import get_args

from torch import Tensor, nn

from emergence_kernels.activations import Activation
from moe_emergence.moe.dispatch import Dispatcher, get_dispatcher
from moe_emergence.moe.experts import Experts
from moe_emergence.moe.noise import RouterNoise
from moe_emergence.moe.pools import DocumentPools
from moe_emergence.moe.routing import (
    HashRouter,
    RouterDecision,
    RouterKind,
    Top1Weight,
    TopKRouter,
)


class MoELayer(nn.Module):
    """E experts in the place of an MLP, K of which see each token. No token is ever dropped.

    It returns a pair, since training needs the decision for the auxiliary losses: in a block that
    is `y, decision = layer(x)` and `x = x + y`.

    Args:
        hidden_size: H, the model's width.
        expert_size: F, the inner width of one expert.
        num_experts: E, how many there are.
        top_k: K, how many of them see a token.
        activation: "gelu_tanh" (GPT-2, with biases) or "swiglu" (without).
        router: "learned", or the null models "frozen" and "hash".
        top1_weight: weight of a top-1 expert's output, see `TopKRouter`.
        use_expert_bias, expert_bias_rate: give the router a selection-only bias for loss-free
            balancing, and how far it moves by itself at every training pass.
        pools: let the tokens of a document choose among few experts; not of a hash router.
        dispatch: name of the path through the experts, see `get_dispatcher`; it can be changed at
            any time (`layer.dispatch = "sequential"`) and is not part of the state dict.
        layer: index in the model, so that the null models differ between layers.
        check_finite: refuse NaN and infinity by name, see `forward`. It waits for the device three
            times a pass: to look for an error with, not to train. It can be changed at any time
            (`layer.check_finite = True`). Without it a token that is NaN goes to the first experts.
    """

    def __init__(
        self,
        hidden_size: int,
        expert_size: int,
        num_experts: int,
        top_k: int,
        *,
        activation: Activation = "gelu_tanh",
        router: RouterKind = "learned",
        top1_weight: Top1Weight = "straight-through",
        use_expert_bias: bool = False,
        expert_bias_rate: float = 0.0,
        pools: DocumentPools | None = None,
        dispatch: str = "auto",
        layer: int = 0,
        check_finite: bool = False,
    ) -> None:
        super().__init__()
        if router not in get_args(RouterKind):
            raise ValueError(f"router {router!r}: choose from {', '.join(get_args(RouterKind))}")
        self.router: TopKRouter | HashRouter
        if router == "hash":
            self.router = HashRouter(num_experts, top_k, layer=layer)
        else:
            self.router = TopKRouter(
                hidden_size,
                num_experts,
                top_k,
                frozen=router == "frozen",
                use_expert_bias=use_expert_bias,
                expert_bias_rate=expert_bias_rate,
                top1_weight=top1_weight,
                pools=pools,
            )
        self.experts = Experts(num_experts, hidden_size, expert_size, activation)
        self.dispatch = dispatch
        self.index, self.check_finite = layer, check_finite

    @property
    def dispatch(self) -> Dispatcher:
        """The path through the experts; a name or a dispatcher can be assigned."""
        return self.experts.dispatcher

    @dispatch.setter
    def dispatch(self, path: str | Dispatcher) -> None:
        self.experts.dispatcher = get_dispatcher(path) if isinstance(path, str) else path

    def forward(
        self, x: Tensor, noise: RouterNoise | None = None, token_ids: Tensor | None = None
    ) -> tuple[Tensor, RouterDecision]:
        """Output of the shape of `x` (..., H), and the decision over its T flattened tokens.

        `token_ids` (...,) is needed by the hash router and by pools only.

        Raises:
            FloatingPointError: with `check_finite`, when the input, the router's logits or the
                experts' output are not finite; it names the layer, the first of them, and how many
                rows are concerned. Logits are computed in fp32 and finite for every input in 16
                bits; experts' products in fp16 overflow above 65,504.
        """
        x_TH = x.reshape(-1, x.shape[-1])
        self._check("input", x_TH)
        decision = self.router(x_TH, noise, token_ids)
        self._check("router's logits", decision.router_logits)
        y_TH = self.experts(x_TH, decision.topk_experts, decision.topk_weights)
        self._check("experts' output", y_TH)
        return y_TH.view(x.shape), decision

    def _check(self, what: str, rows: Tensor) -> None:
        if not self.check_finite:
            return
        bad_T = ~rows.detach().isfinite().all(dim=1)
        if bad_T.any():
            raise FloatingPointError(
                f"layer {self.index}: the {what} is not finite in {bad_T.sum():,} of "
                f"{len(bad_T):,} rows ({rows.dtype}), first in row {bad_T.int().argmax()}"
            )
