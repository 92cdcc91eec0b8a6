"""Own kernels: each folder holds what the op means in torch, its Triton kernel, and the op that chooses."""
