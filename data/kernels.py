"""Matrices laid out once for a CPU's products: while replies are written, each is read for every token."""
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from memory import vocab_chunks

PACKED = {}  # id of a weight -> the same in the layout of oneDNN, torch's library for such products


def is_packed(weight):
    return id(weight) in PACKED


def linear(x, weight, bias=None):
    """x W^T + b."""
    if not is_packed(weight):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, PACKED[id(weight)], bias, "none", [], "")


@contextmanager
def prepacked(model, rows):
    """Inside, linear() is faster for inputs of about so many rows. Before each product oneDNN brings a matrix
    into a layout of its own, which for a few rows takes longer than the product; here it does so once, in a
    copy. With GPT-2 124M a token takes half the time. Where processor or torch cannot, nothing happens."""
    able = (model.device.type == "cpu" and not model.streamed_blocks and torch.backends.mkldnn.is_available()
            and torch.backends.cpu.get_cpu_capability().startswith("AVX")
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
            and (model.ln_f.weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()))
    try:
        if able:
            weights = {id(x.weight): x.weight for x in model.modules() if isinstance(x, torch.nn.Linear)}
            (_, output_matrix), = vocab_chunks(model.output_matrix, model.cfg.vocab_size, model.device)
            for key, weight in (weights | {id(model.output_matrix): output_matrix}).items():
                PACKED[key] = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        yield
    finally:
        PACKED.clear()
