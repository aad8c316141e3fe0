"""The three stages of a request, each step-wise: encode images, generate blocks, render."""
