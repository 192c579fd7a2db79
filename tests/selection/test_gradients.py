"""Per-sample gradients from one backward pass against torch.func on transformers' own models, in float64."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from nacd_fast.data import Encoded, pack
from nacd_fast.selection.gradients import SampleGradients
from nacd_fast.student import Student
from tests.oracle import exact, make_rows, pair, peft_model, plain_loss, random_theta

LENGTHS = [(3, 2), (1, 1), (6, 4), (2, 7), (1, 3)]
FAMILIES = ["opt", "llama", "qwen3", "gemma2", "gpt2", "mistral"]


def one_by_one(student: Student, oracle: object, theta: Tensor, rows: Sequence[Encoded]) -> Tensor:
    """[B, P], a sample at a time."""
    adapters = {name: t.detach() for name, t in student.unflatten(theta).items()}
    width = student.embedding.shape[1]
    prompts = torch.zeros(1, 0, width, dtype=theta.dtype)
    found = []
    for row in rows:
        grads = torch.func.grad(lambda a, row=row: plain_loss(oracle, a, prompts, [row]))(adapters)
        found.append(torch.cat([grads[name].flatten() for name in adapters]))
    return torch.stack(found)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [None, ("q_proj", "down_proj", "fc2", "c_attn")])
def test_they_are_those_of_each_sample_alone(family: str, targets: Sequence[str] | None) -> None:
    student, oracle = pair(family, torch.float64, targets=targets)
    theta, rows = random_theta(student, torch.float64).detach(), make_rows(LENGTHS)
    want = one_by_one(student, oracle, theta, rows)
    out = torch.full((len(rows), len(theta)), torch.nan, dtype=torch.float64)
    assert SampleGradients(student)(theta, pack(rows, 0), out) is out
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-12 + 1e-10 * float(want.abs().max()))


def test_a_sample_s_gradient_does_not_depend_on_the_others() -> None:
    student, _ = pair("llama", torch.float64)
    theta, rows = random_theta(student, torch.float64).detach(), make_rows(LENGTHS)
    gradients = SampleGradients(student)
    together, alone = (torch.empty(n, len(theta), dtype=torch.float64) for n in (len(rows), 1))
    gradients(theta, pack(rows, 0), together)
    for i, row in enumerate(rows):
        torch.testing.assert_close(gradients(theta, pack([row], 0), alone)[0], together[i], rtol=1e-9, atol=1e-12)


def test_float32_and_a_16_bit_base_are_near() -> None:
    for dtype, near in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        model = peft_model("llama", dtype)
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = p.data.float()
        student, oracle = Student(model), exact(peft_model("llama", torch.float64))
        rows = make_rows(LENGTHS)
        theta64 = random_theta(student, torch.float64).detach()
        want = one_by_one(student, oracle, theta64, rows)
        out = torch.empty(len(rows), len(theta64))
        SampleGradients(student)(theta64.float(), pack(rows, 0), out)
        assert (out - want).norm() < near * want.norm()
