"""Nodes that look inside a running ComfyUI, for the tests only.

V1 nodes: that interface is the same on every supported host.
"""

from . import apply, calls, control, flow, models, patches, tensors

NODE_CLASS_MAPPINGS = {
    node.__name__: node
    for module in (apply, calls, control, flow, models, patches, tensors)
    for node in module.NODES
}
