"""What torch expects of an operator: exact schemas, fake kernels, autograd, compile, autocast, no double backward."""

import pytest
import torch
from cases import Heads, random_step_ids, relative_error
from devices import operators
from torch.library import opcheck

from statecore import ops

GQA = Heads(q=4, k=2, v=2, key_width=8, value_width=12)
GVA = Heads(q=2, k=2, v=4, key_width=8, value_width=12)
ALPHA = torch.tensor([0.0, 0.0, 0.1, 0.2, 0.3, 0.4])

SCHEMAS = [
    "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? log_decay=None, Tensor? initial_state=None, "
    "Tensor? cu_seqlens=None, *, float? scale=None) -> (Tensor out, Tensor final_state)",
    "segment_attention(Tensor q, Tensor k, Tensor v, Tensor step_ids, Tensor? cu_seqlens=None, *, "
    "float? scale=None) -> (Tensor out, Tensor lse)",
    "step_linear_attention(Tensor q, Tensor k, Tensor v, Tensor step_ids, Tensor alpha, "
    "Tensor? initial_states=None, Tensor? initial_step=None, Tensor? cu_seqlens=None, *, "
    "float? scale=None) -> (Tensor out, Tensor states)",
    "mixed_attention(Tensor q, Tensor k, Tensor v, Tensor lin_q, Tensor lin_k, Tensor lin_v, Tensor gate, "
    "Tensor step_ids, Tensor alpha, Tensor? initial_states=None, Tensor? initial_step=None, "
    "Tensor? cu_seqlens=None, *, float? scale=None, float? lin_scale=None) -> (Tensor out, Tensor states)",
    "state_update(Tensor(a!) states, Tensor q, Tensor k, Tensor v, Tensor? log_decay=None, "
    "Tensor? ends_step=None, Tensor? alpha=None, Tensor? slots=None, *, float? scale=None) -> Tensor out",
]


def linear(time=19, dtype=torch.float32, heads=GVA):
    q, k, v = heads.qkv(2, time, dtype, requires_grad=True)
    decay = -torch.rand(2, time, heads.v)
    state = torch.randn(2, heads.v, heads.key_width, heads.value_width)
    return (q, k, v, decay.requires_grad_(), state.requires_grad_(), None), {"scale": 0.3}


def segment(time=19, dtype=torch.float32):
    return (*GQA.qkv(2, time, dtype, requires_grad=True), random_step_ids(2, time, padding=2), None), {"scale": None}


def step_linear(time=19, dtype=torch.float32):
    states = torch.randn(3, 2, GQA.v, GQA.key_width, GQA.value_width, requires_grad=True)
    ids = random_step_ids(2, time, padding=2)
    tensors = *GQA.qkv(2, time, dtype, requires_grad=True), ids, ALPHA, states, torch.full((2,), -1, dtype=torch.int32)
    return (*tensors, None), {"scale": None}


def mixed(time=19, dtype=torch.float32):
    q, k, v = GQA.qkv(2, time, dtype, requires_grad=True)
    lin_q, lin_k, _ = GQA.qkv(2, time, dtype, requires_grad=True)
    lin_v = torch.randn_like(v, requires_grad=True)
    gate = torch.randn(2, time, GQA.q, GQA.value_width).to(dtype).requires_grad_()
    ids = random_step_ids(2, time, padding=2)
    return (q, k, v, lin_q, lin_k, lin_v, gate, ids, ALPHA, None, None, None), {"scale": None, "lin_scale": 0.5}


def update(time=None, dtype=torch.float32):
    q, k, v = (x[0].detach().clone() for x in GVA.qkv(1, 3, dtype))
    slots = torch.tensor([2, -1, 0], dtype=torch.int32)
    ends = torch.tensor([2, -1, -1], dtype=torch.int32)
    return (torch.randn(3, 4, 4, 8, 12), q, k, v, -torch.rand(3, 4), ends, ALPHA, slots), {"scale": None}


CASES = {
    "linear_attention": linear,
    "segment_attention": segment,
    "step_linear_attention": step_linear,
    "mixed_attention": mixed,
    "state_update": update,
}
DIFFERENTIABLE = [name for name in CASES if name != "state_update"]


def scalar(results) -> torch.Tensor:
    """A fixed random combination of all results, so that each has a gradient."""
    generator = torch.Generator().manual_seed(3)
    total = 0.0
    for x in (results,) if isinstance(results, torch.Tensor) else results:
        finite = torch.where(x.isinf(), 0.0, x.double())
        total = total + (finite * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
    return total


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda s: s.split("(")[0])
def test_schema_is_the_contract(schema):
    name = schema.split("(")[0]
    assert str(getattr(torch.ops.statecore, name).default._schema) == f"statecore::{schema}"


def test_every_cpu_operator_has_a_cuda_kernel_if_any_is_compiled():
    compiled = ops.build_info()["cuda_architectures"] != "none"
    for name in operators():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"statecore::{name}", "CUDA") == compiled, name


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    args, kwargs = CASES[name]()
    opcheck(getattr(torch.ops.statecore, name).default, args, kwargs)


@pytest.mark.parametrize("name", CASES)
def test_compiles_in_one_graph(name):
    args, kwargs = CASES[name]()
    function = getattr(ops, name)
    differentiable = [x for x in args if x is not None and x.requires_grad]
    eager_args = [x.clone() if name == "state_update" and x is not None else x for x in args]
    wanted = function(*eager_args, **kwargs)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = compiled(*args, **kwargs)
    for x, y in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (got, wanted)), strict=True):
        assert torch.equal(x, y)
    if differentiable:
        grads = torch.autograd.grad(scalar(got), differentiable)
        for x, y in zip(grads, torch.autograd.grad(scalar(wanted), differentiable), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_compiles_for_changing_lengths(name):
    compiled = torch.compile(getattr(ops, name), fullgraph=True, dynamic=True, backend="aot_eager")
    for time in (5, 19, 64, 131):
        args, kwargs = CASES[name](time)
        for x, y in zip(compiled(*args, **kwargs), getattr(ops, name)(*args, **kwargs), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_double_backward_is_refused(name):
    args, kwargs = CASES[name]()
    (grad,) = torch.autograd.grad(scalar(getattr(ops, name)(*args, **kwargs)), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of gradients are not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("name", CASES)
def test_autocast_casts_activations_and_keeps_states(name):
    args, kwargs = CASES[name]()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        results = getattr(ops, name)(*args, **kwargs)
    out, *states = (results,) if isinstance(results, torch.Tensor) else results
    assert out.dtype == torch.bfloat16
    assert all(state.dtype == torch.float32 for state in states)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_autocast_gradients_have_the_inputs_dtype(name):
    args, kwargs = CASES[name]()
    differentiable = [x for x in args if x is not None and x.requires_grad]
    exact = torch.autograd.grad(scalar(getattr(ops, name)(*args, **kwargs)), differentiable)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = scalar(getattr(ops, name)(*args, **kwargs))
    for x, y in zip(torch.autograd.grad(loss, differentiable), exact, strict=True):
        assert x.dtype == torch.float32
        assert relative_error(x, y) < 0.05


def test_build_info_names_the_library():
    info = ops.build_info()
    assert info["library"].endswith("_C.so")
    assert info["cpu_isa"] in ("portable", "avx2", "avx512", "avx512_bf16")
