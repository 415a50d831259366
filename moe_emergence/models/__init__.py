"""The Hugging Face face: configuration, model classes and upcycling.

Importing this package registers `moe_gpt2` with `AutoConfig` and `AutoModelForCausalLM`.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from moe_emergence.models.configuration import MoEGPT2Config
from moe_emergence.models.modeling import MoECausalLMOutput, MoEGPT2LMHeadModel, MoEGPT2Model
from moe_emergence.models.upcycling import upcycle

AutoConfig.register(MoEGPT2Config.model_type, MoEGPT2Config, exist_ok=True)
AutoModelForCausalLM.register(MoEGPT2Config, MoEGPT2LMHeadModel, exist_ok=True)

__all__ = [
    "MoECausalLMOutput",
    "MoEGPT2Config",
    "MoEGPT2LMHeadModel",
    "MoEGPT2Model",
    "upcycle",
]
