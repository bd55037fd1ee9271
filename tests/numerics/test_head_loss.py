"""The head's loss on supervised positions is the plain loss over full logits: value and gradients, any chunks."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mirage.data.collate import collate
from mirage.errors import UserError
from mirage.training import head_loss as head_loss_module
from mirage.training.head_loss import choose_kernel, head_loss, plain_linear
from mirage.training.loss import PackedLossModel
from tests.support.models import flat_gradients, fresh, relative_difference, samples

FAMILIES = ("internvl", "qwen2_vl")
NUM_POSITIONS, WIDTH, VOCABULARY = 45, 24, 301


def plain_loss(model: torch.nn.Module, batch: object) -> torch.Tensor:
    """Logits of every position, fp32 cross-entropy, token weights: what the head must be equal to."""
    hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state[0]
    logits = model.lm_head(hidden).float()
    losses = F.cross_entropy(logits[:-1], batch.labels[1:], reduction="none", ignore_index=-100)
    return (losses * batch.token_weights[1:]).sum()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_loss_chunks", [1, 2, 7, 64, 4096])
def test_model_loss_is_the_plain_loss(tiny_folders, shapes, family, num_loss_chunks):
    folder = tiny_folders[family]
    model, adapter = fresh(folder)
    batch = collate(
        samples(shapes, folder, adapter, [0, 9, 16, 3]), adapter, reduction="square", num_loss_chunks=num_loss_chunks
    )
    expected_loss = plain_loss(model, batch)
    (expected_loss * 0.37).backward()
    expected = flat_gradients(model)
    model, _ = fresh(folder)
    loss, correct, supervised = PackedLossModel(model)(batch)
    (loss * 0.37).backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert relative_difference(flat_gradients(model), expected) < 1e-6
    assert 0 <= correct.item() <= supervised.item() == int((batch.labels[1:] != -100).sum())


def drawn(dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCABULARY, WIDTH, generator=generator))
    hidden = torch.randn(NUM_POSITIONS, WIDTH, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(0, VOCABULARY, (NUM_POSITIONS,), generator=generator)
    weights = torch.rand(NUM_POSITIONS, generator=generator)
    weights[5] = 0.0
    return head.to(dtype), hidden, target, weights


def reference(head, hidden, target, weights, dtype=torch.float64):
    weight, hidden = (tensor.detach().to(dtype).requires_grad_() for tensor in (head.weight, hidden))
    logits = hidden @ weight.t()
    losses = F.cross_entropy(logits if dtype == torch.float64 else logits.float(), target, reduction="none")
    ((losses * weights).sum() * 0.37).backward()
    return losses.detach(), logits.detach().argmax(-1) == target, hidden.grad, weight.grad


def distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize("device_type", ["cpu", "cuda"], ids=["one block", "aligned blocks"])
@pytest.mark.parametrize("num_chunks", [1, 2, 4, 45, 100])
def test_losses_and_gradients_are_the_exact_ones(monkeypatch, num_chunks, device_type):
    cut = head_loss_module._vocabulary_blocks
    monkeypatch.setattr(head_loss_module, "_vocabulary_blocks", lambda size, **_: cut(size, device_type=device_type))
    head, hidden, target, weights = drawn()
    found = head_loss(head, hidden, target, weights, num_chunks=num_chunks)
    (found.total * 0.37).backward()
    losses, right, grad_hidden, grad_weight = reference(head, hidden, target, weights)
    assert distance(found.losses, losses) < 1e-6
    assert found.total.item() == pytest.approx(float((losses * weights).sum()), rel=1e-6)
    assert torch.equal(found.right, right)
    assert distance(hidden.grad, grad_hidden) < 1e-6
    assert distance(head.weight.grad, grad_weight) < 1e-6


def test_bf16_is_as_near_the_truth_as_autograd_is():
    head, hidden, target, weights = drawn(torch.bfloat16)
    (head_loss(head, hidden, target, weights, num_chunks=4).total * 0.37).backward()
    _, _, true_hidden, true_weight = reference(head, hidden, target, weights)
    _, _, autograd_hidden, autograd_weight = reference(head, hidden, target, weights, torch.bfloat16)
    # One more rounding to bf16 than autograd: the upstream gradient comes when the gradient is already made.
    assert distance(hidden.grad, true_hidden) < 1.3 * distance(autograd_hidden, true_hidden)
    assert distance(head.weight.grad, true_weight) < 1.3 * distance(autograd_weight, true_weight)


class _Rows(TorchDispatchMode):
    """The most rows that any tensor as wide as the vocabulary has."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and tensor.shape[-1] == VOCABULARY:
                # The weight seen from the other side is [H, V]; it is no logits.
                self.most = max(self.most, 0 if tensor.shape[0] == WIDTH else tensor.shape[0])
        return result


@pytest.mark.parametrize("num_chunks", [1, 5, 15])
def test_logits_of_one_chunk_exist_at_a_time(num_chunks):
    head, hidden, target, weights = drawn()
    with _Rows() as rows:
        head_loss(head, hidden, target, weights, num_chunks=num_chunks).total.backward()
    assert rows.most == NUM_POSITIONS // num_chunks


