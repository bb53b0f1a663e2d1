"""What GPUs need: their data, kernels compiled for them, what the compiled code says, and a model of its time."""
