"""The runs of an experiment, and the model that each begins with."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain

from moe_emergence.config import RunConfig
from moe_emergence.data import PreparedData
from moe_emergence.data.samples import text_to_cluster
from moe_emergence.models import (
    start_routers_at_clusters,
    start_routers_at_domains,
    upcycle,
)
from moe_emergence.models.loading import LanguageModel, load_dense_model, new_dense_model
from moe_emergence.run_folder import RunFolder


@dataclass(frozen=True)
class Stage:
    """One run of an experiment."""

    role: str
    """base, moe, dense or null."""
    config: RunConfig
    run: RunFolder
    make_model: Callable[[PreparedData], LanguageModel]
    """The model at step 0."""


def stages(config: RunConfig, run: RunFolder) -> list[Stage]:
    """The runs an experiment consists of, in order."""
    alone = replace(config.optim, compare_dense=False, compare_null=False)
    optim = replace(alone, pretrain_steps=0)
    dense = replace(
        config, stop_after=None, ep_size=1, model=replace(config.model, moe_layers=()), optim=optim
    )
    is_moe = bool(config.model.moe_layers)
    base_run = RunFolder(run.root / "dense-base")
    pretrained = config.model.base == "scratch" and is_moe
    start = _new_model(config)
    found = []
    if pretrained:
        pretraining = replace(
            optim,
            max_steps=config.optim.pretrain_steps,
            learning_rate=config.optim.pretrain_learning_rate,
        )
        # another order of the data than the runs that go on from here
        name = f"{config.run_name} base"
        base = replace(
            dense,
            run_name=name,
            seed=(config.seed + 1) % 2**31,
            model=replace(dense.model, frozen_layers=0),
            optim=pretraining,
        )
        found.append(Stage("base", base, base_run, start))
        start = _loaded_model(config, str(base_run.final_model))
    elif config.model.base != "scratch":
        start = _loaded_model(config, config.model.base)
    role = "moe" if is_moe else "dense"
    found.append(Stage(role, config, run, _upcycled(config, start) if is_moe else start))
    if config.optim.compare_dense and is_moe:
        compared = replace(dense, run_name=f"{config.run_name} dense")
        found.append(Stage("dense", compared, RunFolder(run.root / "dense"), start))
    random = replace(config.model, router="frozen", router_init="random")
    if config.optim.compare_null and is_moe and random != config.model:
        null = replace(config, run_name=f"{config.run_name} null", stop_after=None, model=random)
        null = replace(null, optim=alone)
        found.append(Stage("null", null, RunFolder(run.root / "null"), _upcycled(null, start)))
    return found


def _new_model(config: RunConfig) -> Callable[[PreparedData], LanguageModel]:
    return lambda data: new_dense_model(
        config.model, data.tokenizer, config.data.block_size, config.seed
    )


def _loaded_model(config: RunConfig, base: str) -> Callable[[PreparedData], LanguageModel]:
    model = replace(config.model, base=base)
    return lambda data: load_dense_model(
        model, data.tokenizer, config.data.block_size, config.data.cache_dir
    )


def _upcycled(
    config: RunConfig, start: Callable[[PreparedData], LanguageModel]
) -> Callable[[PreparedData], LanguageModel]:
    model, optim = config.model, config.optim

    def make(data: PreparedData) -> LanguageModel:
        mixture = upcycle(
            start(data),
            model.moe_layers,
            model.num_experts,
            model.top_k,
            noise=model.upcycle_noise,
            seed=config.seed,
            router=model.router,
            top1_weight=model.top1_weight,
            use_expert_bias=model.expert_bias_rate > 0,
            expert_bias_rate=model.expert_bias_rate,
            pool_size=model.pool_size,
            document_end=data.tokenizer.eos_token_id,
            lb_coef=optim.lb_coef,
            z_coef=optim.z_coef,
            variance_coef=optim.variance_coef,
        )
        text = text_to_cluster(data.train_blocks, config.seed)
        if model.router_init == "clusters":
            start_routers_at_clusters(mixture, chain(*text.values()), seed=config.seed)
        elif model.router_init == "domains":
            start_routers_at_domains(mixture, text, seed=config.seed)
        return mixture

    return make
