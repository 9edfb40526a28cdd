"""Kernels in C++ that are optional: where there is no compiler, the same is done in torch.

Each kernel is one file: its source, as text since Flower's app bundles carry nothing but Python,
and the function that calls it. Switch them all off with FEDMOE_NATIVE=0.
"""
