"""A device "mps" that computes on the CPU, and that refuses float64 as Apple's GPU does.

A tensor on it is a FakeMpsTensor, which holds the tensor on the CPU. Operations are done on that.
"""

import contextlib
from unittest import mock

import torch
import torch._dynamo  # torch imports it with the first step of an optimizer
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

MPS = torch.device("mps:0")  # with its index, which torch cannot look up without MPS
aten = torch.ops.aten
MIXED_DEVICES = {aten._to_copy.default, aten.copy_.default, aten.index.Tensor, aten.index_put_.default}


class FakeMpsTensor(torch.Tensor):
    """For torch's own code it is a tensor on the device "meta", which has a shape and no data."""

    @staticmethod
    def __new__(cls, cpu: torch.Tensor) -> "FakeMpsTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            cpu.shape,
            strides=cpu.stride(),
            storage_offset=cpu.storage_offset(),
            dtype=cpu.dtype,
            device="meta",
        )
        tensor.cpu_tensor = cpu
        return tensor

    @property
    def device(self) -> torch.device:
        return MPS

    def tolist(self) -> list:
        return self.cpu().tolist()

    def __setitem__(self, index: object, value: object) -> None:
        """For an index without tensors. torch's own would make a tensor of `value` on the device "meta"."""
        view = self[index]
        view.copy_(value) if isinstance(value, torch.Tensor) else view.fill_(value)

    def __repr__(self) -> str:
        return f"FakeMpsTensor({self.cpu_tensor!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        return dispatch(function, arguments, options or {})


class FakeMps(TorchDispatchMode):
    """Handles operations that create tensors on the device, or copy them to it."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return dispatch(function, arguments, options or {})


def dispatch(function, arguments, options):
    """Do an operation on the CPU. Its result is on the device if that was asked for, or if an argument is."""
    tensors = [x for x in tree_flatten((arguments, options))[0] if isinstance(x, torch.Tensor)]
    on_mps = [x for x in tensors if isinstance(x, FakeMpsTensor)]
    device = options.get("device")
    # torch's own code asks for the device of the wrapper: "meta"
    result_on_mps = (
        device.type == "mps" or (device.type == "meta" and bool(on_mps)) if device else bool(on_mps)
    )
    if on_mps and not device and function not in MIXED_DEVICES:
        assert all(isinstance(x, FakeMpsTensor) or x.dim() == 0 for x in tensors), f"{function}: mps and cpu"
    plain = tree_map(lambda x: x.cpu_tensor if isinstance(x, FakeMpsTensor) else x, (arguments, options))
    if result_on_mps and device:
        plain[1]["device"] = torch.device("cpu")
    result = function(*plain[0], **plain[1])
    if not result_on_mps:
        return result
    by_id = {id(x.cpu_tensor): x for x in on_mps}  # an operation in place returns its argument

    def wrap(x):
        if not isinstance(x, torch.Tensor):
            return x
        if x.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"{function}: the MPS framework doesn't support float64")
        return by_id[id(x)] if id(x) in by_id else FakeMpsTensor(x)

    return tree_map(wrap, result)


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """F.scaled_dot_product_attention, whose own code makes masks on the device of the wrapper."""
    if enable_gqa:
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    scores = q @ k.transpose(-2, -1) * (q.size(-1) ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return F.dropout(torch.softmax(scores, dim=-1), dropout_p) @ v


class CpuGenerator(torch.Generator):
    """A random generator that works on the CPU, whatever the device."""

    def __new__(cls, device: object = "cpu") -> "CpuGenerator":
        return super().__new__(cls)


@contextlib.contextmanager
def fake_mps():
    """Within it, torch has the device "mps"."""
    patches = (
        mock.patch.object(torch.backends.mps, "is_available", lambda: True),
        mock.patch.object(torch.mps, "manual_seed", lambda seed: None),
        mock.patch.object(torch.mps, "recommended_max_memory", lambda: 1 << 34),
        mock.patch.object(torch.mps, "driver_allocated_memory", lambda: 0),
        mock.patch.object(torch.mps, "current_allocated_memory", lambda: 0),
        mock.patch.object(torch.mps, "synchronize", lambda: None),
        mock.patch.object(torch, "Generator", CpuGenerator),
        # tensors of inference mode have no version, and the wrapper asks for it
        mock.patch.object(
            torch._C, "_InferenceMode", lambda on: torch.no_grad() if on else torch.enable_grad()
        ),
        mock.patch.object(F, "scaled_dot_product_attention", attention),
    )
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        # else Module.to would replace the parameters, and tied ones would be two
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, False)
        with FakeMps():
            yield
