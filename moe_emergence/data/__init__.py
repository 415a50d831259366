"""Text of three domains as blocks of tokens, and the loader that feeds them to training."""

from moe_emergence.data.loader import StepBatch, eval_batches, make_step_loader
from moe_emergence.data.manifest import check_same_data
from moe_emergence.data.prepare import prepare_data
from moe_emergence.data.prepared import PreparedData, save_prepared
from moe_emergence.data.tokenizer import load_tokenizer

__all__ = [
    "PreparedData",
    "StepBatch",
    "check_same_data",
    "eval_batches",
    "load_tokenizer",
    "make_step_loader",
    "prepare_data",
    "save_prepared",
]
