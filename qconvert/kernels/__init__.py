"""The binary convolution: bits in, XOR and population count, floats or bits out; compiled, or in torch's own operations."""