def test_frozen_parts_get_no_gradient():
    head, hidden, target, weights = drawn()
    head.weight.requires_grad_(False)
    head_loss(head, hidden, target, weights).total.backward()
    assert head.weight.grad is None and hidden.grad is not None
    with torch.no_grad():
        assert not head_loss(head, hidden, target, weights).total.requires_grad


def test_no_position_gives_zero_gradients():
    head, hidden, target, weights = drawn()
    found = head_loss(head, hidden[:0], target[:0], weights[:0], num_chunks=3)
    found.total.backward()
    assert found.total.item() == 0.0 and torch.equal(head.weight.grad, torch.zeros_like(head.weight))


def test_a_second_backward_pass_is_an_error():
    head, hidden, target, weights = drawn()
    total = head_loss(head, hidden, target, weights).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="earlier backward"):
        total.backward()


def test_hooks_of_the_head_see_one_call_and_its_forward_is_its_own_again():
    head, hidden, target, weights = drawn()
    calls = []
    head.register_forward_pre_hook(lambda *_: calls.append("before"))
    head.register_forward_hook(lambda *_: calls.append("after"))
    head_loss(head, hidden, target, weights, num_chunks=4)
    assert calls == ["before", "after"]
    assert torch.equal(head(hidden), F.linear(hidden, head.weight))


@pytest.mark.parametrize("num_chunks", [1, 4, 60])
def test_heads_that_are_more_than_a_matrix_are_checkpointed(num_chunks):
    head, hidden, target, weights = drawn()
    model = torch.nn.Module()
    model.lm_head = torch.nn.Sequential(head)
    assert plain_linear(model.lm_head) is None
    found = PackedLossModel(model).head_loss(hidden, target, weights, num_chunks=num_chunks)
    (found.total * 0.37).backward()
    losses, right, grad_hidden, grad_weight = reference(head, hidden, target, weights)
    assert distance(found.losses, losses) < 1e-6 and torch.equal(found.right, right)
    assert distance(hidden.grad, grad_hidden) < 1e-6
    assert distance(head.weight.grad, grad_weight) < 1e-6


def test_every_rank_calls_a_checkpointed_head_equally_often():
    head, hidden, target, weights = drawn()
    calls = []
    model = torch.nn.Module()
    model.lm_head = torch.nn.Sequential(head)
    head.register_forward_hook(lambda *_: calls.append(1))
    for num_positions in (45, 9, 1, 0):
        calls.clear()
        part = slice(0, num_positions)
        PackedLossModel(model).head_loss(hidden[part], target[part], weights[part], num_chunks=4)
        assert len(calls) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_logits_start_at_whole_loads(dtype):
    strides = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.mm.out and kwargs["out"].shape[1] == VOCABULARY:
                strides.append(kwargs["out"].stride())
            return function(*args, **(kwargs or {}))

    head, hidden, target, weights = drawn(dtype)
    with Seen():
        found = head_loss(head, hidden, target, weights, num_chunks=4)
    assert strides == [(304, 1)] * 4
    (found.total * 0.37).backward()
    losses, _, grad_hidden, grad_weight = reference(head, hidden, target, weights, torch.float64)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert distance(found.losses, losses) < tolerance
    assert distance(hidden.grad, grad_hidden) < tolerance
    assert distance(head.weight.grad, grad_weight) < tolerance


@pytest.mark.parametrize("size, ends", [(301, [296, 301]), (304, [304]), (5, [5])])
def test_a_gpu_multiplies_a_vocabulary_that_is_out_of_step_in_two_blocks(size, ends):
    blocks = head_loss_module._vocabulary_blocks(size, device_type="cuda")
    assert [block.stop for block in blocks] == ends and blocks[0].start == 0
    assert head_loss_module._vocabulary_blocks(size, device_type="cpu") == [slice(0, size)]


def test_choice_of_kernel(monkeypatch):
    for device_type in ("cpu", "cuda"):
        assert choose_kernel("auto", device_type=device_type)[0] == "torch"
    with pytest.raises(UserError, match="no GPU is present"):
        choose_kernel("liger", device_type="cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed"):
        choose_kernel("liger", device_type="cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert choose_kernel("liger", device_type="cuda")[0] == "liger"


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary, width", [(92_553, 4096), (151_936, 3584)])
@pytest.mark.parametrize("kernel", ["torch", "liger"])
def test_kernels_on_the_gpu_at_real_size(vocabulary, width, kernel):
    if kernel == "liger":
        pytest.importorskip("liger_kernel")
    generator = torch.Generator("cuda").manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, bias=False, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(512, width, generator=generator, device="cuda").bfloat16().requires_grad_()
    target = torch.randint(0, vocabulary, (512,), generator=generator, device="cuda")
    weights = torch.ones(512, device="cuda")
    found = head_loss(head, hidden, target, weights, num_chunks=4, kernel=kernel)
    (found.total * 0.37).backward()
    losses, _, grad_hidden, grad_weight = reference(head, hidden, target, weights, torch.float64)
    assert distance(found.losses, losses) < 5e-3
    assert distance(hidden.grad, grad_hidden) < 2e-2
    assert distance(head.weight.grad, grad_weight) < 2e-2
