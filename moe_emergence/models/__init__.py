"""The Hugging Face face: configuration, model classes and upcycling.

Importing this package registers `moe_gpt2`, `moe_llama`, `moe_mistral`, `moe_qwen2` and `moe_qwen3`
with `AutoConfig` and `AutoModelForCausalLM`, and as models for causal language modelling.
"""

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moe_emergence.models.clusters import start_routers_at_clusters, start_routers_at_domains
from moe_emergence.models.configuration import MoEGPT2Config
from moe_emergence.models.families import FAMILIES
from moe_emergence.models.llama import MixtureForCausalLM
from moe_emergence.models.mixture import MixtureModel
from moe_emergence.models.modeling import MoEGPT2LMHeadModel, MoEGPT2Model
from moe_emergence.models.outputs import MoECausalLMOutput
from moe_emergence.models.upcycling import upcycle

for _family in FAMILIES.values():
    _name = _family.config.model_type
    AutoConfig.register(_name, _family.config, exist_ok=True)
    AutoModelForCausalLM.register(_family.config, _family.mixture, exist_ok=True)
    # the stock Trainer's label smoothing shifts the labels of models that are named there only
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(_name, _family.mixture.__name__)

__all__ = [
    "MixtureForCausalLM",
    "MixtureModel",
    "MoECausalLMOutput",
    "MoEGPT2Config",
    "MoEGPT2LMHeadModel",
    "MoEGPT2Model",
    "start_routers_at_clusters",
    "start_routers_at_domains",
    "upcycle",
]
