"""Untrusted bytes to tensors: bounded decoding and the geometry of pictures."""
