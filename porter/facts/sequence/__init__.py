"""Which tensors of a denoiser are divided between ranks that share one sequence, found by following its forward."""
