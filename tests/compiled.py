"""Compiling what a program launches by Triton, for a GPU that need not be there.

    python -m tests.compiled 80:search:64 90:attention:128

prints a line of JSON for each kernel that the cases launch, by compute capability and width of a head: its name and its
shared memory in bytes.
"""

import json
import sys
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32"}
OPTIONS = ("num_warps", "num_stages", "maxnreg")


def type_of(argument) -> str:
    if isinstance(argument, torch.Tensor):
        return f"*{TYPES[argument.dtype]}"
    return "fp32" if isinstance(argument, float) else "i32"


def compile_launch(kernel: JITFunction, target: GPUTarget, arguments, named) -> dict:
    """Compile a kernel for the types, constants and options that it was launched with."""
    options = {name: named.pop(name) for name in OPTIONS if named.get(name) is not None}
    values = {**dict(zip(kernel.arg_names, arguments)), **{k: v for k, v in named.items() if k in kernel.arg_names}}
    signature, constants, aligned = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(place,)] = "constexpr", value
        else:
            signature[parameter.name] = type_of(value)
            whole = isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
            if isinstance(value, torch.Tensor) or whole:
                aligned[(place,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(ASTSource(kernel, signature, constants, aligned), target=target, options=options)
    return {"kernel": kernel.fn.__name__, "shared": compiled.metadata.shared}


def search(d: int) -> None:
    from longmem_fairseq.memory.search.triton import search_ring

    one, held = torch.zeros(1, dtype=torch.int64), torch.tensor([300])
    search_ring(torch.randn(1, 1, 300, d), one, one, held, torch.randn(1, 1, 200, d, dtype=torch.bfloat16), 16)


def attention(d: int) -> None:
    from longmem_fairseq.modules.memory_attention_triton import memory_attention_triton

    q = torch.randn(1, 1, 3, d, dtype=torch.bfloat16).requires_grad_()
    keys, values = torch.randn(2, 1, 1, 5, 4, d, dtype=torch.bfloat16)
    slots = torch.zeros(1, 1, 3, 2, dtype=torch.int64)
    memory_attention_triton(q, keys, values, slots.new_zeros(1), slots, 1.0).sum().backward()


def causal(d: int) -> None:
    from longmem_fairseq.modules.causal_attention_triton import causal_attention_triton

    q = torch.randn(1, 4, 300, d, dtype=torch.bfloat16).requires_grad_()
    k, v = torch.randn(2, 1, 2, 300, d, dtype=torch.bfloat16).requires_grad_()
    sum(x.sum() for x in causal_attention_triton(q, k, v, torch.ones(4))).backward()


CASES = {"search": search, "attention": attention, "causal": causal}


def main() -> None:
    for case in sys.argv[1:]:
        capability, name, d = case.split(":")
        target = GPUTarget("cuda", int(capability), 32)

        def launch(kernel, *arguments, grid, warmup, target=target, capability=capability, **named):
            compiled = compile_launch(kernel, target, arguments, named)
            print(json.dumps({"capability": capability, **compiled}), flush=True)

        with mock.patch.object(JITFunction, "run", launch):
            CASES[name](int(d))


if __name__ == "__main__":
    main()
