"""The Triton kernels, one file per operator, and what launches them.

Nothing here is imported until a CUDA (or ROCm) tensor asks for it: importing a module of this
package imports triton. Functions take and return plain tensors and are not differentiable by
themselves; the operators above (`emergence_kernels.expert_mlp`, ...) register their gradients.
"""
