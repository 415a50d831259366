"""The Hugging Face face: configuration, model classes and upcycling.

Importing this package registers `moe_gpt2` with `AutoConfig` and `AutoModelForCausalLM`, and as a
model for causal language modelling.
"""

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moe_emergence.models.block import MoECausalLMOutput
from moe_emergence.models.clusters import start_routers_at_clusters, start_routers_at_domains
from moe_emergence.models.configuration import MoEGPT2Config
from moe_emergence.models.modeling import MoEGPT2LMHeadModel, MoEGPT2Model
from moe_emergence.models.upcycling import upcycle

AutoConfig.register(MoEGPT2Config.model_type, MoEGPT2Config, exist_ok=True)
AutoModelForCausalLM.register(MoEGPT2Config, MoEGPT2LMHeadModel, exist_ok=True)
# the stock Trainer's label smoothing shifts the labels of models that are named there only
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(MoEGPT2Config.model_type, MoEGPT2LMHeadModel.__name__)

__all__ = [
    "MoECausalLMOutput",
    "MoEGPT2Config",
    "MoEGPT2LMHeadModel",
    "MoEGPT2Model",
    "start_routers_at_clusters",
    "start_routers_at_domains",
    "upcycle",
]
