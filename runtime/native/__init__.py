"""Kernels written in Python, compiled by LLVM: the fast executor."""
