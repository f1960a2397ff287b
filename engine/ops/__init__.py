"""Operators on tensors: readable torch twins, and the one door to the compiled kernels."""
