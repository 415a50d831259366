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
        """
        x_TH = x.reshape(-1, x.shape[-1])
        decision = self.router(x_TH, noise, token_ids)
        y_TH = self.experts(x_TH, decision.topk_experts, decision.topk_weights)
        return y_TH.view(x.shape), decision
