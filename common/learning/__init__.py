"""One training loop, and the gradients and stages that drive it."""
