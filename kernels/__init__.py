"""Fused arithmetic, each under one name with a CPU and a CUDA side."""
